"""Columns of bytes and their products, beside what NumPy computes."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.kernels.features import PATHS, host_features
from npllama.kernels.simd_columns import add_bytes, add_nibbles
from npllama.kernels.simd_sums import first_sums, store_sums

RNG = np.random.default_rng(4)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

TOKENS = 4
ROWS = RNG.integers(0, 256, (16, 100)).astype(np.uint8)  # 100 bytes apart
NUMBERS = RNG.integers(-128, 128, (TOKENS, 64)).astype(np.int8)
BEGINS = RNG.integers(-(1 << 20), 1 << 20, TOKENS).astype(np.int32)


def added(instruction: object, at: int) -> np.ndarray:
    """Return the sums (tokens, 16) of what begins at a byte of each row."""

    @numba.njit
    def kernel(out: int, begins: int, rows: int, x: int) -> None:
        store_sums(out, instruction(first_sums(begins, TOKENS), rows, 100, x))

    found = np.zeros((TOKENS, 16), np.int32)
    kernel(found.ctypes.data, BEGINS.ctypes.data, ROWS.ctypes.data + at, NUMBERS.ctypes.data)
    return found


def test_a_lane_is_the_exact_product_of_a_row_of_int8_and_a_token() -> None:
    weights = ROWS[:, 7:71].view(np.int8).astype(np.int64) + 128
    np.testing.assert_array_equal(added(add_bytes, 7), BEGINS[:, None] + NUMBERS.astype(np.int64) @ weights.T)


def test_low_halves_of_bytes_are_the_first_numbers_of_a_group_and_high_ones_the_last() -> None:
    group = ROWS[:, 11:43].astype(np.int64)
    weights = np.hstack([group & 15, group >> 4])
    np.testing.assert_array_equal(added(add_nibbles, 11), BEGINS[:, None] + NUMBERS.astype(np.int64) @ weights.T)
