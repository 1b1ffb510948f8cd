"""The compiled fits choose what the textbook chooses, to the last bit: a checkpoint has one conversion."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest

from npllama.checkpoint import fits as textbook
from npllama.checkpoint.quantize import quantize
from npllama.dtypes import LARGEST, PACKINGS, Array
from npllama.kernels import fits
from tests.fixtures.references import left_by

RNG = np.random.default_rng(0)


def gaussian(shape: tuple[int, int]) -> Array:
    return (RNG.standard_normal(shape) * 0.02).astype(np.float32)


def of_all_sizes(shape: tuple[int, int]) -> Array:
    """Rows from the smallest numbers that there are to the largest that a scale can hold."""
    sizes = np.linspace(-149, 126, shape[0])[:, None]
    return (np.exp2(sizes) * RNG.uniform(-1, 1, shape)).astype(np.float32)


def with_outliers(shape: tuple[int, int]) -> Array:
    return RNG.standard_t(1.5, shape).astype(np.float32)


def with_equal_numbers(shape: tuple[int, int]) -> Array:
    """Groups of zeros, of one number, of few: many fits are equally good, and the first is to be kept."""
    return np.float32(0.5) * RNG.integers(-1, 2, shape).astype(np.float32) * (np.arange(shape[0]) % 3)[:, None]


def with_what_is_no_number(shape: tuple[int, int]) -> Array:
    x = gaussian(shape)
    for bad in (np.nan, np.inf, -np.inf, 2 * LARGEST, -np.nan):
        x.flat[RNG.integers(0, x.size)] = bad
    return x


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize("numbers", [gaussian, of_all_sizes, with_outliers, with_equal_numbers, with_what_is_no_number])
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (63, 65), (130, 200), (257, 128)])
@pytest.mark.parametrize("matters", ["alike", "unlike"])
def test_choice_is_the_textbooks(
    dtype: str, numbers: Callable[[tuple[int, int]], Array], shape: tuple[int, int], matters: str
) -> None:
    x = numbers(shape).astype(np.float32)
    importance = None if matters == "alike" else RNG.random(shape[1]) ** 8
    for name, part, same in zip(
        ("data", "scales", "minima"),
        quantize(x, dtype, importance, fits=fits),
        quantize(x, dtype, importance, fits=textbook),
        strict=False,
    ):
        assert part.dtype == same.dtype
        np.testing.assert_array_equal(part, same, err_msg=name)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("dtype", PACKINGS)
def test_threads_do_not_change_a_byte(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = with_outliers((150, 1100)), []
    for count in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(count)
        found.append(quantize(x, dtype))
    monkeypatch.setattr(fits, "_share", in_reverse)
    for part, *same in zip(*found, quantize(x, dtype), strict=True):
        for other in same:
            np.testing.assert_array_equal(part, other)


def in_reverse(x: Array, work: Callable[[int, int], None]) -> None:
    """Do every tile by itself, the last one first."""
    for tile in reversed(range(-(-len(x) // fits._ROWS) * x.shape[1])):
        work(tile, tile + 1)


def test_rows_of_a_copy_that_may_not_be_written_are_taken_as_well() -> None:
    x = gaussian((4, 128))
    x.flags.writeable = False
    np.testing.assert_array_equal(quantize(x, "int8")[0], quantize(x.copy(), "int8")[0])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_choice_leaves_no_array_in_memory(dtype: str) -> None:
    numbers = np.random.default_rng(4).normal(size=(96, 256)).astype(np.float32)
    assert left_by(lambda: quantize(numbers, dtype)) == 0
