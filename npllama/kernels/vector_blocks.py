"""Products of many tokens in vector registers, for any weights.

The work is cut into **squares**: 16 rows of a matrix or 16 tokens of the input, by 16 words of 32 bits of each. A
square of the one meets a square of the other in sixteen vectors of sums, a token each, whose lanes are the rows
(`npllama.kernels.simd_sums`). For that both are laid out word by word: a square is turned. As many sums as registers
hold are added to at a time, see `npllama.kernels.vector_products`.

`npllama.kernels.vector_squares` says what a word is, by the **kind** of the product: one float32, a pair of bfloat16 or
of int16, or four int8. Where what enters are integers, and for pairs of bfloat16, integer weights stay integers. The
sums of a group of 64 are multiplied by what they have in common, and added to those of the groups before. int4, stored
from 0 to 15, is taken around zero::

    y += scale · sum(q · x)                                           BYTES, WORDS: x = step · integer
    y += scale · sum((q - 8) · x) + (minimum + 8 scale) · sum(x)      DIGITS: x = step · (65536 h + 256 m + l)

A **panel** is 16 tokens, a **block** 16 rows, a **chunk** some groups that make up to 16 squares of either. Some blocks
are multiplied at once. Their squares of a chunk stay in the first-level cache, while those of every panel in turn pass
by. A **field** is some such blocks, multiplied by panels chunk by chunk; its squares and sums stay in the second-level
cache. Threads take fields in turn (`npllama.kernels.vector_fields`). While a chunk is multiplied, the next one, be it
the next field's first, is fetched from memory and laid out.

Of two matrices of one shape, one product may be gated by the other before anything is written: blocks of both take
turns in a field then.

A number of the output is one sum in one order, whatever the threads, the other rows and tokens: that of a chunk (of a
group of integers), added to that of those before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.activation import _glu
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS, count_blocks, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.simd_atomic import fetch_add, load_acquire, pause
from npllama.kernels.simd_sums import stream
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_fields import BEGIN, END, FIRST, LAST, SIDE, Task, fields_of, place_of
from npllama.kernels.vector_products import Blocks, add_products, blocks_at_once
from npllama.kernels.vector_squares import (
    LINE,
    SQUARE,
    are_integers,
    chunk_groups,
    has_minima,
    input_bytes,
    lay_out,
    pack_panel,
    row_bytes,
    stored_bytes,
    weight_bytes,
)

_SUMS = SIDE * SIDE  # of a block and a panel
#: Counters: fields and panels that were taken, panels that are laid out.
_FIELDS, _PANELS, _PACKED = range(3)
#: Blocks of a field, and tokens of a pass, at most: the sums take 288 kB.
_FIELD, _TOKENS = 9, 512
_BYTE, _FLOAT = np.empty(0, np.uint8), np.empty(0, np.float32)  # only their dtypes matter


class Chunk(NamedTuple):
    """Some groups, from ``start`` to ``stop``, of a field's blocks, from ``begin`` to ``end``: of none behind the last.

    ``field`` is the field's number, ``first`` and ``last`` say which panels it has.
    """

    field: int
    begin: int
    end: int
    start: int
    stop: int
    first: int
    last: int


def multiply(
    x: Array, weights: Sequence[Tensor], outputs: Sequence[Array], kind: int, activation: int | None = None
) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        All of one storage type: any for FLOATS, any but float32 for PAIRS, int8 or int4 for BYTES and DIGITS. M may
        differ. With narrow registers (`npllama.kernels.llvm.WIDE`) there are no PAIRS and no DIGITS. Without an
        instruction for bytes (`npllama.kernels.llvm.DOTS`) these are for int4 alone, and WORDS for int8.
    outputs : sequence of ndarray of shape (T, M), float32
    kind : int
        FLOATS rounds nothing but sums, and DIGITS nothing more than that does; PAIRS rounds the input to bfloat16, and
        BYTES and WORDS to int8, see `npllama.rounding`.
    activation : int, optional
        There are two weights of one shape, whose products are ``gate`` and ``up``, and one output, which becomes
        ``activation(gate) * up``. Its number in `npllama.kernels.activation`.
    """
    x = np.ascontiguousarray(x)
    n_new, width = x.shape
    passes = -(-n_new // _TOKENS)
    panels = -(-n_new // (passes * SIDE))
    together, outputs = (1, outputs) if activation is None else (2, (*outputs, *outputs))
    jobs, threads = jobs_of(weights, outputs, SIDE), numba.get_num_threads()
    blocks = int(count_blocks(jobs, SIDE))
    at_once = blocks_at_once(kind)
    unit = math.lcm(together, at_once)
    fields = fields_of(-(-blocks // unit), panels, max(1, _FIELD // unit), threads)
    form, groups = FORMS[weights[0].dtype], n_groups(width)
    task = Task(jobs, blocks, fields, form, kind, width, groups, panels, together, at_once, unit, activation or 0)
    packed = aligned(panels * task.groups * input_bytes(kind), _BYTE)
    work = _address_of_work()
    for first in range(0, n_new, panels * SIDE):
        _multiply(task, x, first, packed, np.zeros(3, np.int64), threads, work)


@cache
def _address_of_work() -> int:
    """Return the address of `_take_part`."""
    task = Task(np.empty((1, 6), np.int64), 1, np.empty((1, 4), np.int64), 1, 1, 1, 1, 1, 1, 1, 1, 1)
    return address_of(_take_part, task, np.empty((1, 1), np.float32), 1, aligned(1, _BYTE), np.empty(1, np.int64))


@compiled(parallel=True)
def _multiply(task: Task, x: Array, first: int, packed: Array, counters: Array, n_threads: int, work: int) -> None:
    """Multiply every block by the panels of a pass, the tokens of x from ``first`` on.

    ``work`` is the address of `_take_part`.
    """
    for _ in prange(n_threads):
        call_at(work, (task, x, first, packed, counters))


@compiled()
def _take_part(task: Task, x: Array, first: int, packed: Array, counters: Array) -> None:
    """Lay out panels until there are none left; when all are there, multiply fields until there are none left."""
    panel = fetch_add(counters, _PANELS, 1)
    while panel < task.panels:
        pack_panel(x[first:], packed, task, panel)
        fetch_add(counters, _PACKED, 1)
        panel = fetch_add(counters, _PANELS, 1)
    while load_acquire(counters, _PACKED) < task.panels:  # whoever lays out one is at it
        pause()
    _take_fields(task, packed, len(x) - first, first, counters)


@subroutine(counted=True)
def _take_fields(task: Task, packed: Array, n_new: int, first: int, counters: Array) -> None:
    """Multiply fields until there are none left. A field is taken as soon as its first chunk can be laid out."""
    most = (task.fields[0, END] - task.fields[0, BEGIN]) * task.unit
    chunk_bytes = chunk_groups(task.kind, task.groups) * weight_bytes(task.kind)
    laid, ahead = aligned(most * chunk_bytes, packed), aligned(most * chunk_bytes, packed)
    room, totals = aligned(8 * SQUARE, packed), aligned(_SUMS, _FLOAT)
    sums = aligned(most * task.panels * _SUMS, _FLOAT)
    chunk = _chunk_of(task, fetch_add(counters, _FIELDS, 1), 0)
    for block in range(chunk.begin, chunk.end):
        lay_out(task, block, chunk.start, chunk.stop, room, laid[(block - chunk.begin) * chunk_bytes :])
    while chunk.begin < chunk.end:
        is_last = chunk.stop == task.groups
        if chunk.start == 0:
            sums[: (chunk.end - chunk.begin) * task.panels * _SUMS] = 0
        field, start = (fetch_add(counters, _FIELDS, 1), 0) if is_last else (chunk.field, chunk.stop)
        coming = _chunk_of(task, field, start)
        _multiply_chunk(task, chunk, laid, coming, ahead, room, packed, sums, totals)
        if is_last:
            _deliver(task, chunk, sums, n_new, first)
        chunk, laid, ahead = coming, ahead, laid
    fetch_add(counters, _FIELDS, 0)  # what went past the caches is there for all


@subroutine()
def _chunk_of(task: Task, field: int, start: int) -> Chunk:
    """Return the chunk of a field that begins with the group ``start``."""
    if field >= len(task.fields):
        return Chunk(field, 0, 0, 0, 0, 0, 0)
    begin, end = task.fields[field, BEGIN] * task.unit, task.fields[field, END] * task.unit
    stop = min(start + chunk_groups(task.kind, task.groups), task.groups)
    return Chunk(field, begin, end, start, stop, task.fields[field, FIRST], task.fields[field, LAST])


@subroutine()
def _multiply_chunk(
    task: Task,
    chunk: Chunk,
    laid: Array,
    coming: Chunk,
    ahead: Array,
    room: Array,
    packed: Array,
    sums: Array,
    totals: Array,
) -> None:
    """Add to the sums of some blocks what a chunk of them comes to.

    Meanwhile the rows of the coming chunk are fetched from memory, and laid out ``ahead`` when they are there.
    """
    groups, at_once = chunk.stop - chunk.start, task.at_once
    size, chunk_bytes = input_bytes(task.kind), chunk_groups(task.kind, task.groups) * weight_bytes(task.kind)
    x = np.int64(packed.ctypes.data) + size * task.panels * chunk.start
    weights, tile = np.int64(laid.ctypes.data), np.int64(sums.ctypes.data)
    rows, block, fetched = SIDE * (coming.end - coming.begin), coming.begin, 0
    done, parts = 0, (chunk.end - chunk.begin) // at_once * (chunk.last - chunk.first)
    for i in range(0, chunk.end - chunk.begin, at_once):
        for panel in range(chunk.first, chunk.last):
            while SIDE * (block + 1 - coming.begin) <= fetched:
                lay_out(task, block, coming.start, coming.stop, room, ahead[(block - coming.begin) * chunk_bytes :])
                block += 1
            done += 1
            for row in range(fetched, rows * done // parts):
                _fetch(task, coming, row)
            fetched = rows * done // parts
            place = tile + (i * task.panels + panel) * SQUARE
            here = weights + i * chunk_bytes
            blocks = Blocks(here, chunk_bytes, place, task.panels * SQUARE, np.int64(totals.ctypes.data))
            add_products(blocks, x + size * groups * panel, groups, task.kind, task.form)
    for late in range(block, coming.end):
        lay_out(task, late, coming.start, coming.stop, room, ahead[(late - coming.begin) * chunk_bytes :])


@subroutine()
def _fetch(task: Task, chunk: Chunk, row: int) -> None:
    """Fetch what a chunk has of one row of its blocks: row 0 is the first one of its first block."""
    job, first = place_of(task, chunk.begin + row // SIDE)
    row, size = min(first + row % SIDE, job.rows - 1), stored_bytes(task.form)
    for line in range(0, (chunk.stop - chunk.start) * size, LINE):
        simd.prefetch(job.data + row * row_bytes(task) + chunk.start * size, line)
    group = row * task.groups + chunk.start
    if are_integers(task.form):
        simd.prefetch(job.scales, 2 * group)
    if has_minima(task.form):
        simd.prefetch(job.minima, 2 * group)


@subroutine(counted=True)
def _deliver(task: Task, chunk: Chunk, sums: Array, n_new: int, first: int) -> None:
    """Write the sums of a field, its last chunk's, to the outputs: those of one token after the other.

    Nobody reads them before much else has been written: where they are whole cache lines, they go past the caches. To
    other threads they are there after the next `fetch_add`.
    """
    count = (min(chunk.end, task.blocks) - chunk.begin) // task.together
    places, widths = np.empty((count, 2), np.int64), np.empty(count, np.int64)
    for i in range(count):
        job, row = place_of(task, chunk.begin + i * task.together)
        pitch = 4 * job.rows
        places[i, 0], places[i, 1] = job.output + first * pitch + 4 * row, pitch
        widths[i] = min(SIDE, job.rows - row)
    gated = aligned(count * _SUMS if task.together > 1 else 0, _FLOAT)
    for panel in range(chunk.first, min(chunk.last, (n_new + SIDE - 1) // SIDE)):
        lines, apart = sums[_SUMS * panel :], _SUMS * task.panels
        if task.together > 1:
            for i in range(count):
                gate = (2 * i * task.panels + panel) * _SUMS
                up = gate + task.panels * _SUMS
                _glu(sums[gate : gate + _SUMS], sums[up : up + _SUMS], gated[_SUMS * i :], task.activation)
            lines, apart = gated, _SUMS
        for t in range(min(SIDE, n_new - SIDE * panel)):
            for i in range(count):
                at, output = apart * i + SIDE * t, places[i, 0] + (SIDE * panel + t) * places[i, 1]
                if widths[i] == SIDE and output % LINE == 0:
                    stream(output, simd.load(lines, at))
                elif widths[i] == SIDE:
                    simd.store(output, 0, simd.load(lines, at))
                else:
                    for r in range(widths[i]):
                        simd.store_one(output, 4 * r, lines[at + r])
