"""How products of many tokens are cut for threads: all is done, nothing twice, and the last pieces are small."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from npllama.kernels.vector_fields import BEGIN, END, FIRST, LAST, fields_of

NUMBERS = list(itertools.product([1, 2, 3, 12, 43, 171], [1, 3, 32], [1, 3, 9], [1, 2, 5, 64]))


@pytest.mark.parametrize(("units", "panels", "most", "threads"), NUMBERS)
def test_every_unit_meets_every_panel_once(units: int, panels: int, most: int, threads: int) -> None:
    met = np.zeros((units, panels), int)
    for field in fields_of(units, panels, most, threads):
        met[field[BEGIN] : field[END], field[FIRST] : field[LAST]] += 1
    np.testing.assert_array_equal(met, 1)


@pytest.mark.parametrize(("units", "panels", "most", "threads"), NUMBERS)
def test_no_field_is_larger_than_the_first_nor_empty(units: int, panels: int, most: int, threads: int) -> None:
    fields = fields_of(units, panels, most, threads)
    sizes = fields[:, END] - fields[:, BEGIN]
    assert sizes.max() == sizes[0] <= most
    assert sizes.min() > 0
    assert (fields[:, LAST] > fields[:, FIRST]).all()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_whoever_takes_fields_ends_with_the_others(threads: int) -> None:
    """Of equally fast threads, each taking a field as soon as it is free, none waits for more than a small field."""
    units, panels = 43, 32
    busy = [0] * threads
    for field in fields_of(units, panels, 3, threads):
        busy[np.argmin(busy)] += int((field[END] - field[BEGIN]) * (field[LAST] - field[FIRST]))
    assert max(busy) - min(busy) <= panels // 4


def test_a_single_thread_cuts_no_panels() -> None:
    fields = fields_of(43, 32, 3, 1)
    assert (fields[:, LAST] - fields[:, FIRST] == 32).all()
