"""Products of many tokens in vector registers, for any weights.

The work is cut into **squares**: 16 rows of a matrix or 16 tokens of the input, by 16 words of 32 bits of each. A
square of the one meets a square of the other in sixteen vectors of sums, a token each, whose lanes are the rows
(`npllama.kernels.simd_sums`). For that both are laid out word by word: a square is turned. As many sums as registers
hold are added to at a time: those of some tokens, of two squares of rows where registers are wide. A processor adds two
products in the time that it takes to load two words, and so each word of a token must be used twice.

`npllama.kernels.vector_squares` says what a word is, by the **kind** of the product: one float32, a pair of bfloat16 or
of int16, or four int8. Where what enters are integers, and for pairs of bfloat16, integer weights stay integers. The
sums of a group of 64 are multiplied by what they have in common, and added to those of the groups before. int4, stored
from 0 to 15, is taken around zero::

    y += scale · sum(q · x)                                           BYTES, WORDS: x = step · integer
    y += scale · sum((q - 8) · x) + (minimum + 8 scale) · sum(x)      DIGITS: x = step · (65536 h + 256 m + l)

A **panel** is 16 tokens, a **block** 16 rows, a **chunk** some groups that make up to 16 squares of either. The squares
of a block and chunk stay in the first-level cache, while those of every panel in turn pass by. A **field** is some
blocks, multiplied by all panels chunk by chunk; its squares and sums stay in the second-level cache. Threads take
fields in turn. While a chunk is multiplied, the next one, be it the next field's first, is fetched from memory and laid
out.

Of two matrices of one shape, one product may be gated by the other before anything is written: blocks of both take
turns in a field then.

A number of the output is one sum in one order, whatever the threads, the other rows and tokens: that of a chunk (of a
group of integers), added to that of those before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.activation import _glu
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS, count_blocks, jobs_of
from npllama.kernels.llvm import DOTS, WIDE
from npllama.kernels.memory import aligned
from npllama.kernels.simd_atomic import fetch_add, load_acquire, pause
from npllama.kernels.simd_blocks import (
    add_digits,
    add_outer_to_memory,
    add_scaled_to_memory,
    add_stepped,
    add_to_memory,
    at_next_place,
    outer_bytes,
    outer_floats,
    outer_nibbles,
    outer_pairs,
    outer_words,
    repeated,
    vectors_at,
)
from npllama.kernels.simd_sums import first_sums, no_sums, store_sums, stream, sums_at
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_squares import (
    BEGIN,
    BLOCKS,
    BYTES,
    DIGITS,
    FLOATS,
    INPUT_LINES,
    LINE,
    MIDDLE,
    PAIRS,
    SCALE,
    SIDE,
    SQUARE,
    STEP,
    SUM,
    WEIGHT_LINES,
    WORDS,
    Task,
    are_integers,
    chunk_groups,
    has_minima,
    input_bytes,
    lay_out,
    pack_panel,
    place_of,
    row_bytes,
    squares,
    stored_bytes,
    weight_bytes,
)

#: Tokens of a panel whose sums are in registers at a time, and how many sums these are: where there are some of one
#: kind. Tokens where there are sums of three kinds.
_MOST, _TILE, _FEWER = (8, 16, 4) if WIDE else (4, 4, 4)
_SUMS = SIDE * SIDE  # of a block and a panel
#: Counters: fields and panels that were taken, panels that are laid out.
_FIELDS, _PANELS, _PACKED = range(3)
#: Blocks of a field, and tokens of a pass, at most: the sums take 256 kB.
_FIELD, _TOKENS = 8, 512
_BYTE, _FLOAT = np.empty(0, np.uint8), np.empty(0, np.float32)  # only their dtypes matter


class Chunk(NamedTuple):
    """Some groups, from ``start`` to ``stop``, of a field's blocks, from ``begin`` to ``end``: of none behind the last.

    ``field`` is the field's number.
    """

    field: int
    begin: int
    end: int
    start: int
    stop: int


class Blocks(NamedTuple):
    """Where the weights of some blocks are, the first one's, and its sums; how far the next one's are from these.

    ``totals`` is where there is room for the sums of a panel.
    """

    weights: int
    pitch: int
    sums: int
    sums_pitch: int
    totals: int


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
    fields = min(-(-blocks // max(together, BLOCKS)), -(-blocks // (_FIELD * threads)) * threads)
    form, groups = FORMS[weights[0].dtype], n_groups(width)
    task = Task(jobs, blocks, fields, form, kind, width, groups, panels, together, activation or 0)
    packed = aligned(panels * task.groups * input_bytes(kind), _BYTE)
    work = _address_of_work()
    for first in range(0, n_new, panels * SIDE):
        _multiply(task, x, first, packed, np.zeros(3, np.int64), threads, work)


@cache
def _address_of_work() -> int:
    """Return the address of `_take_part`."""
    task = Task(np.empty((1, 6), np.int64), 1, 1, 1, 1, 1, 1, 1, 1, 1)
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
    unit = max(task.together, BLOCKS)
    most = (_units(task) + task.fields - 1) // task.fields * unit
    chunk_bytes = chunk_groups(task.kind) * weight_bytes(task.kind)
    laid, ahead = aligned(most * chunk_bytes, packed), aligned(most * chunk_bytes, packed)
    room, totals = aligned(8 * SQUARE, packed), aligned(BLOCKS * _SUMS, _FLOAT)
    sums = aligned(most * task.panels * _SUMS, _FLOAT)
    chunk = _chunk_of(task, fetch_add(counters, _FIELDS, 1), 0)
    for block in range(chunk.begin, chunk.end):
        lay_out(task, block, chunk.start, chunk.stop, room, laid[(block - chunk.begin) * chunk_bytes :])
    while chunk.begin < chunk.end:
        is_last = chunk.stop == task.groups
        if chunk.start == 0:
            sums[:] = 0
        field, start = (fetch_add(counters, _FIELDS, 1), 0) if is_last else (chunk.field, chunk.stop)
        coming = _chunk_of(task, field, start)
        _multiply_chunk(task, chunk, laid, coming, ahead, room, packed, sums, totals)
        if is_last:
            _deliver(task, chunk, sums, n_new, first)
        chunk, laid, ahead = coming, ahead, laid
    fetch_add(counters, _FIELDS, 0)  # what went past the caches is there for all


@subroutine(inline=True)
def _units(task: Task) -> int:
    """Return how many times there are as many blocks as are multiplied together, or fewer at the end."""
    unit = max(task.together, BLOCKS)
    return (task.blocks + unit - 1) // unit


@subroutine()
def _chunk_of(task: Task, field: int, start: int) -> Chunk:
    """Return the chunk of a field that begins with the group ``start``."""
    unit, units, field = max(task.together, BLOCKS), _units(task), min(field, task.fields)
    begin, end = field * units // task.fields, min(field + 1, task.fields) * units // task.fields
    stop = min(start + chunk_groups(task.kind), task.groups)
    return Chunk(field, begin * unit, min(end * unit, task.blocks), start, stop)


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
    size, chunk_bytes = input_bytes(task.kind), chunk_groups(task.kind) * weight_bytes(task.kind)
    x, tile = np.int64(packed.ctypes.data) + size * task.panels * chunk.start, np.int64(sums.ctypes.data)
    rows, count, block, fetched = SIDE * (coming.end - coming.begin), chunk.end - chunk.begin, coming.begin, 0
    for panel in range(task.panels):
        while SIDE * (block + 1 - coming.begin) <= fetched:
            lay_out(task, block, coming.start, coming.stop, room, ahead[(block - coming.begin) * chunk_bytes :])
            block += 1
        for i in range(0, count, BLOCKS):
            until = rows * (panel * count + min(i + BLOCKS, count)) // (task.panels * count)
            for row in range(fetched, until):
                _fetch(task, coming, row)
            weights, place = np.int64(laid.ctypes.data) + i * chunk_bytes, tile + (i * task.panels + panel) * SQUARE
            # a last one without another is its own, whose sums nobody reads
            pitch = chunk_bytes if i + BLOCKS <= count else 0
            blocks = Blocks(weights, pitch, place, task.panels * SQUARE, np.int64(totals.ctypes.data))
            if are_integers(task.form) and task.kind != FLOATS:
                _add_integers(blocks, x, chunk.stop - chunk.start, task.kind, task.form)
            else:
                _add_numbers(blocks, x, chunk.stop - chunk.start, task.kind)
            fetched = until
        x += size * (chunk.stop - chunk.start)
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


@subroutine()
def _add_numbers(blocks: Blocks, x: int, groups: int, kind: int) -> None:
    """Add some groups' products of blocks and a panel to their sums, those of so many tokens at a time."""
    for t in range(0, SIDE, _MOST):
        if WIDE and kind == PAIRS:
            _add_groups(PAIRS, blocks, x + 4 * t, groups, LINE * t)
        else:
            _add_groups(FLOATS, blocks, x + 4 * t, groups, LINE * t)


