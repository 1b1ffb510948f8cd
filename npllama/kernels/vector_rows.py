"""Products of one token, or a few, with float32 and bfloat16 weights in vector registers of 512 bits.

A row of a matrix times a token is one sum, in sixteen parts: the lanes of a vector, which are added up at the end. A
**band** of rows meets all tokens at once (`npllama.kernels.simd_sums`), so that a number which was loaded is multiplied
several times. Sixteen rows are a **block**; several tokens pass by it in **chunks** that stay in the first-level cache,
and between chunks the sums wait in memory. Meanwhile the band that comes next is fetched: the processor by itself looks
no further than a page.

A number of the output is one sum in one order, whatever the threads, the other rows and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor
from npllama.kernels import simd
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import DATA, OUTPUT, ROWS, count_blocks, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.simd_quantised import load_one_byte
from npllama.kernels.simd_sums import inner_floats, store_sums, store_totals, sums_at

#: Tokens at most.
FEW = 8
#: Rows of a matrix that are a unit of work.
BLOCK = 16

_LANES = 16
_LINE = 64
#: Numbers of all tokens in a chunk: 16 kB.
_CHUNK = 4096
#: Tokens that a band meets, and its rows: sixteen sums, or eight.
_ONE, _ROWS_OF_ONE = 1, 8
_FOUR, _ROWS_OF_FOUR = 4, 4
_EIGHT, _ROWS_OF_EIGHT = 8, 2
_SUMS_OF_ONE, _SUMS = 8, 16
_BFLOAT16_BYTES, _FLOAT32_BYTES = 2, 4


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is 8 at most.
    weights : sequence of Tensor of shape (M, N)
        All float32, or all bfloat16. M may differ, and is 16 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    jobs, item = jobs_of(weights, outputs, BLOCK), weights[0].data.itemsize
    _multiply(lined_up(x), len(x), x.shape[1], jobs, item, numba.get_num_threads(), _address_of_work())


@cache
def _address_of_work() -> int:
    """Return the address of `_multiply_blocks`."""
    return address_of(_multiply_blocks, np.empty((1, 1, 1), np.float32), 1, 1, np.empty((1, 6), np.int64), 1, 1, 1)


@compiled()
def tokens_of(n_new: int) -> int:
    """Return with how many tokens rows are multiplied where there are ``n_new``: the others are zeros."""
    return _ONE if n_new == 1 else _FOUR if n_new <= _FOUR else _EIGHT


@compiled()
def lined_up(x: Array) -> Array:
    """Return tokens x (T, N) as `multiply_block` takes them: (steps, tokens, 16), with zeros behind the last."""
    n_new, width = x.shape
    count, steps = tokens_of(n_new), (width + _LANES - 1) // _LANES
    tokens = aligned(steps * count * _LANES, x).reshape(steps, count, _LANES)
    line_up(x, tokens)
    return tokens


@compiled()
def line_up(x: Array, tokens: Array) -> None:
    """Do `lined_up` to room that is there."""
    n_new, width = x.shape
    tokens[:] = 0
    for t in range(n_new):
        for s in range(tokens.shape[0]):
            for j in range(min(_LANES, width - _LANES * s)):
                tokens[s, t, j] = x[t, _LANES * s + j]


@compiled(parallel=True)
def _multiply(tokens: Array, n_new: int, width: int, jobs: Array, item: int, n_threads: int, work: int) -> None:
    """Do what `multiply` does; each thread reads one contiguous part of all matrices, laid end to end.

    ``work`` is the address of `_multiply_blocks`.
    """
    blocks = count_blocks(jobs, BLOCK)
    for thread in prange(n_threads):
        start, stop = blocks * thread // n_threads, blocks * (thread + 1) // n_threads
        call_at(work, (tokens, n_new, width, jobs, item, start, stop))


@compiled()
def _multiply_blocks(tokens: Array, n_new: int, width: int, jobs: Array, item: int, start: int, stop: int) -> None:
    """Multiply the blocks from ``start`` to ``stop``. The last block of a matrix ends where the matrix does."""
    scratch = scratch_for(tokens)
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        row = min(first, job[ROWS] - BLOCK)
        rows, pitch = job[DATA] + item * width * row, item * width
        multiply_block(rows, width, item, tokens, rows + BLOCK * pitch, _ROWS_OF_ONE * pitch, scratch)
        for t in range(n_new):
            for r in range(BLOCK):
                simd.store_one(job[OUTPUT] + 4 * (t * job[ROWS] + row), 4 * r, scratch[r * tokens.shape[1] + t])


@compiled()
def scratch_for(tokens: Array) -> Array:
    """Return the room that `multiply_block` needs: the products, then sums in sixteen parts."""
    return aligned(scratch_size(tokens.shape[1]), tokens)


@compiled()
def scratch_size(count: int) -> int:
    """Return how many numbers that is, for so many tokens."""
    return BLOCK * count * (1 + _LANES)


@compiled()
def multiply_block(
    rows: int, width: int, item: int, tokens: Array, ahead: int, ahead_bytes: int, scratch: Array
) -> None:
    """Fill the beginning of ``scratch`` with the products of sixteen rows and all tokens, row by row.

    Parameters
    ----------
    rows : int
        Address of the first row; they lie one behind the other.
    width : int
        N.
    item : int
        Bytes of a number: 2 for bfloat16, 4 for float32.
    tokens : ndarray of shape (steps, 1 or 4 or 8, 16), float32
        From `lined_up`.
    ahead, ahead_bytes : int
        What is fetched from memory with the last band; with the others, it is the band that comes next.
    scratch : ndarray, float32
        From `scratch_for`.
    """
    count, pitch = tokens.shape[1], item * width
    totals = np.int64(scratch.ctypes.data)
    sums, x = totals + 4 * BLOCK * count, np.int64(tokens.ctypes.data)
    scratch[BLOCK * count : scratch_size(count)] = 0
    whole = width // _LANES
    per_chunk = whole if count == _ONE else _CHUNK // (count * _LANES)
    band = _ROWS_OF_ONE if count == _ONE else _SUMS // count
    spare = np.zeros(_ROWS_OF_ONE * _LANES * item, np.uint8)
    for start in range(0, whole, max(1, per_chunk)):
        stop = min(start + per_chunk, whole)
        for r in range(0, BLOCK, band):
            column, to = rows + r * pitch + start * _LANES * item, sums + r * count * _LINE
            last = r + band == BLOCK
            coming, size = (ahead, ahead_bytes) if last else (rows + (r + band) * pitch, band * pitch)
            begin, end = size * start // whole, size * stop // whole
            _add_band(
                column, pitch, item, x + start * count * _LINE, count, stop - start, coming + begin, end - begin, to
            )
    rest = (width - whole * _LANES) * item
    for r in range(0, BLOCK if rest > 0 else 0, band):  # there may be no memory behind the last row
        for i in range(band * rest):
            line = rows + (r + i // rest) * pitch + whole * _LANES * item
            spare[i // rest * _LANES * item + i % rest] = load_one_byte(line, i % rest)
        at, to = np.int64(spare.ctypes.data), sums + r * count * _LINE
        _add_band(at, _LANES * item, item, x + whole * count * _LINE, count, 1, at, 0, to)
    for r in range(0, BLOCK * count, _SUMS):
        store_totals(totals + 4 * r, sums_at(sums + r * _LINE, _SUMS))
    spare[0] = 0  # Numba frees an array behind its last use, and an address is none


@compiled()
def _add_band(
    rows: int, pitch: int, item: int, x: int, count: int, steps: int, ahead: int, ahead_bytes: int, sums: int
) -> None:
    """Add so many steps of sixteen numbers of a band to its sums; fetch bytes meanwhile."""
    if item == _BFLOAT16_BYTES:
        if count == _ONE:
            _add(_SUMS_OF_ONE, _ROWS_OF_ONE, _BFLOAT16_BYTES, rows, pitch, x, _LINE, steps, ahead, ahead_bytes, sums)
        elif count == _FOUR:
            _add(_SUMS, _ROWS_OF_FOUR, _BFLOAT16_BYTES, rows, pitch, x, 4 * _LINE, steps, ahead, ahead_bytes, sums)
        else:
            _add(_SUMS, _ROWS_OF_EIGHT, _BFLOAT16_BYTES, rows, pitch, x, 8 * _LINE, steps, ahead, ahead_bytes, sums)
    elif count == _ONE:
        _add(_SUMS_OF_ONE, _ROWS_OF_ONE, _FLOAT32_BYTES, rows, pitch, x, _LINE, steps, ahead, ahead_bytes, sums)
    elif count == _FOUR:
        _add(_SUMS, _ROWS_OF_FOUR, _FLOAT32_BYTES, rows, pitch, x, 4 * _LINE, steps, ahead, ahead_bytes, sums)
    else:
        _add(_SUMS, _ROWS_OF_EIGHT, _FLOAT32_BYTES, rows, pitch, x, 8 * _LINE, steps, ahead, ahead_bytes, sums)


@compiled(inline=True)
def _add(
    n_sums: int,
    n_rows: int,
    item: int,
    rows: int,
    pitch: int,
    x: int,
    x_step: int,
    steps: int,
    ahead: int,
    ahead_bytes: int,
    sums: int,
) -> None:
    """Do `_add_band` for literally so many sums, rows, and bytes of a number."""
    tile = sums_at(sums, n_sums)
    size = n_rows * _LANES * item
    for s in range(steps):
        if size * s < ahead_bytes:
            for line in range(0, size, _LINE):
                simd.prefetch(ahead + size * s, line)
        tile = inner_floats(tile, n_rows, item, rows + _LANES * item * s, pitch, x + x_step * s, _LINE)
    store_sums(sums, tile)
