"""The limits of the machine: the right work is counted, whatever the clock says."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest

from npllama.dtypes import Tensor
from npllama.kernels import probe


def clock(seconds: float) -> Callable[[], float]:
    """Return a clock on which everything takes so long."""
    times = iter([10.0, 10.0 + seconds])
    return lambda: next(times)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_number_is_read_once(parts: int) -> None:
    numbers = np.arange(996, dtype=np.float32)
    sums = np.empty(parts, np.float32)
    probe._stream(numbers, sums)
    assert sums.tolist() == numbers.reshape(parts, -1).sum(axis=1).tolist()


def test_the_chains_multiply_and_add_as_often_as_they_are_counted() -> None:
    sums = np.empty(2, np.float32)
    probe._multiply_add(np.float32(0.5), np.float32(1), 3, sums)
    expected = sum(16 * (((first * 0.5 + 1) * 0.5 + 1) * 0.5 + 1) for first in range(8))
    assert sums.tolist() == [expected, expected]


def test_rates_are_work_by_time() -> None:
    assert probe.read_rate(np.zeros(1000, np.float32), clock(0.5)) == 8000
    threads = numba.get_num_threads()
    assert probe.multiply_add_rate(clock(0.25)) == 4 * threads * (1 << 20) * 2 * 8 * 16
    weight = Tensor(np.ones((5, 6), np.float32), "float32")
    assert probe.product_rate(np.ones((4, 6), np.float32), weight, clock(2.0)) == 4 * 5 * 6