@subroutine(pasted=True)
def _add_groups(kind: int, blocks: Blocks, x: int, groups: int, place: int) -> None:
    """Do it for some tokens, whose sums begin at a place, and a literal kind."""
    tile, weights = repeated(no_sums(_MOST), BLOCKS), blocks.weights
    for _ in range(groups):
        tile = _add_words(kind, tile, weights, blocks.pitch, x)
        weights += weight_bytes(kind)
        x += input_bytes(kind)
    add_to_memory(blocks.sums + place, blocks.sums_pitch, _MOST, tile)


@subroutine()
def _add_integers(blocks: Blocks, x: int, groups: int, kind: int, form: int) -> None:
    """Do the same with integers, group by group."""
    if WIDE and kind == PAIRS:
        for t in range(0, SIDE, _MOST):
            _add_scaled(blocks, x + 4 * t, groups, form, LINE * t)
    elif WIDE and kind == DIGITS:
        for t in range(0, SIDE, _FEWER):
            _add_digits(blocks, x + 4 * t, groups, form, LINE * t)
    elif not DOTS and kind == WORDS:
        _add_stepped(WORDS, blocks, x, groups, form)
    else:
        _add_stepped(BYTES, blocks, x, groups, form)


@subroutine(pasted=True)
def _add_scaled(blocks: Blocks, x: int, groups: int, form: int, place: int) -> None:
    """Do it for pairs, whose sums of a group are all that registers hold."""
    weights, pitch, sums = blocks.weights, blocks.pitch, blocks.sums + place
    for _ in range(groups):
        tile = _add_words(PAIRS, repeated(no_sums(_MOST), BLOCKS), weights, pitch, x)
        scales, steps = weights + 2 * SQUARE, x + 2 * SQUARE
        add_scaled_to_memory(sums, blocks.sums_pitch, tile, vectors_at(scales + SCALE, pitch, BLOCKS))
        if has_minima(form):
            middles = vectors_at(scales + MIDDLE, pitch, BLOCKS)
            add_outer_to_memory(sums, blocks.sums_pitch, _MOST, middles, steps + SUM)
        weights, x = scales + WEIGHT_LINES, steps + INPUT_LINES


