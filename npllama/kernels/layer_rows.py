"""What a unit of rows multiplies: a part of a matrix, whatever it is stored as, times what enters the matrix.

The matrices of a layer may be stored differently from one another. What enters them is prepared for each storage type
that asks for it. There are three ways to multiply, of which a model on a processor uses one or two:

===========  ==========  =======================================================
``tiles``    bfloat16    in the matrix unit, see `npllama.kernels.tiles`
``vectors``  bfloat16    in vector registers, see `npllama.kernels.vector_rows`
``bytes``    int8, int4  by digits, see `npllama.kernels.byte_rows`
===========  ==========  =======================================================

The ways are a tuple: for tiles and vectors an array if they are used (only that it is one matters), else None; behind
them the places of digits, one or three, or none. What is not used is not compiled: Numba leaves a branch out whose
condition asks whether an argument of the function is None, or how long a tuple it is. So each way becomes an argument.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import byte_rows, simd, vector_rows
from npllama.kernels.byte_rows import Rows, rows_at
from npllama.kernels.byte_tokens import EXACT, take_apart, tokens_bytes
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import round_bits
from npllama.kernels.tiles import _BLOCK, _PARTS, _SQUARE, _STEP, _deliver, _multiply_block, _pack_panel, _split

_BFLOAT16, _INT8, _INT4, _ = FORMS.values()
#: Columns of a table of layers: for each of its seven matrices the address of the data, those of scales and minima (or
#: that of the data again), and the number of the storage type.
_DATA, _SCALES, _MINIMA, _FORM = range(0, 28, 7)

#: Rows of a matrix that are a unit.
ROWS = _BLOCK


class Part(NamedTuple):
    """Rows of a matrix, as many as a unit has: their storage type, their width N (0: there are none), and where."""

    form: int
    width: int
    rows: Rows


class Inputs(NamedTuple):
    """A thread's own: what rows are multiplied by, for each way.

    Attributes
    ----------
    panel : ndarray, uint16
        Tiles.
    lines : ndarray, float32
        Vectors.
    tokens : ndarray of shape (2, bytes), int8
        Digits, for int8 and int4.
    scratch : ndarray, float32
        Room for four tiles, or the sums of a block in vectors.
    rounded : ndarray, float32
        Room for an input that is rounded to bfloat16 before it is prepared; empty where none is.
    kind : int
        How vectors are multiplied, see `npllama.kernels.vector_rows`.
    """

    panel: Array
    lines: Array
    tokens: Array
    scratch: Array
    rounded: Array
    kind: int


@compiled()
def inputs_room(n_new: int, widest: int, like: Array, rounds: bool, kind: int) -> Inputs:
    """Return room for inputs (T, N) of up to so many numbers a row."""
    groups = (widest + GROUP - 1) // GROUP
    size = max(tokens_bytes(groups, False, EXACT, n_new), tokens_bytes(groups, True, EXACT, n_new))
    room = max(4 * _SQUARE, max(vector_rows.room_size(), byte_rows.room_size(groups)))
    lines = aligned(vector_rows.tokens_size(n_new, widest, vector_rows.HALVES), like)
    return Inputs(
        aligned((widest + _STEP - 1) // _STEP * _PARTS * _STEP * n_new + 2 * _STEP, np.empty(0, np.uint16)),
        lines,
        aligned(2 * size, np.empty(0, np.int8)).reshape(2, size),
        aligned(room, like),
        np.empty(n_new * widest if rounds else 0, np.float32),
        kind,
    )


@compiled()
def part_of(layer: Array, matrix: int, row: int, width: int) -> Part:
    """Return a part of a matrix of a layer (a line of the table) from a row on."""
    form, data = layer[_FORM + matrix], layer[_DATA + matrix]
    if form == _BFLOAT16:
        place = data + 2 * row * width
        return Part(form, width, Rows(place, place, place))
    whole = Rows(data, layer[_SCALES + matrix], layer[_MINIMA + matrix])
    return Part(form, width, rows_at(whole, row, (width + GROUP - 1) // GROUP, form == _INT4))


@compiled(inline=True)
def no_part() -> Part:
    """Return a part without rows."""
    return Part(0, 0, Rows(0, 0, 0))


@compiled(inline=True)
def _row_bytes(part: Part) -> int:
    """Return the bytes of a row's numbers, without scales."""
    groups = (part.width + GROUP - 1) // GROUP
    return 2 * part.width if part.form == _BFLOAT16 else groups * (GROUP // 2 if part.form == _INT4 else GROUP)


@compiled()
def fetch(part: Part) -> None:
    """Fetch a part from memory: its numbers, and the scales and minima, which are bfloat16."""
    for line in range(0, ROWS * _row_bytes(part), 64):
        simd.prefetch(part.rows.data, line)
    if part.form != _BFLOAT16:
        for line in range(0, ROWS * ((part.width + GROUP - 1) // GROUP) * 2, 64):
            simd.prefetch(part.rows.scales, line)
            simd.prefetch(part.rows.minima, line)


@compiled()
def begin(shapes: Array, tiles: Array | None) -> None:
    """Get a thread ready."""
    if tiles is not None:
        simd.tile_configure(shapes)


@compiled()
def end(tiles: Array | None) -> None:
    """Undo what `begin` did."""
    if tiles is not None:
        simd.tile_release()


@compiled()
def prepare(x: Array, layer: Array, first: int, stop: int, inputs: Inputs, ways: Any) -> None:
    """Prepare what enters the matrices of a layer from ``first`` to before ``stop``: x (T, N)."""
    _prepare(x, layer, first, stop, inputs, ways[0], ways[1], ways[2:])


@compiled()
def _prepare(
    x: Array,
    layer: Array,
    first: int,
    stop: int,
    inputs: Inputs,
    tiles: Array | None,
    vectors: Array | None,
    places: tuple[int, ...],
) -> None:
    if inputs.rounded.size > 0:
        round_bits(x.reshape(-1).view(np.uint32), inputs.rounded.view(np.uint32))
        x = inputs.rounded[: x.size].reshape(x.shape)
    groups = (x.shape[1] + GROUP - 1) // GROUP
    for form in range(3):
        is_wanted = False
        for matrix in range(first, stop):
            is_wanted |= layer[_FORM + matrix] == form
        if tiles is not None:  # noqa: SIM102
            if is_wanted and form == _BFLOAT16:
                _pack_floats(x, inputs.panel)
        if vectors is not None:  # noqa: SIM102
            if is_wanted and form == _BFLOAT16:
                vector_rows.line_up(x, inputs.kind, inputs.lines)
        if len(places) > 0:  # noqa: SIM102
            if is_wanted and form != _BFLOAT16:
                size = tokens_bytes(groups, form == _INT4, places, x.shape[0])
                take_apart(x, form == _INT4, places, inputs.tokens[form - 1, :size])


@compiled()
def multiply_part(n_new: int, part: Part, ahead: Part, inputs: Inputs, block: Array, ways: Any) -> None:
    """Fill a block (T, rows), flat, with the input times a part; fetch another one meanwhile."""
    _multiply_part(n_new, part, ahead, inputs, block, ways[0], ways[1], ways[2:])


@compiled()
def _multiply_part(
    n_new: int,
    part: Part,
    ahead: Part,
    inputs: Inputs,
    block: Array,
    tiles: Array | None,
    vectors: Array | None,
    places: tuple[int, ...],
) -> None:
    if tiles is not None:  # noqa: SIM102
        if part.form == _BFLOAT16:
            _multiply_tiles(part, n_new, inputs, block, ahead)
    if vectors is not None:  # noqa: SIM102
        if part.form == _BFLOAT16:
            _multiply_vectors(part, n_new, inputs, block, ahead)
    if len(places) > 0:  # noqa: SIM102
        if part.form != _BFLOAT16:
            _multiply_bytes(part, n_new, places, inputs, block, ahead)


@compiled()
def _multiply_bytes(part: Part, n_new: int, places: Any, inputs: Inputs, block: Array, ahead: Part) -> None:
    """Do what `multiply_part` does, for int8 and int4: as blocks of 16 rows."""
    groups, is_int4 = (part.width + GROUP - 1) // GROUP, part.form == _INT4
    output, token, tokens = np.int64(block.ctypes.data), 4 * ROWS, inputs.tokens[part.form - 1]
    for first in range(0, ROWS, byte_rows.BLOCK):
        rows = rows_at(part.rows, first, groups, is_int4)
        coming = rows_at(rows, byte_rows.BLOCK, groups, is_int4)
        if first + byte_rows.BLOCK == ROWS and ahead.width > 0:
            coming = ahead.rows
        byte_rows.multiply_block(
            rows, groups, is_int4, places, tokens, n_new, coming, inputs.scratch, output + 4 * first, token
        )


@compiled()
def _multiply_vectors(part: Part, n_new: int, inputs: Inputs, block: Array, ahead: Part) -> None:
    """Do what `multiply_part` does, for bfloat16 in vectors: as blocks of 16 rows."""
    row, output, token = _row_bytes(part), np.int64(block.ctypes.data), 4 * ROWS
    for first in range(0, ROWS, vector_rows.BLOCK):
        rows = part.rows.data + row * first
        coming, size = rows + vector_rows.BLOCK * row, row
        if first + vector_rows.BLOCK == ROWS:
            coming, size = ahead.rows.data, _row_bytes(ahead)
        vector_rows.multiply_block(
            rows, part.width, inputs.kind, inputs.lines, n_new, coming, size, inputs.scratch, output + 4 * first, token
        )


@compiled()
def _pack_floats(x: Array, panel: Array) -> None:
    """Pack an input x (T, N) as a panel. That of a single token has its numbers in order."""
    n_new, width = x.shape
    steps = (width + _STEP - 1) // _STEP
    if n_new > 1:
        _pack_panel(x, panel)
        return
    for s in range(steps):
        start = min(_STEP * s, width - _STEP)
        parts = panel[_PARTS * _STEP * s : _PARTS * _STEP * (s + 1)]
        _split(x[0, start : start + _STEP], parts[:_STEP], parts[_STEP : 2 * _STEP], parts[2 * _STEP :])
        for part in range(_PARTS):
            for j in range(_STEP * s - start):
                parts[part * _STEP + j] = 0


@compiled()
def _multiply_tiles(part: Part, n_new: int, inputs: Inputs, block: Array, ahead: Part) -> None:
    """Do what `multiply_part` does, for bfloat16."""
    width, scratch = part.width, inputs.scratch
    rows_ahead = min(ROWS, (ROWS * _row_bytes(ahead) + 2 * width - 1) // (2 * width))
    _multiply_block(part.rows.data, width, inputs.panel, n_new, ahead.rows.data, rows_ahead, scratch)
    _deliver(scratch, np.int64(block.ctypes.data), 4 * ROWS, n_new)


@compiled()
def add_residual(block: Array, x: Array, row: int) -> None:
    """Add columns of x (T, M) from ``row`` on to a block (T, rows)."""
    for at in range(0, block.shape[0], 16):
        place = at // ROWS * x.shape[1] + row + at % ROWS
        simd.store(block, at, simd.add(simd.load(x, place), simd.load(block, at)))


@compiled()
def copy_block(block: Array, y: Array, row: int, skipped: int) -> None:
    """Write a block (T, rows) to columns of y (T, M) from ``row`` on, without the first few."""
    for t in range(y.shape[0]):
        for i in range(skipped, ROWS):
            y[t, row + i] = block[t * ROWS + i]
