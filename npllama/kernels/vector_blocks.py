"""Products of many tokens in vector registers of 512 bits, for any weights.

The work is cut into **squares**: 16 rows of a matrix or 16 tokens of the input, by 16 words of 32 bits of each. A
square of the one meets a square of the other in sixteen vectors of sums, a token each, whose lanes are the rows
(`npllama.kernels.simd_sums`). For that both are laid out word by word: a square is turned.

`npllama.kernels.vector_squares` says what a word is: one float32, a pair of bfloat16 or four int8, by the **kind** of
the product. Integer weights stay integers. The sums of a group of 64 are multiplied by what they have in common, and
added to those of the groups before. int4, stored from 0 to 15, is taken around zero::

    y += scale · sum(q · x)                                           BYTES: x = step · integer
    y += scale · sum((q - 8) · x) + (minimum + 8 scale) · sum(x)

A **panel** is 16 tokens, a **block** 16 rows, a **chunk** some groups that make 16 squares. The squares of a block and
chunk take 16 kB of the first-level cache, while those of every panel in turn pass by. A **field** is some blocks,
multiplied by all panels chunk by chunk; its squares and sums stay in the second-level cache. Threads take fields in
turn.

A number of the output is one sum in one order, whatever the threads, the other rows and tokens: that of a chunk (of a
group of integers), added to that of those before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import prange

from npllama.dtypes import GROUP, Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import DATA, FORMS, OUTPUT, ROWS, count_blocks, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.simd_atomic import fetch_add
from npllama.kernels.simd_quantised import load_floats
from npllama.kernels.simd_sums import (
    add_outer_to_memory,
    add_scaled_to_memory,
    add_stepped,
    add_to_memory,
    first_sums,
    no_sums,
    outer_bytes,
    outer_floats,
    outer_pairs,
    stream,
)
from npllama.kernels.vector_squares import (
    BEGIN,
    BYTES,
    FLOATS,
    INPUT_LINES,
    LINE,
    MIDDLE,
    SCALE,
    SIDE,
    SQUARE,
    STEP,
    SUM,
    WEIGHT_LINES,
    Task,
    are_integers,
    chunk_groups,
    has_minima,
    input_bytes,
    lay_out,
    pack_panel,
    squares,
    stored_bytes,
    weight_bytes,
)

_HALF = 8  # tokens of half a panel
#: Blocks of a field, and tokens of a pass, at most: the sums take 256 kB.
_FIELD, _TOKENS = 8, 512
_BYTE, _FLOAT = np.empty(0, np.uint8), np.empty(0, np.float32)  # only their dtypes matter


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array], kind: int) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        All of one storage type: any for FLOATS, any but float32 for PAIRS, int8 or int4 for BYTES. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    kind : int
        FLOATS rounds nothing but sums, PAIRS the input to bfloat16, and BYTES to int8; see `npllama.rounding`.
    """
    x = np.ascontiguousarray(x)
    n_new, width = x.shape
    passes = -(-n_new // _TOKENS)
    panels = -(-n_new // (passes * SIDE))
    jobs, threads = jobs_of(weights, outputs, SIDE), numba.get_num_threads()
    blocks = int(count_blocks(jobs, SIDE))
    fields = min(blocks, -(-blocks // (_FIELD * threads)) * threads)
    task = Task(jobs, blocks, fields, FORMS[weights[0].dtype], kind, width, n_groups(width), panels)
    packed = aligned(panels * task.groups * input_bytes(kind), _BYTE)
    work = _address_of_work()
    for first in range(0, n_new, panels * SIDE):
        _pack(x[first:], packed, task)
        _multiply(task, packed, n_new - first, first, np.zeros(1, np.int64), threads, work)


@cache
def _address_of_work() -> int:
    """Return the address of `_take_fields`."""
    task = Task(np.empty((1, 6), np.int64), 1, 1, 1, 1, 1, 1, 1)
    return address_of(_take_fields, task, aligned(1, _BYTE), 1, 1, np.empty(1, np.int64))


@compiled(parallel=True)
def _pack(x: Array, packed: Array, task: Task) -> None:
    """Lay out the panels of a pass: all of one chunk, then all of the next; tokens that are not there are zeros."""
    for panel in prange(task.panels):
        pack_panel(x, packed, task, np.int64(panel))  # a parallel loop counts in uint64


@compiled(parallel=True)
def _multiply(task: Task, packed: Array, n_new: int, first: int, counter: Array, n_threads: int, work: int) -> None:
    """Multiply every block by the packed panels of the tokens from ``first`` on, of which there are ``n_new``.

    ``work`` is the address of `_take_fields`.
    """
    for _ in prange(n_threads):
        call_at(work, (task, packed, n_new, first, counter))


@compiled()
def _take_fields(task: Task, packed: Array, n_new: int, first: int, counter: Array) -> None:
    """Multiply fields until there are none left."""
    most, per_chunk = (task.blocks + task.fields - 1) // task.fields, chunk_groups(task.kind)
    chunk_bytes = per_chunk * weight_bytes(task.kind)
    laid, room = aligned(most * chunk_bytes, packed), aligned(8 * SQUARE, packed)
    sums = aligned(most * task.panels * SIDE * SIDE, _FLOAT)
    field = fetch_add(counter, 0, 1)
    while field < task.fields:
        begin, end = field * task.blocks // task.fields, (field + 1) * task.blocks // task.fields
        sums[:] = 0
        for start in range(0, task.groups, per_chunk):
            stop = min(start + per_chunk, task.groups)
            for block in range(begin, end):
                lay_out(task, block, start, stop, room, laid[(block - begin) * chunk_bytes :])
            _multiply_chunk(task, start, stop, begin, end, laid, chunk_bytes, packed, sums)
        _deliver(task, begin, end, sums, n_new, first)
        field = fetch_add(counter, 0, 1)


@compiled()
def _multiply_chunk(
    task: Task, start: int, stop: int, begin: int, end: int, laid: Array, chunk_bytes: int, packed: Array, sums: Array
) -> None:
    """Add to the sums of some blocks what the groups from ``start`` to ``stop`` come to.

    Meanwhile the next chunk of the blocks is fetched from memory.
    """
    size = input_bytes(task.kind)
    x, tile = np.int64(packed.ctypes.data) + size * task.panels * start, np.int64(sums.ctypes.data)
    for panel in range(task.panels):
        for block in range(begin, end):
            _fetch(task, block, stop, panel)
            weights = np.int64(laid.ctypes.data) + (block - begin) * chunk_bytes
            place = tile + ((block - begin) * task.panels + panel) * SQUARE
            if are_integers(task.form):
                _add_integers(weights, x, stop - start, task.kind, task.form, place)
            else:
                _add_numbers(weights, x, stop - start, task.kind, place)
        x += size * (stop - start)


@compiled()
def _fetch(task: Task, block: int, group: int, panel: int) -> None:
    """Fetch a panel's share of the chunk that begins with a group, of a block's rows."""
    count = min(chunk_groups(task.kind), task.groups - group)
    if count <= 0:
        return
    job, row = job_of(task.jobs, block, SIDE)
    size = stored_bytes(task.form)
    pitch = task.width * (size // GROUP) if size > GROUP else task.groups * size
    at = job[DATA] + row * pitch + group * size
    for r in range(SIDE * panel // task.panels, SIDE * (panel + 1) // task.panels):
        for line in range(0, count * size, LINE):
            simd.prefetch(at + r * pitch, line)


@compiled()
def _add_numbers(weights: int, x: int, groups: int, kind: int, sums: int) -> None:
    """Add some groups' products of a block and a panel to their sums."""
    tile = no_sums(SIDE)
    if kind == FLOATS:
        for _ in range(groups):
            tile = _add_floats(tile, weights, x)
            weights += 4 * SQUARE + WEIGHT_LINES
            x += 4 * SQUARE + INPUT_LINES
    else:
        for _ in range(groups):
            tile = _add_pairs(tile, weights, x)
            weights += 2 * SQUARE + WEIGHT_LINES
            x += 2 * SQUARE + INPUT_LINES
    add_to_memory(sums, tile)


@compiled()
def _add_integers(weights: int, x: int, groups: int, kind: int, form: int, sums: int) -> None:
    """Do the same with integers, group by group."""
    size = squares(kind) * SQUARE
    if kind == BYTES:
        _add_half(weights, x, groups, form, sums)
        _add_half(weights, x + LINE // 2, groups, form, sums + SQUARE // 2)
        return
    for _ in range(groups):
        scales, steps = weights + size, x + size
        if kind == FLOATS:
            add_scaled_to_memory(sums, _add_floats(no_sums(SIDE), weights, x), load_floats(scales, SCALE))
        else:
            add_scaled_to_memory(sums, _add_pairs(no_sums(SIDE), weights, x), load_floats(scales, SCALE))
        if has_minima(form):
            add_outer_to_memory(sums, load_floats(scales, MIDDLE), steps + SUM)
        weights, x = scales + WEIGHT_LINES, steps + INPUT_LINES


@compiled()
def _add_half(weights: int, x: int, groups: int, form: int, sums: int) -> None:
    """Do it for bytes and half of a panel: so its sums of a group and those of the groups before are in registers."""
    totals = no_sums(_HALF)
    for _ in range(groups):
        steps = x + SQUARE
        tile = _add_bytes(first_sums(steps + BEGIN, _HALF), weights, x)
        totals = add_stepped(totals, tile, load_floats(weights, SQUARE + SCALE), steps + STEP)
        if has_minima(form):
            totals = outer_floats(totals, weights + SQUARE + MIDDLE, steps + SUM)
        weights += SQUARE + WEIGHT_LINES
        x += SQUARE + INPUT_LINES
    add_to_memory(sums, totals)


@compiled(inline=True)
def _add_floats(tile: Any, weights: int, x: int) -> Any:
    for at in range(0, 4 * SQUARE, LINE):
        tile = outer_floats(tile, weights + at, x + at)
    return tile


@compiled(inline=True)
def _add_pairs(tile: Any, weights: int, x: int) -> Any:
    for at in range(0, 2 * SQUARE, LINE):
        tile = outer_pairs(tile, weights + at, x + at)
    return tile


@compiled(inline=True)
def _add_bytes(tile: Any, weights: int, x: int) -> Any:
    for at in range(0, SQUARE, LINE):
        tile = outer_bytes(tile, weights + at, x + at)
    return tile


@compiled()
def _deliver(task: Task, begin: int, end: int, sums: Array, n_new: int, first: int) -> None:
    """Write the sums of a field to the outputs, those of one token after the other.

    Nobody reads them before much else has been written: where they are whole cache lines, they go past the caches. To
    other threads they are there after the next `fetch_add`.
    """
    places, counts = np.empty((end - begin, 2), np.int64), np.empty(end - begin, np.int64)
    for block in range(begin, end):
        job, row = job_of(task.jobs, block, SIDE)
        pitch = 4 * job[ROWS]
        places[block - begin, 0], places[block - begin, 1] = job[OUTPUT] + first * pitch + 4 * row, pitch
        counts[block - begin] = min(SIDE, job[ROWS] - row)
    for t in range(min(SIDE * task.panels, n_new)):
        for block in range(end - begin):
            at = SIDE * ((block * task.panels + t // SIDE) * SIDE + t % SIDE)
            output = places[block, 0] + t * places[block, 1]
            if counts[block] == SIDE and output % LINE == 0:
                stream(output, simd.load(sums, at))
            elif counts[block] == SIDE:
                simd.store(output, 0, simd.load(sums, at))
            else:
                for i in range(counts[block]):
                    simd.store_one(output, 4 * i, sums[at + i])
