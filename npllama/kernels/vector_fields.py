"""How the work of `npllama.kernels.vector_blocks` is cut: threads that take piece after piece shall end together.

A **unit** is the blocks of rows that are multiplied at once, or twice as many where two matrices take turns; a
**field** some units by all panels. The larger a field, the more often what was read for it is used; but who finds
nothing left to be taken waits for those who are at the last ones. So fields become smaller towards the end, and the
last units are cut by panels as well.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.jobs import job_at, job_of
from npllama.kernels.subroutines import subroutine

SIDE = 16  #: Rows of a block, tokens of a panel.
#: Columns of a table of fields: first unit, and the one behind the last; the same of panels.
BEGIN, END, FIRST, LAST = range(4)
#: Parts of the panels that the last units are cut into, at most; panels of a part, at least: each lays out its weights.
_PARTS, _LEAST = 4, 8


class Task(NamedTuple):
    """What is multiplied.

    Attributes
    ----------
    jobs : ndarray of shape (matrices, 6)
        See `npllama.kernels.jobs`.
    blocks : int
        Of all matrices.
    fields : ndarray of shape (fields, 4)
        See `fields_of`.
    form : int
        Storage type of the weights, in `npllama.kernels.jobs.FORMS`.
    kind : int
        FLOATS, PAIRS, WORDS, BYTES or DIGITS.
    width, groups : int
        N, and groups of 64 numbers that it takes.
    panels : int
        In a pass.
    together : int
        2 where blocks take turns between two matrices of one shape, of whose products one gates the other; or 1.
    at_once, unit : int
        Blocks that are multiplied at once, and those of a unit, which may be more where matrices take turns. The last
        unit may want for some.
    activation : int
        Its number in `npllama.kernels.activation`, where there is a gate.
    """

    jobs: Array
    blocks: int
    fields: Array
    form: int
    kind: int
    width: int
    groups: int
    panels: int
    together: int
    at_once: int
    unit: int
    activation: int


@cache
def fields_of(units: int, panels: int, most: int, threads: int) -> Array:
    """Return the table of fields, in the order in which they are taken.

    Parameters
    ----------
    units, panels : int
        That there are.
    most : int
        Units of a field, at most.
    threads : int
        That take fields. A field is half of a thread's share of what is left by then.

    Returns
    -------
    ndarray of shape (fields, 4), int64
        The first field has most units.
    """
    fields, begin = [], 0
    while begin < units:
        left = units - begin
        size = min(most, max(1, left // (2 * threads)))
        parts = max(1, min(panels // _LEAST, _PARTS)) if threads > 1 and left <= threads else 1
        for part in range(parts):
            fields.append((begin, begin + size, panels * part // parts, panels * (part + 1) // parts))
        begin += size
    return np.array(fields, np.int64)


@subroutine(inline=True)
def place_of(task: Task, block: int) -> Any:
    """Return the job of a block's matrix, and the block's first row there; for one behind the last, the last one's."""
    block = min(block, task.blocks - 1)
    if task.together == 1:
        return job_of(task.jobs, block, SIDE)
    return job_at(task.jobs, block % 2), SIDE * (block // 2)
