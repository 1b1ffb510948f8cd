"""Products of bytes added to many sums, beside what NumPy computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import Array
from npllama.kernels import simd_bytes, simd_sums
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.llvm import WIDE

RNG = np.random.default_rng(3)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

needs_wide = pytest.mark.skipif(not WIDE, reason="registers are narrow")
needs_narrow = pytest.mark.skipif(WIDE, reason="registers are wide")

TOKENS, ROWS = 4, 2
WEIGHTS = RNG.integers(0, 256, (ROWS, 64)).astype(np.uint8)
FACTORS = RNG.normal(size=(ROWS, TOKENS, 16)).astype(np.float32)  # 64 bytes apart


def added(instruction: Callable[..., Any], x: Array) -> Array:
    """Return sums (rows, tokens, 16), begun with nothing."""

    @numba.njit
    def kernel(out: int, weights: int, x: int, factors: int) -> None:
        sums = simd_sums.no_sums(8)
        simd_sums.store_sums(out, instruction(sums, 2, weights, 64, x, factors, 64))

    found = np.zeros((ROWS, TOKENS, 16), np.float32)
    kernel(found.ctypes.data, WEIGHTS.ctypes.data, x.ctypes.data, FACTORS.ctypes.data)
    return found


def fours(products: Array) -> Array:
    """Add up four numbers at a time of the last axis."""
    total: Array = products.reshape(*products.shape[:-1], 16, 4).sum(axis=-1)
    return total


def lines(digits: Array, begins: Array) -> Array:
    """Lay digits (tokens, lines, 64) and begins (tokens, 16) out as bytes."""
    return np.ascontiguousarray(np.concatenate([digits, begins.view(np.int8)[:, None]], axis=1))


@needs_wide
def test_three_digits_of_int8_weights_are_one_integer() -> None:
    digits = RNG.integers(-128, 128, (TOKENS, 3, 64)).astype(np.int8)
    high, lower = digits[:, 0].astype(np.int64), digits[:, 1:].view(np.uint8).astype(np.int64)
    integers = 65536 * high + 256 * lower[:, 0] + lower[:, 1]
    begins = (-128 * fours(high)).astype(np.int32)
    products = fours(WEIGHTS.view(np.int8).astype(np.int64)[:, None] * integers)
    found = added(simd_bytes.inner_bytes, lines(digits, begins))
    np.testing.assert_allclose(found, products * FACTORS[..., :1].astype(np.float64), 1e-6)


@needs_wide
def test_halves_of_bytes_meet_two_groups() -> None:
    digits = RNG.integers(-128, 128, (TOKENS, 6, 64)).astype(np.int8)
    begins = RNG.integers(-1000, 1000, (TOKENS, 16)).astype(np.int32)
    low, high = (half.astype(np.int64)[:, None] for half in (WEIGHTS & 15, WEIGHTS >> 4))
    each = digits.reshape(TOKENS, 3, 2, 64).astype(np.int64)
    products = begins + sum(
        place * fours(low * each[:, digit, 0] + high * each[:, digit, 1]) for digit, place in enumerate((65536, 256, 1))
    )
    expected = products * FACTORS[..., :2].repeat(8, axis=-1).astype(np.float64)
    np.testing.assert_allclose(added(simd_bytes.inner_nibbles, lines(digits, begins)), expected, 1e-6)


@needs_narrow
def test_int8_weights_meet_float32() -> None:
    x = RNG.normal(size=(TOKENS, 64)).astype(np.float32)
    products = (WEIGHTS.view(np.int8)[:, None] * x.astype(np.float64)).reshape(ROWS, TOKENS, 4, 16).sum(axis=2)
    expected = products * FACTORS[:, :1, :1].astype(np.float64)
    np.testing.assert_allclose(added(simd_bytes.inner_bytes, x), expected, 1e-5, 1e-4)


@needs_narrow
def test_words_of_int4_meet_float32_of_two_groups() -> None:
    x, begins = (RNG.normal(size=(TOKENS, n, 16)).astype(np.float32) for n in (8, 1))
    nibbles = WEIGHTS.view(np.uint32)[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None] & 15  # (rows, 8, 16)
    products = begins[:, 0] + (nibbles[:, None] * x.astype(np.float64)).sum(axis=2)
    places = np.float32(16) ** -np.array([0, 1, 2, 3, 4, 5, 6, 0], np.float32)[:, None]
    expected = products * FACTORS[:, :1, :2].repeat(8, axis=-1).astype(np.float64)
    laid = np.ascontiguousarray(np.concatenate([x * places, begins], axis=1))
    np.testing.assert_allclose(added(simd_bytes.inner_nibbles, laid), expected, 1e-5, 1e-4)
