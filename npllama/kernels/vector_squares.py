"""Input and weights laid out as squares, for `npllama.kernels.vector_blocks`.

A **square** is 16 rows of a matrix, or 16 tokens of the input, by 16 words of 32 bits of each, word by word: a line of
64 bytes has the same word of all sixteen. What a word is depends on how the product is computed, its **kind**:

==========  ==================  ===========================================  =====================
kind        a word              what the input is rounded to                 products, a register
==========  ==================  ===========================================  =====================
``FLOATS``  one float32         nothing                                      16
``PAIRS``   two bfloat16        bfloat16                                     32
``BYTES``   four int8           int8, with a step for each group of 64       64
``WORDS``   two int16           int8, with a step for each group of 64       32
``DIGITS``  four int8           three digits of int8, with a step each       64 of one digit
==========  ==================  ===========================================  =====================

Three digits are as exact as float32 arithmetic, see `npllama.kernels.digits`; of them the input has three squares where
the weights have one. For ``FLOATS`` integer weights become the numbers that they stand for. Otherwise they stay
integers, which bfloat16 holds exactly: int4 less 8, and for bytes unsigned, int8 as 128 more than it is and int4 as it
is stored. Behind the squares of a group of 64 numbers stand two lines with the scales of its rows and, for int4, their
middles, ``minimum + 8 scale``; or some with the steps of its tokens, with the sums of their numbers, and with what
their sums of bytes begin with, since the weights are taken larger than they are: a line for each digit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.digits import digit_lanes
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS
from npllama.kernels.llvm import DOTS, NARROW, WIDE
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import int8_lanes
from npllama.kernels.simd_blocks import NOTHING
from npllama.kernels.simd_columns import columns_at, copy_first
from npllama.kernels.simd_quantised import (
    high_nibbles,
    load_floats,
    load_half,
    load_integers,
    load_one_byte,
    low_nibbles,
)
from npllama.kernels.simd_words import bfloat16_of, even_bytes, int8_of, nibble_of, odd_bytes, pair_of
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_fields import SIDE, Task, place_of

#: How products are computed.
FLOATS, PAIRS, WORDS, BYTES, DIGITS = range(5)
#: The kind of int8 weights whose input is rounded to int8.
INT8_KIND = BYTES if DOTS else WORDS

LINE = 64  # bytes of a line of a square
SQUARE = SIDE * LINE
#: Lines behind the squares of a group: scales and middles of its rows; steps, sums and beginnings of its tokens.
SCALE, MIDDLE, WEIGHT_LINES = 0, LINE, 2 * LINE
STEP, SUM, BEGIN, INPUT_LINES = 0, LINE, 2 * LINE, 3 * LINE
#: By kind: squares that 64 numbers of a row take, and of a token; lines behind the latter; groups of a chunk.
_SQUARES, _INPUT_SQUARES = (4, 2, 2, 1, 1), (4, 2, 2, 1, 3)
_INPUT_LINES = (INPUT_LINES, INPUT_LINES, INPUT_LINES, INPUT_LINES, INPUT_LINES + 2 * LINE)
_GROUPS = (4, 8, 8, 8 if WIDE else 16, 4)

_BFLOAT16, _INT8, _INT4, _FLOAT32 = FORMS.values()


@subroutine(inline=True)
def squares(kind: int) -> int:
    """Squares that 64 numbers of a row take."""
    return _SQUARES[kind]


@subroutine(inline=True)
def chunk_groups(kind: int, groups: int) -> int:
    """Return how many of so many groups of 64 numbers are a chunk: all, if there is but one more than there may be."""
    return groups if groups <= _GROUPS[kind] + 1 else _GROUPS[kind]


@subroutine(inline=True)
def are_integers(form: int) -> bool:
    """Tell whether weights are stored as integers."""
    return _INT8 <= form <= _INT4


@subroutine(inline=True)
def has_minima(form: int) -> bool:
    """Tell whether groups of weights have minima."""
    return form == _INT4


@compiled()
def input_bytes(kind: int) -> Any:
    """Bytes of a group of a panel."""
    return _INPUT_SQUARES[kind] * SQUARE + _INPUT_LINES[kind]


@subroutine(inline=True)
def weight_bytes(kind: int) -> Any:
    """Bytes of a group of a block."""
    return squares(kind) * SQUARE + WEIGHT_LINES


@subroutine(inline=True)
def excess(form: int) -> int:
    """Return how much larger a stored integer is as an unsigned one than as one around zero."""
    return 8 if form == _INT4 else 128


@subroutine(inline=True)
def stored_bytes(form: int) -> int:
    """Bytes of 64 numbers of a row as they are stored, without scales."""
    return 4 * GROUP if form == _FLOAT32 else 2 * GROUP if form == _BFLOAT16 else GROUP if form == _INT8 else GROUP // 2


# --- the input --------------------------------------------------------------------------------------------------


@subroutine(counted=True)
def pack_panel(x: Array, packed: Array, task: Task, panel: int) -> None:
    """Lay out one panel: tokens that are not there are zeros.

    All panels of one chunk come first, then all of the next.
    """
    per_chunk = chunk_groups(task.kind, task.groups)
    lying = aligned(per_chunk * _INPUT_SQUARES[task.kind] * SQUARE, packed)
    group = np.zeros(GROUP, np.float32)
    lying[:] = 0
    for start in range(0, task.groups, per_chunk):
        count = min(per_chunk, task.groups - start)
        at = input_bytes(task.kind) * (task.panels * start + panel * count)
        _pack_chunk(x, task, panel, start, count, lying, group, packed[at:])


@subroutine()
def _pack_chunk(
    x: Array, task: Task, panel: int, start: int, count: int, lying: Array, group: Array, packed: Array
) -> None:
    """Lay out so many groups of a panel.

    A token's numbers are read as far as the chunk goes, as they lie, and those of the next token are fetched; then
    those of all tokens are turned together.
    ``lying`` holds nothing but zeros where no token is, and ``group`` has room for 64 numbers.
    """
    numbers, rows, out = np.int64(x.ctypes.data), np.int64(lying.ctypes.data), np.int64(packed.ctypes.data)
    size, side = input_bytes(task.kind), _INPUT_SQUARES[task.kind] * SQUARE
    n_there = max(0, min(SIDE, len(x) - SIDE * panel))
    for t in range(n_there):
        for g in range(count):
            first, n_left = (SIDE * panel + t) * task.width + GROUP * (start + g), task.width - GROUP * (start + g)
            here = numbers + 4 * first
            for line in range(0, 4 * GROUP, LINE):
                simd.prefetch(here + 4 * task.width, line)
            if n_left < GROUP:
                _copy(x, first, n_left, group)
                here = np.int64(group.ctypes.data)
            _pack_group(here, task, rows + g * side + LINE * t, out + g * size + side + 4 * t)
    for g in range(count):
        to = out + g * size
        for square in range(0, side, SQUARE):
            simd.transpose(rows + g * side, square, LINE, to, square, LINE)
        for place in range(side, size, LINE):
            for t in range(n_there, SIDE):
                simd.store_one(to, place + 4 * t, np.float32(0))


@subroutine(inline=True)
def _pack_group(numbers: int, task: Task, line: int, behind: int) -> None:
    """Write a token's group, 64 numbers at an address, as a line of each square, and what stands behind the squares."""
    total = np.float32(0)
    if task.kind == BYTES:
        step, whole = int8_lanes(numbers, line)
        simd.store_one(behind, STEP, step)
        simd.store_one(behind, BEGIN, np.int32(NOTHING - excess(task.form) * whole))
        total = np.float32(whole) * step
    elif not DOTS and task.kind == WORDS:
        step, whole = int8_lanes(numbers, line)
        words = load_integers(line, 0)
        simd.store(line, 0, even_bytes(words))
        simd.store(line, SQUARE, odd_bytes(words))
        simd.store_one(behind, STEP, step)
        simd.store_one(behind, BEGIN, np.int32(NOTHING))
        total = np.float32(whole) * step
    elif WIDE and task.kind == DIGITS:
        step, high, middle, low = digit_lanes(numbers, line, SQUARE)
        simd.store_one(behind, STEP, step)
        simd.store_one(behind, BEGIN, np.int32(NOTHING - excess(task.form) * high))
        simd.store_one(behind, BEGIN + LINE, np.int32(-excess(task.form) * middle))
        simd.store_one(behind, BEGIN + 2 * LINE, np.int32(-excess(task.form) * low))
        total = np.float32(65536 * high + 256 * middle + low) * step
    else:
        a, b, c, d = (
            load_floats(numbers, 0),
            load_floats(numbers, LINE),
            load_floats(numbers, 2 * LINE),
            load_floats(numbers, 3 * LINE),
        )
        if task.kind == FLOATS:
            simd.store(line, 0, a), simd.store(line, SQUARE, b)
            simd.store(line, 2 * SQUARE, c), simd.store(line, 3 * SQUARE, d)
        else:
            simd.store(line, 0, simd.to_bfloat16(a, b))
            simd.store(line, SQUARE, simd.to_bfloat16(c, d))
            first, second = load_integers(line, 0), load_integers(line, SQUARE)
            a, b, c, d = bfloat16_of(first, 0), bfloat16_of(first, 1), bfloat16_of(second, 0), bfloat16_of(second, 1)
        if has_minima(task.form):
            total = simd.add_lanes(simd.add(simd.add(a, b), simd.add(c, d)))
    simd.store_one(behind, SUM, total)


