"""Numbers taken apart into three digits of a byte, beside what they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.dtypes import GROUP, Array
from npllama.kernels.digits import digit_lanes, integers_of
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.jit import compiled

RNG = np.random.default_rng(11)
PLACES = np.array([[65536], [256], [1]])
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")


@compiled()
def _take(numbers: Array, lines: Array, found: Array) -> None:
    found[0], found[1], found[2], found[3] = digit_lanes(numbers.ctypes.data, lines.ctypes.data, 128)


def taken(numbers: Array) -> tuple[Array, float, Array]:
    """Return the digits (3, 64) of 64 numbers, their step, and the sum of each digit."""
    lines, found = np.full((3, 128), 99, np.int8), np.zeros(4)
    _take(numbers.astype(np.float32), lines, found)
    assert (lines[:, GROUP:] == 99).all()
    return lines[:, :GROUP], found[0], found[1:]


@pytest.mark.parametrize("size", [1e-29, 1e-3, 1, 1e30])
def test_digits_stand_for_the_numbers_to_half_a_step(size: float) -> None:
    for _ in range(50):
        numbers = (RNG.normal(size=GROUP) * RNG.choice([1, 1e-2, 1e-4], GROUP) * size).astype(np.float32)
        digits, step, sums = taken(numbers)
        exact = numbers.astype(np.float64)
        np.testing.assert_allclose(step, np.abs(exact).max() / (127 * 65536), rtol=1e-7)
        error = np.abs((digits * PLACES).sum(0) * step - exact)
        assert (error <= 0.5 * step + 2**-22 * np.abs(exact)).all()  # scale and product are rounded, too
        np.testing.assert_array_equal(sums, digits.astype(int).sum(1))


def test_the_largest_numbers_have_digits() -> None:
    for sign in (1, -1):
        digits, step, _ = taken(np.full(GROUP, sign * 3.5))
        np.testing.assert_array_equal(digits, np.broadcast_to(np.array([[127], [0], [0]]) * sign, (3, GROUP)))
        assert step == np.float32(3.5) / np.float32(127 * 65536)


@pytest.mark.parametrize(("value", "step"), [(np.nan, np.nan), (np.inf, np.nan), (-np.inf, np.nan), (1e-31, 0)])
def test_a_group_that_is_not_finite_or_next_to_nothing_has_no_digits(value: float, step: float) -> None:
    numbers = RNG.normal(size=GROUP) * 1e-32
    numbers[5] = value
    digits, found, sums = taken(numbers)
    assert not digits.any()
    assert not sums.any()
    np.testing.assert_equal(found, step)


def test_the_plain_loops_make_the_same_integers() -> None:
    for size in (1e-20, 1, 1e20):
        numbers, integers = (RNG.normal(size=GROUP) * size).astype(np.float32), np.zeros(GROUP, np.int32)
        step, total = integers_of(numbers, integers)
        digits, found, _ = taken(numbers)
        assert np.abs((digits * PLACES).sum(0) - integers).max() <= 2  # scales may be rounded otherwise
        assert total == integers.sum()
        np.testing.assert_allclose(found, step, rtol=1e-6)