@subroutine(pasted=True)
def _add_stepped(kind: int, blocks: Blocks, x: int, groups: int, form: int) -> None:
    """Do it for what is rounded to int8: the kind is a literal, WORDS or BYTES.

    The sums of a group are all that registers hold, those of all groups are added up in the first-level cache.
    """
    weights, pitch, size = blocks.weights, blocks.pitch, squares(kind) * SQUARE
    for t in range(0, SIDE, _MOST):
        store_sums(blocks.totals + BLOCKS * LINE * t, no_sums(_TILE))
    for _ in range(groups):
        factors = weights + size
        for t in range(0, SIDE, _MOST):
            steps, place = x + 4 * t + size, blocks.totals + BLOCKS * LINE * t
            tile = _add_words(kind, _begin(_MOST, steps + BEGIN), weights, pitch, x + 4 * t)
            scales = vectors_at(factors + SCALE, pitch, BLOCKS)
            totals = add_stepped(sums_at(place, _TILE), tile, scales, steps + STEP)
            if has_minima(form):
                totals = outer_floats(totals, vectors_at(factors + MIDDLE, pitch, BLOCKS), steps + SUM)
            store_sums(place, totals)
        weights += weight_bytes(kind)
        x += input_bytes(kind)
    for t in range(0, SIDE, _MOST):
        totals = sums_at(blocks.totals + BLOCKS * LINE * t, _TILE)
        add_to_memory(blocks.sums + LINE * t, blocks.sums_pitch, _MOST, totals)


