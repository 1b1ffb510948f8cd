"""Columns of bytes and their products, beside what NumPy computes."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.kernels.features import PATHS, host_features
from npllama.kernels.simd_columns import add_bytes, add_nibbles, add_turned_nibbles, copy_first
from npllama.kernels.simd_sums import first_sums, store_sums

RNG = np.random.default_rng(4)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

TOKENS = 4
ROWS = RNG.integers(0, 256, (16, 100)).astype(np.uint8)  # 100 bytes apart
NUMBERS = RNG.integers(-128, 128, (TOKENS, 64)).astype(np.int8)
BEGINS = RNG.integers(-(1 << 20), 1 << 20, TOKENS).astype(np.int32)


def added(instruction: object, at: int, numbers: np.ndarray = NUMBERS) -> np.ndarray:
    """Return the sums (tokens, 16) of what begins at a byte of each row."""

    @numba.njit
    def kernel(out: int, begins: int, rows: int, x: int) -> None:
        store_sums(out, instruction(first_sums(begins, TOKENS), rows, 100, x))

    found = np.zeros((TOKENS, 16), np.int32)
    kernel(found.ctypes.data, BEGINS.ctypes.data, ROWS.ctypes.data + at, numbers.ctypes.data)
    return found


def test_a_lane_is_the_exact_product_of_a_row_of_int8_and_a_token() -> None:
    weights = ROWS[:, 7:71].view(np.int8).astype(np.int64) + 128
    np.testing.assert_array_equal(added(add_bytes, 7), BEGINS[:, None] + NUMBERS.astype(np.int64) @ weights.T)


def test_low_halves_of_bytes_are_the_first_numbers_of_a_group_and_high_ones_the_last() -> None:
    group = ROWS[:, 11:43].astype(np.int64)
    weights = np.hstack([group & 15, group >> 4])
    np.testing.assert_array_equal(added(add_nibbles, 11), BEGINS[:, None] + NUMBERS.astype(np.int64) @ weights.T)


def test_halves_of_bytes_in_memory_meet_either_half_of_a_group_and_no_sum_is_too_large_for_16_bits() -> None:
    group = ROWS[:, 11:43].copy()
    group[0] = 255
    columns = np.ascontiguousarray(group.reshape(16, 8, 4).swapaxes(0, 1))
    numbers = NUMBERS.copy()
    numbers[0], numbers[1] = -128, 127

    @numba.njit
    def kernel(out: int, begins: int, columns: int, x: int) -> None:
        tile = first_sums(begins, TOKENS)
        for word in range(0, 8, 4):
            tile = add_turned_nibbles(tile, columns + 64 * word, x + 4 * word)
        store_sums(out, tile)

    found = np.zeros((TOKENS, 16), np.int32)
    kernel(found.ctypes.data, BEGINS.ctypes.data, columns.ctypes.data, numbers.ctypes.data)
    weights = np.hstack([group & 15, group >> 4]).astype(np.int64)
    np.testing.assert_array_equal(found, BEGINS[:, None] + numbers.astype(np.int64) @ weights.T)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16])
def test_the_first_few_numbers_of_16_bits_and_zeros_behind_them(count: int) -> None:
    source, target = np.arange(1, 20, dtype=np.uint16), np.full(18, 99, np.uint16)

    @numba.njit
    def kernel(target: int, source: int) -> None:
        copy_first(target, source, count)

    kernel(target.ctypes.data, source.ctypes.data)
    np.testing.assert_array_equal(target, [*range(1, count + 1), *[0] * (16 - count), 99, 99])
