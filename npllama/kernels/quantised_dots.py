"""Products with int8 and int4 weights by dot products of bytes: for one token, or a few.

See `npllama.kernels.quantised_rows` for how a row is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
from numba import prange

from npllama.dtypes import GROUP, PACKINGS, Array, Tensor
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import DATA, MINIMA, OUTPUT, ROWS, SCALES, count_blocks, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.quantised_rows import Rows, multiply_rows, rows_at, take_apart, token_at, token_bytes

#: Tokens up to which this is faster than laying weights out for many.
FEW = 12
#: Rows of a matrix that a thread takes at a time.
BLOCK = 16


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, for several weights of one dtype that share N.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        int8 or int4.
    outputs : sequence of ndarray of shape (T, M), float32

    Notes
    -----
    A number of the output is one sum in one order, whatever the threads and the other tokens.
    """
    is_int4 = PACKINGS[weights[0].dtype].has_minima
    multiply_in_parts(x, jobs_of(weights, outputs, BLOCK), is_int4, numba.get_num_threads(), _address_of_work())


@cache
def _address_of_work() -> int:
    """Return the address of `_multiply_blocks`."""
    return address_of(_multiply_blocks, np.empty((1, 1), np.float32), np.empty((1, 6), np.int64), True, 1, 1)


@compiled(parallel=True)
def multiply_in_parts(x: Array, jobs: Array, is_int4: bool, n_threads: int, work: int) -> None:
    """Multiply all blocks; each thread reads one contiguous part of all matrices, laid end to end.

    ``work`` is the address of what multiplies some blocks: `_multiply_blocks`, or the like.
    """
    blocks = count_blocks(jobs, BLOCK)
    for thread in prange(n_threads):
        start, stop = blocks * thread // n_threads, blocks * (thread + 1) // n_threads
        call_at(work, (x, jobs, is_int4, start, stop))


@compiled()
def _multiply_blocks(x: Array, jobs: Array, is_int4: bool, start: int, stop: int) -> None:
    """Multiply the blocks from ``start`` to ``stop`` by all tokens."""
    groups = (x.shape[1] + GROUP - 1) // GROUP
    size = token_bytes(groups, is_int4)
    room = aligned(x.shape[0] * size, np.empty(0, np.int8))
    for t in range(x.shape[0]):
        take_apart(x[t], is_int4, room[t * size : (t + 1) * size])
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        rows = rows_at(Rows(job[DATA], job[SCALES], job[MINIMA]), first, groups, is_int4)
        m, output = job[ROWS], job[OUTPUT] + 4 * first
        ahead = rows_at(rows, BLOCK, groups, is_int4)
        for t in range(x.shape[0]):
            token = token_at(room.ctypes.data + t * size, groups, is_int4)
            multiply_rows(rows, min(BLOCK, m - first), groups, is_int4, token, ahead, output + 4 * t * m)
            ahead = rows  # once is enough
    room[0] = 0  # Numba frees an array behind its last use, and an address is none