@subroutine()
def _copy(x: Array, at: int, count: int, group: Array) -> None:
    """Copy fewer than 64 numbers, and zeros behind them."""
    numbers = x.reshape(-1)
    for j in range(GROUP):
        group[j] = numbers[at + j] if j < count else np.float32(0)


# --- the weights ------------------------------------------------------------------------------------------------


@subroutine()
def lay_out(task: Task, block: int, start: int, stop: int, room: Array, laid: Array) -> None:
    """Write the groups from ``start`` to ``stop`` of a block's rows as squares, with their scales and minima.

    ``room`` is that of eight squares. A block of fewer than 16 rows has its last row several times.
    """
    job, row = place_of(task, block)
    lying, out = np.int64(room.ctypes.data), np.int64(laid.ctypes.data)
    turned, size = lying + 4 * SQUARE, weight_bytes(task.kind)
    at_once, stored, pitch = 2 if task.form == _INT4 else 1, stored_bytes(task.form), row_bytes(task)
    are_words = task.form == _FLOAT32 or (task.form == _BFLOAT16 and task.kind == PAIRS)
    are_bytes = task.form == _INT8 and task.kind >= BYTES
    if are_integers(task.form):
        behind, first = out + squares(task.kind) * SQUARE, 2 * row * task.groups
        scales, minima = job.scales + first, job.minima + first
        lay_factors(scales, minima, job.rows - row, task.groups, start, stop - start, task.form, lying, behind, size)
    for g in range(start, stop, at_once):
        rows, apart = job.data + row * pitch + g * stored, pitch
        if row + SIDE > job.rows or (g + at_once) * stored > pitch:
            rows, apart = lying, np.int64(4 * LINE)
            _gather(task, job.data, row, job.rows, g * stored, at_once * stored, lying)
        for s in range(at_once * stored // LINE):
            if are_words:
                simd.transpose(rows, LINE * s, apart, out, s * SQUARE, LINE)
            elif are_bytes:
                simd.transpose_flipped(rows, LINE * s, apart, out, s * SQUARE, LINE)
            else:
                simd.transpose(rows, LINE * s, apart, turned, s * SQUARE, LINE)
        if task.form == _INT4:
            _spread_int4(turned, task.kind, out)
            if g + 1 < stop:
                _spread_int4(turned + SQUARE // 2, task.kind, out + size)
        elif task.form == _INT8 and not are_bytes:
            _spread_int8(turned, task.kind, out)
        elif task.form == _BFLOAT16 and not are_words:
            _spread_pairs(turned, out)
        out += at_once * size


@subroutine(inline=True)
def row_bytes(task: Task) -> int:
    """Bytes of a row as it is stored, without scales."""
    size = stored_bytes(task.form)
    return task.groups * size if are_integers(task.form) else task.width * (size // GROUP)


@subroutine()
def _gather(task: Task, data: int, row: int, n_rows: int, at: int, size: int, lying: int) -> None:
    """Copy ``size`` bytes of sixteen rows, four lines apart, from their byte ``at`` on; zeros behind a row's end."""
    pitch = row_bytes(task)
    count = min(size, pitch - at)
    for r in range(SIDE):
        here, there = data + min(row + r, n_rows - 1) * pitch + at, lying + 4 * LINE * r
        for line in range(0, size, LINE):
            if line + LINE <= count:
                simd.store(there, line, simd.load_bytes(here, line))
            elif line + LINE // 2 == count:
                simd.store(there, line, load_half(here, line))
            else:  # there may be no memory behind the last row
                for i in range(line, line + LINE):
                    simd.store_one(there, i, load_one_byte(here, i) if i < count else np.uint8(0))


@subroutine()
def lay_factors(
    scales: int,
    minima: int,
    n_rows: int,
    groups: int,
    start: int,
    count: int,
    form: int,
    room: int,
    out: int,
    step: int,
) -> None:
    """Write a line of scales, and for int4 one of middles, of sixteen rows for each of up to sixteen groups.

    Scales and minima are addresses of bfloat16, those of ``groups`` groups of the first of ``n_rows`` rows, the last of
    which may count several times. ``room`` is that of a square. What is written begins at ``out``, and is ``step``
    bytes from what comes next.
    """
    pitch = np.int64(2 * groups)
    scales, minima = scales + 2 * start, minima + 2 * start
    is_copied = n_rows < SIDE or groups < 8
    if is_copied:
        for r in range(SIDE):
            place = min(r, n_rows - 1) * pitch
            copy_first(room + LINE * r, scales + place, count)
            if has_minima(form):
                copy_first(room + LINE * r + LINE // 2, minima + place, count)
        scales, minima, pitch = room, room + LINE // 2, np.int64(LINE)
    for first in range(0, count, 8):
        g = first if is_copied else min(first, groups - 8 - start)  # there may be no memory behind a row
        a, b, c, d = columns_at(scales + 2 * g, pitch)
        e, f, h, i = columns_at(minima + 2 * g, pitch) if has_minima(form) else (a, b, c, d)
        _lay_two(a, e, form, out, step, g, count)
        _lay_two(b, f, form, out, step, g + 2, count)
        _lay_two(c, h, form, out, step, g + 4, count)
        _lay_two(d, i, form, out, step, g + 6, count)


@subroutine(inline=True)
def _lay_two(scales: Any, minima: Any, form: int, out: int, step: int, group: int, count: int) -> None:
    """Write the lines of two groups, of which words of sixteen rows hold both, unless they are none of so many."""
    if 0 <= group < count:
        _lay_one(bfloat16_of(scales, 0), bfloat16_of(minima, 0), form, out + step * group)
    if 0 <= group + 1 < count:
        _lay_one(bfloat16_of(scales, 1), bfloat16_of(minima, 1), form, out + step * (group + 1))


@subroutine(inline=True)
def _lay_one(scale: Any, minimum: Any, form: int, out: int) -> None:
    simd.store(out, SCALE, scale)
    if has_minima(form):
        eight = simd.broadcast(np.float32(excess(_INT4)))
        simd.store(out, MIDDLE, simd.fused_multiply_add(eight, scale, minimum))


@subroutine(inline=True)
def _spread_pairs(turned: int, out: int) -> None:
    """Write the lines of two squares, two bfloat16 a word, as lines of float32."""
    for line in range(0, 2 * SQUARE, LINE):
        words = load_integers(turned, line)
        simd.store(out, 2 * line, bfloat16_of(words, 0))
        simd.store(out, 2 * line + LINE, bfloat16_of(words, 1))


@subroutine(inline=True)
def _spread_int8(turned: int, kind: int, out: int) -> None:
    """Write the lines of a square, four integers a word, as lines of words of a kind."""
    scale = load_floats(out, squares(kind) * SQUARE + SCALE)
    for line in range(0, SQUARE, LINE):
        words = load_integers(turned, line)
        if not DOTS and kind == WORDS:
            simd.store(out, line, even_bytes(words))
            simd.store(out, SQUARE + line, odd_bytes(words))
            continue
        a, b, c, d = int8_of(words, 0), int8_of(words, 1), int8_of(words, 2), int8_of(words, 3)
        if kind == PAIRS:
            simd.store(out, 2 * line, pair_of(a, b))
            simd.store(out, 2 * line + LINE, pair_of(c, d))
        elif NARROW:
            simd.store(out, 4 * line, simd.multiply(a, scale))
            simd.store(out, 4 * line + LINE, simd.multiply(b, scale))
            simd.store(out, 4 * line + 2 * LINE, simd.multiply(c, scale))
            simd.store(out, 4 * line + 3 * LINE, simd.multiply(d, scale))


@subroutine(inline=True)
def _spread_int4(turned: int, kind: int, out: int) -> None:
    """Do the same with half a square, eight integers a word, of which four belong into the second half."""
    behind = out + squares(kind) * SQUARE
    scale, middle = load_floats(behind, SCALE), load_floats(behind, MIDDLE)
    for line in range(0, SQUARE // 2, LINE):
        if kind >= BYTES:
            simd.store(out, line, low_nibbles(simd.load_bytes(turned, line)))
            simd.store(out, SQUARE // 2 + line, high_nibbles(simd.load_bytes(turned, line)))
            continue
        words = load_integers(turned, line)
        a, b, c, d = nibble_of(words, 0), nibble_of(words, 2), nibble_of(words, 4), nibble_of(words, 6)
        e, f, g, h = nibble_of(words, 1), nibble_of(words, 3), nibble_of(words, 5), nibble_of(words, 7)
        if kind == PAIRS:
            simd.store(out, 2 * line, pair_of(a, b))
            simd.store(out, 2 * line + LINE, pair_of(c, d))
            simd.store(out, SQUARE + 2 * line, pair_of(e, f))
            simd.store(out, SQUARE + 2 * line + LINE, pair_of(g, h))
        elif NARROW:
            simd.store(out, 4 * line, simd.fused_multiply_add(a, scale, middle))
            simd.store(out, 4 * line + LINE, simd.fused_multiply_add(b, scale, middle))
            simd.store(out, 4 * line + 2 * LINE, simd.fused_multiply_add(c, scale, middle))
            simd.store(out, 4 * line + 3 * LINE, simd.fused_multiply_add(d, scale, middle))
            simd.store(out, 2 * SQUARE + 4 * line, simd.fused_multiply_add(e, scale, middle))
            simd.store(out, 2 * SQUARE + 4 * line + LINE, simd.fused_multiply_add(f, scale, middle))
            simd.store(out, 2 * SQUARE + 4 * line + 2 * LINE, simd.fused_multiply_add(g, scale, middle))
            simd.store(out, 2 * SQUARE + 4 * line + 3 * LINE, simd.fused_multiply_add(h, scale, middle))