@subroutine()
def _add_digits(blocks: Blocks, x: int, groups: int, form: int, place: int) -> None:
    """Do it for three digits: the two lower ones have a sum in common, which 32 bits hold."""
    totals, weights, pitch = repeated(no_sums(_FEWER), BLOCKS), blocks.weights, blocks.pitch
    for _ in range(groups):
        steps, factors = x + 3 * SQUARE, weights + SQUARE
        lower = _add_words(BYTES, _begin(_FEWER, steps + BEGIN + LINE), weights, pitch, x + SQUARE)
        lower = at_next_place(lower, _begin(_FEWER, steps + BEGIN + 2 * LINE))
        lower = _add_words(BYTES, lower, weights, pitch, x + 2 * SQUARE)
        high = _add_words(BYTES, _begin(_FEWER, steps + BEGIN), weights, pitch, x)
        totals = add_digits(totals, high, lower, vectors_at(factors + SCALE, pitch, BLOCKS), steps + STEP)
        if has_minima(form):
            totals = outer_floats(totals, vectors_at(factors + MIDDLE, pitch, BLOCKS), steps + SUM)
        weights = factors + WEIGHT_LINES
        x += input_bytes(DIGITS)
    add_to_memory(blocks.sums + place, blocks.sums_pitch, _FEWER, totals)


@subroutine(inline=True)
def _begin(count: int, numbers: int) -> Any:
    """Return what sums of literally so many tokens begin with, for each block: numbers at an address."""
    return repeated(first_sums(numbers, count), BLOCKS)


@subroutine(pasted=True)
def _add_words(kind: int, tile: Any, weights: int, pitch: int, x: int) -> Any:
    """Add the products of a group's squares to sums, for a literal kind."""
    if kind == FLOATS:
        for at in range(0, 4 * SQUARE, LINE):
            tile = outer_floats(tile, vectors_at(weights + at, pitch, BLOCKS), x + at)
    elif kind == PAIRS:
        for at in range(0, 2 * SQUARE, LINE):
            tile = outer_pairs(tile, vectors_at(weights + at, pitch, BLOCKS), x + at)
    elif kind == WORDS:
        for at in range(0, 2 * SQUARE, LINE):
            tile = outer_words(tile, vectors_at(weights + at, pitch, BLOCKS), x + at)
    elif not DOTS:  # BYTES are int4 alone
        for at in range(0, SQUARE, SQUARE // 2):
            tile = outer_nibbles(tile, weights + at, x + at)
    else:
        for at in range(0, SQUARE, LINE):
            tile = outer_bytes(tile, vectors_at(weights + at, pitch, BLOCKS), x + at)
    return tile


@subroutine(counted=True)
def _deliver(task: Task, chunk: Chunk, sums: Array, n_new: int, first: int) -> None:
    """Write the sums of a field, its last chunk's, to the outputs: those of one token after the other.

    Nobody reads them before much else has been written: where they are whole cache lines, they go past the caches. To
    other threads they are there after the next `fetch_add`.
    """
    count = (chunk.end - chunk.begin) // task.together
    places, widths = np.empty((count, 2), np.int64), np.empty(count, np.int64)
    for i in range(count):
        job, row = place_of(task, chunk.begin + i * task.together)
        pitch = 4 * job.rows
        places[i, 0], places[i, 1] = job.output + first * pitch + 4 * row, pitch
        widths[i] = min(SIDE, job.rows - row)
    gated = aligned(count * _SUMS if task.together > 1 else 0, _FLOAT)
    for panel in range((min(SIDE * task.panels, n_new) + SIDE - 1) // SIDE):
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
