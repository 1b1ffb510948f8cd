"""Columns of bytes and their products, beside what NumPy computes."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.kernels.features import PATHS, host_features
from npllama.kernels.simd_columns import add_bytes, add_nibbles, add_turned_bytes, add_turned_nibbles, copy_first
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


def added_turned(instruction: object, columns: np.ndarray, numbers: np.ndarray, words: int) -> np.ndarray:
    """Return the sums (tokens, 16) of columns (words, 16 rows, 4 bytes), four after four."""

    @numba.njit
    def kernel(out: int, begins: int, columns: int, x: int) -> None:
        tile = first_sums(begins, TOKENS)
        for word in range(0, words, 4):
            tile = instruction(tile, columns + 64 * word, x + 4 * word)
        store_sums(out, tile)

    found = np.zeros((TOKENS, 16), np.int32)
    kernel(found.ctypes.data, BEGINS.ctypes.data, columns.ctypes.data, numbers.ctypes.data)
    return found


def turned(group: np.ndarray) -> np.ndarray:
    """Return the columns of sixteen rows of bytes."""
    return np.ascontiguousarray(group.reshape(16, -1, 4).swapaxes(0, 1))


def test_columns_in_memory_meet_pairs_of_int16_as_they_are() -> None:
    group = ROWS[:, 7:71].view(np.int8)
    fours = NUMBERS.reshape(TOKENS, 16, 4)
    pairs = np.ascontiguousarray(np.stack([fours[:, :, 0::2], fours[:, :, 1::2]], 1).astype(np.int16))
    expected = BEGINS[:, None] + NUMBERS.astype(np.int64) @ group.astype(np.int64).T
    np.testing.assert_array_equal(added_turned(add_turned_bytes, turned(group), pairs, 16), expected)


def test_halves_of_bytes_in_memory_meet_either_half_of_a_group_and_no_sum_is_too_large_for_16_bits() -> None:
    group = ROWS[:, 11:43].copy()
    group[0] = 255
    numbers = NUMBERS.copy()
    numbers[0], numbers[1] = -128, 127
    weights = np.hstack([group & 15, group >> 4]).astype(np.int64)
    expected = BEGINS[:, None] + numbers.astype(np.int64) @ weights.T
    np.testing.assert_array_equal(added_turned(add_turned_nibbles, turned(group), numbers, 8), expected)


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16])
def test_the_first_few_numbers_of_16_bits_and_zeros_behind_them(count: int) -> None:
    source, target = np.arange(1, 20, dtype=np.uint16), np.full(18, 99, np.uint16)

    @numba.njit
    def kernel(target: int, source: int) -> None:
        copy_first(target, source, count)

    kernel(target.ctypes.data, source.ctypes.data)
    np.testing.assert_array_equal(target, [*range(1, count + 1), *[0] * (16 - count), 99, 99])
