"""Input and weights laid out as squares, for `npllama.kernels.vector_blocks`.

A **square** is 16 rows of a matrix, or 16 tokens of the input, by 16 words of 32 bits of each, word by word: a line of
64 bytes has the same word of all sixteen. What a word is depends on how the product is computed, its **kind**:

==========  ==================  ===========================================  =====================
kind        a word              what the input is rounded to                 products, a register
==========  ==================  ===========================================  =====================
``FLOATS``  one float32         nothing                                      16
``PAIRS``   two bfloat16        bfloat16                                     32
``BYTES``   four int8           int8, with a step for each group of 64       64
==========  ==================  ===========================================  =====================

Integer weights stay integers, which float32 and bfloat16 hold exactly: int4 less 8, and for BYTES unsigned, int8 as 128
more than it is and int4 as it is stored. Behind the squares of a group of 64 numbers stand two lines with the scales
of its rows and, for int4, their middles, ``minimum + 8 scale``; or three with the steps of its tokens, with what their
sums of bytes begin with, since the weights are taken larger than they are, and with the sums of their numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import DATA, FORMS, MINIMA, ROWS, SCALES, job_of
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import int8_step
from npllama.kernels.simd_quantised import high_nibbles, load_half, load_integers, load_one_byte, low_nibbles
from npllama.kernels.simd_words import bfloat16_of, int8_of, nibble_of, pair_of

#: How products are computed.
FLOATS, PAIRS, BYTES = range(3)

SIDE = 16  # of a square: rows or tokens, and words
LINE = 64  # bytes of a line of a square
SQUARE = SIDE * LINE
#: Lines behind the squares of a group: scales and middles of its rows; steps, beginnings and sums of its tokens.
SCALE, MIDDLE, WEIGHT_LINES = 0, LINE, 2 * LINE
STEP, BEGIN, SUM, INPUT_LINES = 0, LINE, 2 * LINE, 3 * LINE
#: Squares of a chunk.
_CHUNK = 16

_BFLOAT16, _INT8, _INT4, _FLOAT32 = FORMS.values()


class Task(NamedTuple):
    """What is multiplied.

    Attributes
    ----------
    jobs : ndarray of shape (matrices, 6)
        See `npllama.kernels.jobs`.
    blocks, fields : int
        Of all matrices.
    form : int
        Storage type of the weights, in `npllama.kernels.jobs.FORMS`.
    kind : int
        FLOATS, PAIRS or BYTES.
    width, groups : int
        N, and groups of 64 numbers that it takes.
    panels : int
        In a pass.
    """

    jobs: Array
    blocks: int
    fields: int
    form: int
    kind: int
    width: int
    groups: int
    panels: int


@compiled(inline=True)
def squares(kind: int) -> int:
    """Squares that 64 numbers of a row take."""
    return 4 >> kind


@compiled(inline=True)
def chunk_groups(kind: int) -> int:
    """Return how many groups of 64 numbers are 16 squares."""
    return _CHUNK // 4 << kind


@compiled(inline=True)
def are_integers(form: int) -> bool:
    """Tell whether weights are stored as integers."""
    return _INT8 <= form <= _INT4


@compiled(inline=True)
def has_minima(form: int) -> bool:
    """Tell whether groups of weights have minima."""
    return form == _INT4


@compiled()
def input_bytes(kind: int) -> Any:
    """Bytes of a group of a panel."""
    return squares(kind) * SQUARE + INPUT_LINES


@compiled(inline=True)
def weight_bytes(kind: int) -> Any:
    """Bytes of a group of a block."""
    return squares(kind) * SQUARE + WEIGHT_LINES


@compiled(inline=True)
def _offset(form: int) -> int:
    """Return how much larger a stored integer is as an unsigned one than as one around zero."""
    return 8 if form == _INT4 else 128


@compiled(inline=True)
def stored_bytes(form: int) -> int:
    """Bytes of 64 numbers of a row as they are stored, without scales."""
    return 4 * GROUP if form == _FLOAT32 else 2 * GROUP if form == _BFLOAT16 else GROUP if form == _INT8 else GROUP // 2


# --- the input --------------------------------------------------------------------------------------------------


@compiled()
def pack_panel(x: Array, packed: Array, task: Task, panel: int) -> None:
    """Lay out one panel: tokens that are not there are zeros. Chunks come first, then panels, then groups."""
    token, size, per_chunk = SIDE * panel, input_bytes(task.kind), chunk_groups(task.kind)
    group, integers = np.zeros(GROUP, np.float32), np.empty(GROUP, np.int8)
    lying = aligned(4 * SQUARE, packed)
    lying[:] = 0
    for g in range(task.groups):
        chunk = g // per_chunk * per_chunk
        at = size * (task.panels * chunk + panel * min(per_chunk, task.groups - chunk) + g - chunk)
        lines = at + squares(task.kind) * SQUARE
        packed[lines : lines + INPUT_LINES] = 0
        for t in range(max(0, min(SIDE, len(x) - token))):
            _copy(x, (token + t) * task.width + GROUP * g, min(GROUP, task.width - GROUP * g), group)
            line, total = LINE * t, np.float32(0)
            if task.kind == FLOATS:
                for s in range(4):
                    simd.store(lying, s * SQUARE + line, simd.load(group, SIDE * s))
            elif task.kind == PAIRS:
                simd.store(lying, line, simd.to_bfloat16(simd.load(group, 0), simd.load(group, 16)))
                simd.store(lying, SQUARE + line, simd.to_bfloat16(simd.load(group, 32), simd.load(group, 48)))
            else:
                step, whole = int8_step(group, integers), np.int32(0)
                for j in range(GROUP):
                    whole += np.int32(integers[j])
                total = np.float32(whole) * step
                simd.store(lying, line, simd.load(integers, 0))
                simd.store_one(packed, lines + STEP + 4 * t, step)
                simd.store_one(packed, lines + BEGIN + 4 * t, np.int32(-_offset(task.form) * whole))
            if task.form == _INT4:
                if task.kind == FLOATS:
                    total = _sum(simd.load(group, 0), simd.load(group, 16), simd.load(group, 32), simd.load(group, 48))
                elif task.kind == PAIRS:
                    first, second = load_integers(lying, line), load_integers(lying, SQUARE + line)
                    total = _sum(
                        bfloat16_of(first, 0), bfloat16_of(first, 1), bfloat16_of(second, 0), bfloat16_of(second, 1)
                    )
                simd.store_one(packed, lines + SUM + 4 * t, total)
        for s in range(squares(task.kind)):
            simd.transpose(lying, s * SQUARE, LINE, packed, at + s * SQUARE, LINE)


@compiled(inline=True)
def _sum(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Return the sum of all lanes."""
    return simd.add_lanes(simd.add(simd.add(a, b), simd.add(c, d)))


