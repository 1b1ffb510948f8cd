"""Products of bytes added to many sums, beside what NumPy computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import Array
from npllama.kernels import simd_bytes, simd_sums
from npllama.kernels.byte_tokens import EXACT, ROUNDED, Places
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(3)
pytestmark = pytest.mark.skipif(not PATHS["avx512"] <= host_features(), reason="this processor has no AVX-512")

TOKENS, ROWS = 4, 2
WEIGHTS = RNG.integers(0, 256, (ROWS, 64)).astype(np.uint8)
FACTORS = RNG.normal(size=(ROWS, TOKENS, 16)).astype(np.float32)  # 64 bytes apart


def added(instruction: Callable[..., Any], places: Places, x: Array) -> Array:
    """Return sums (rows, tokens, 16), begun with nothing."""

    @numba.njit
    def kernel(out: int, places: Any, weights: int, x: int, factors: int) -> None:
        sums = simd_sums.no_sums(8)
        simd_sums.store_sums(out, instruction(sums, 2, places, weights, 64, x, factors, 64))

    found = np.zeros((ROWS, TOKENS, 16), np.float32)
    kernel(found.ctypes.data, places, WEIGHTS.ctypes.data, x.ctypes.data, FACTORS.ctypes.data)
    return found


def fours(products: Array) -> Array:
    """Add up four numbers at a time of the last axis."""
    total: Array = products.reshape(*products.shape[:-1], 16, 4).sum(axis=-1)
    return total


def lines(digits: Array, begins: Array | None) -> Array:
    """Lay digits (tokens, lines, 64) and begins (tokens, 16), if there are any, out as bytes."""
    parts = [digits] if begins is None else [digits, begins.view(np.int8)[:, None]]
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def test_int8_weights_are_taken_128_larger_for_one_digit() -> None:
    digits = RNG.integers(-128, 128, (TOKENS, 1, 64)).astype(np.int8)
    signed = WEIGHTS.view(np.int8).astype(np.int64)
    expected = fours((signed[:, None] + 128) * digits[:, 0].astype(np.int64)) * FACTORS[..., :1]
    np.testing.assert_allclose(added(simd_bytes.inner_bytes, ROUNDED, lines(digits, None)), expected, 1e-6)


def test_three_digits_of_int8_weights_are_one_integer() -> None:
    digits = RNG.integers(-128, 128, (TOKENS, 3, 64)).astype(np.int8)
    high, lower = digits[:, 0].astype(np.int64), digits[:, 1:].view(np.uint8).astype(np.int64)
    integers = 65536 * high + 256 * lower[:, 0] + lower[:, 1]
    begins = (-128 * fours(high)).astype(np.int32)
    products = fours(WEIGHTS.view(np.int8).astype(np.int64)[:, None] * integers)
    found = added(simd_bytes.inner_bytes, EXACT, lines(digits, begins))
    np.testing.assert_allclose(found, products * FACTORS[..., :1].astype(np.float64), 1e-6)


@pytest.mark.parametrize("places", [ROUNDED, EXACT])
def test_halves_of_bytes_meet_two_groups(places: Places) -> None:
    digits = RNG.integers(-128, 128, (TOKENS, 2 * len(places), 64)).astype(np.int8)
    begins = RNG.integers(-1000, 1000, (TOKENS, 16)).astype(np.int32) if len(places) > 1 else None
    low, high = (half.astype(np.int64)[:, None] for half in (WEIGHTS & 15, WEIGHTS >> 4))
    each = digits.reshape(TOKENS, len(places), 2, 64).astype(np.int64)
    products = sum(
        place * fours(low * each[:, digit, 0] + high * each[:, digit, 1]) for digit, place in enumerate(places)
    )
    products += 0 if begins is None else begins
    expected = products * FACTORS[..., :2].repeat(8, axis=-1).astype(np.float64)
    np.testing.assert_allclose(added(simd_bytes.inner_nibbles, places, lines(digits, begins)), expected, 1e-6)
