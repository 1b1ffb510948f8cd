"""Several matrices that meet one input, as blocks of rows laid end to end: what a parallel loop deals out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor
from npllama.kernels.by_address import call_at
from npllama.kernels.jit import compiled
from npllama.kernels.memory import address
from npllama.kernels.simd_atomic import APART, fetch_add
from npllama.kernels.subroutines import subroutine

#: Storage type -> its number in compiled functions.
FORMS = {"bfloat16": 0, "int8": 1, "int4": 2, "float32": 3}
#: Columns of a table of jobs, a line for each matrix: addresses of the stored numbers, of scales and minima (or of the
#: numbers again) and of the output; M, and the number of the first block.
_DATA, _SCALES, _MINIMA, _OUTPUT, ROWS, FIRST = range(6)
#: Helpings of a thread's part, at most; blocks of one, at least: ten microseconds' work, to ask takes less than one.
_HELPINGS, _LEAST = 32, 16


class Job(NamedTuple):
    """A line of a table of jobs: addresses of a matrix and of its output, and M."""

    data: int
    scales: int
    minima: int
    output: int
    rows: int


def jobs_of(weights: Sequence[Tensor], outputs: Sequence[Array], size: int) -> Array:
    """Return the table of jobs of matrices (M, N) with outputs (T, M), in blocks of ``size`` rows."""
    jobs, blocks = np.empty((len(weights), 6), np.int64), 0
    for job, weight, output in zip(jobs, weights, outputs, strict=True):
        parts = (weight.data if part is None else part for part in (weight.data, weight.scales, weight.minima))
        job[:] = *(address(part) for part in parts), address(output), len(weight.data), blocks
        blocks += -(-len(weight.data) // size)
    return jobs


@compiled()
def count_blocks(jobs: Array, size: int) -> Any:
    """Return how many blocks there are."""
    return jobs[-1, FIRST] + (jobs[-1, ROWS] + size - 1) // size


@subroutine(inline=True)
def job_at(jobs: Array, line: int) -> Job:
    """Return a line of a table of jobs."""
    return Job(jobs[line, _DATA], jobs[line, _SCALES], jobs[line, _MINIMA], jobs[line, _OUTPUT], jobs[line, ROWS])


@subroutine(inline=True)
def job_of(jobs: Array, block: int, size: int) -> Any:
    """Return the job of a block's matrix, and the block's first row there."""
    line = 0
    while line + 1 < len(jobs) and jobs[line + 1, FIRST] <= block:
        line += 1
    return job_at(jobs, line), size * (block - jobs[line, FIRST])


@compiled(parallel=True)
def deal_out(arguments: Any, jobs: Array, size: int, n_threads: int, work: int) -> None:
    """Call ``work(arguments, jobs, start, stop)``, an address, for all blocks.

    Each thread reads one contiguous part of all matrices, laid end to end, helping by helping; then it takes what is
    left of the others' parts. So a thread that other programs slow down, or a slower core, keeps nobody waiting.
    """
    blocks, taken = count_blocks(jobs, size), _nothing_taken(n_threads)
    for thread in prange(n_threads):
        for i in range(n_threads):
            _take_part(arguments, jobs, blocks, (thread + i) % n_threads, n_threads, taken, work)


@subroutine(counted=True)
def _nothing_taken(n_parts: int) -> Array:
    """Return a counter for each part; not written in `deal_out` itself, whose threads would share filling them."""
    return np.zeros(APART * n_parts, np.int64)


@subroutine()
def _take_part(arguments: Any, jobs: Array, blocks: int, part: int, n_threads: int, taken: Array, work: int) -> None:
    """Do helpings of a part until there are none left; a number for each part counts the blocks that are taken."""
    begin, end = blocks * part // n_threads, blocks * (part + 1) // n_threads
    helping = max(_LEAST, (end - begin) // _HELPINGS)
    start = begin + fetch_add(taken, APART * part, helping)
    while start < end:
        call_at(work, (arguments, jobs, start, min(start + helping, end)))
        start = begin + fetch_add(taken, APART * part, helping)