@compiled(inline=True)
def _copy(x: Array, at: int, count: int, group: Array) -> None:
    """Copy up to 64 numbers, and zeros behind them."""
    if count == GROUP:
        for j in range(0, GROUP, SIDE):
            simd.store(group, j, simd.load(x, at + j))
    else:
        numbers = x.reshape(-1)
        for j in range(GROUP):
            group[j] = numbers[at + j] if j < count else np.float32(0)


# --- the weights ------------------------------------------------------------------------------------------------


@compiled()
def lay_out(task: Task, block: int, start: int, stop: int, lying: Array, laid: Array) -> None:
    """Write the groups from ``start`` to ``stop`` of a block's rows as squares, with their scales and minima.

    ``lying`` has room for eight squares. A block of fewer than 16 rows has its last row several times.
    """
    job, row = job_of(task.jobs, block, SIDE)
    turned = lying[4 * SQUARE :]
    size = stored_bytes(task.form)
    for g in range(start, stop):
        out = laid[(g - start) * weight_bytes(task.kind) :]
        _gather(task, job, row, g, size, lying)
        if task.form == _FLOAT32 or (task.form == _BFLOAT16 and task.kind == PAIRS):
            for s in range(size // LINE):
                simd.transpose(lying, s * SQUARE, LINE, out, s * SQUARE, LINE)
            continue
        for s in range((size + LINE - 1) // LINE):
            simd.transpose(lying, s * SQUARE, LINE, turned, s * SQUARE, LINE)
        if task.form == _BFLOAT16:
            for line in range(0, 2 * SQUARE, LINE):
                words = load_integers(turned, line)
                simd.store(out, 2 * line, bfloat16_of(words, 0))
                simd.store(out, 2 * line + LINE, bfloat16_of(words, 1))
            continue
        if task.form == _INT8:
            _spread_int8(turned, task.kind, out)
        else:
            _spread_int4(turned, task.kind, out)
        lines = squares(task.kind) * SQUARE
        for r in range(SIDE):
            place = 2 * (min(row + r, job[ROWS] - 1) * task.groups + g)
            scale = simd.load_one_bfloat16(job[SCALES], place)
            middle = simd.load_one_bfloat16(job[MINIMA], place) + np.float32(_offset(_INT4)) * scale
            simd.store_one(out, lines + SCALE + 4 * r, scale)
            simd.store_one(out, lines + MIDDLE + 4 * r, middle)


@compiled(inline=True)
def _gather(task: Task, job: Array, row: int, group: int, size: int, lying: Array) -> None:
    """Copy a group of sixteen rows, a line of each row to one square, the next line to the next."""
    integers = are_integers(task.form)
    pitch = task.groups * size if integers else task.width * (size // GROUP)
    count = size if integers else min(size, (task.width - GROUP * group) * (size // GROUP))
    for r in range(SIDE):
        here = job[DATA] + min(row + r, job[ROWS] - 1) * pitch + group * size
        if count < LINE and task.form == _INT4:
            simd.store(lying, LINE * r, load_half(here, 0))
        elif count == size:
            for line in range(0, size, LINE):
                simd.store(lying, line * SIDE + LINE * r, simd.load_bytes(here, line))
        else:  # there may be no memory behind the last row
            for i in range(size):
                byte = load_one_byte(here, i) if i < count else np.uint8(0)
                lying[i // LINE * SQUARE + LINE * r + i % LINE] = byte


@compiled(inline=True)
def _spread_int8(turned: Array, kind: int, out: Array) -> None:
    """Write the lines of a square, four integers a word, as lines of words of a kind."""
    for line in range(0, SQUARE, LINE):
        words = load_integers(turned, line)
        if kind == BYTES:
            simd.store(out, line, simd.flip_signs(simd.load_bytes(turned, line)))
            continue
        a, b, c, d = int8_of(words, 0), int8_of(words, 1), int8_of(words, 2), int8_of(words, 3)
        _store_four(out, line, a, b, c, d, kind)


@compiled(inline=True)
def _spread_int4(turned: Array, kind: int, out: Array) -> None:
    """Do the same with half a square, eight integers a word, of which four belong into the second half."""
    for line in range(0, SQUARE // 2, LINE):
        words = load_integers(turned, line)
        if kind == BYTES:
            simd.store(out, line, low_nibbles(simd.load_bytes(turned, line)))
            simd.store(out, SQUARE // 2 + line, high_nibbles(simd.load_bytes(turned, line)))
            continue
        a, b, c, d = nibble_of(words, 0), nibble_of(words, 2), nibble_of(words, 4), nibble_of(words, 6)
        _store_four(out, line, a, b, c, d, kind)
        a, b, c, d = nibble_of(words, 1), nibble_of(words, 3), nibble_of(words, 5), nibble_of(words, 7)
        _store_four(out, SQUARE // 2 + line, a, b, c, d, kind)


@compiled(inline=True)
def _store_four(out: Array, line: int, a: Any, b: Any, c: Any, d: Any, kind: int) -> None:
    """Write the numbers that are bytes of one line as four lines of float32, or two of pairs."""
    if kind == FLOATS:
        simd.store(out, 4 * line, a)
        simd.store(out, 4 * line + LINE, b)
        simd.store(out, 4 * line + 2 * LINE, c)
        simd.store(out, 4 * line + 3 * LINE, d)
    else:
        simd.store(out, 2 * line, pair_of(a, b))
        simd.store(out, 2 * line + LINE, pair_of(c, d))
