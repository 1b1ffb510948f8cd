"""What a unit of rows multiplies: a part of a matrix, whatever it is stored as, times what enters the matrix.

The matrices of a layer may be stored differently from one another. What enters them is prepared for each storage type
that asks for it. There are four ways to multiply, of which a model on a processor uses one or two:

===========  ==========  =============================================================
``tiles``    bfloat16    in the matrix unit, see `npllama.kernels.tiles`
``vectors``  bfloat16    in vector registers, see `npllama.kernels.vector_rows`
``exact``    int8, int4  by three digits of the input, see `npllama.kernels.byte_rows`
``rounded``  int8, int4  the input is rounded to int8, see `npllama.kernels.byte_columns`
===========  ==========  =============================================================

A way is two functions, one to prepare an input and one to multiply, which are called by their addresses; the latter may
call a third one for each block of rows. A table says which they are for each storage type. So what calls them is
compiled once for all ways, and a way that is not used, for which a processor may lack the instructions, is not compiled
at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from npllama.dtypes import GROUP, Array
from npllama.kernels import byte_columns, byte_rows, rounded_tokens, simd, vector_rows
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.byte_rows import Rows, rows_at
from npllama.kernels.byte_tokens import take_apart, tokens_bytes
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import round_bits
from npllama.kernels.subroutines import subroutine
from npllama.kernels.tiles import _BLOCK, _PARTS, _SQUARE, _STEP, _deliver, _multiply_block, _pack_panel, _split

_BFLOAT16, _INT8, _INT4, _ = FORMS.values()
#: Columns of a table of layers: for each of its seven matrices the address of the data, those of scales and minima (or
#: that of the data again), and the number of the storage type.
_DATA, _SCALES, _MINIMA, _FORM = range(0, 28, 7)

#: Columns of a table of ways: the addresses of its functions.
_PREPARE, _MULTIPLY, _BLOCKS = range(3)

#: Rows of a matrix that are a block; a unit is one or some of them.
ROWS = _BLOCK
#: Rows of integers that are multiplied together.
_BLOCK_OF_BYTES = byte_rows.BLOCK


class Part(NamedTuple):
    """Rows of a matrix, as many as a block has: their storage type, their width N (0: there are none), and where."""

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
        Integers, for int8 and int4.
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


@subroutine(counted=True)
def inputs_room(n_new: int, widest: int, like: Array, rounds: bool, kind: int) -> Inputs:
    """Return room for inputs (T, N) of up to so many numbers a row."""
    groups = (widest + GROUP - 1) // GROUP
    size = 0
    for is_int4 in (False, True):
        size = max(size, tokens_bytes(groups, is_int4, n_new))
        size = max(size, rounded_tokens.tokens_bytes(groups, is_int4, n_new))
    bytes_room = max(byte_rows.room_size(groups), byte_columns.room_size(groups))
    room = max(4 * _SQUARE, max(vector_rows.room_size(), bytes_room))
    lines = aligned(vector_rows.tokens_size(n_new, widest, vector_rows.HALVES), like)
    return Inputs(
        aligned((widest + _STEP - 1) // _STEP * _PARTS * _STEP * n_new + 2 * _STEP, np.empty(0, np.uint16)),
        lines,
        aligned(2 * size, np.empty(0, np.int8)).reshape(2, size),
        aligned(room, like),
        np.empty(n_new * widest if rounds else 0, np.float32),
        kind,
    )


@subroutine()
def part_of(layer: Array, matrix: int, row: int, width: int) -> Part:
    """Return a part of a matrix of a layer (a line of the table) from a row on."""
    form, data = layer[_FORM + matrix], layer[_DATA + matrix]
    if form == _BFLOAT16:
        place = data + 2 * row * width
        return Part(form, width, Rows(place, place, place))
    whole = Rows(data, layer[_SCALES + matrix], layer[_MINIMA + matrix])
    return Part(form, width, rows_at(whole, row, (width + GROUP - 1) // GROUP, form == _INT4))


@subroutine(inline=True)
def no_part() -> Part:
    """Return a part without rows."""
    return Part(0, 0, Rows(0, 0, 0))


@subroutine(inline=True)
def _row_bytes(part: Part) -> int:
    """Return the bytes of a row's numbers, without scales."""
    groups = (part.width + GROUP - 1) // GROUP
    return 2 * part.width if part.form == _BFLOAT16 else groups * (GROUP // 2 if part.form == _INT4 else GROUP)


@subroutine()
def fetch(part: Part) -> None:
    """Fetch a part from memory: its numbers, and the scales and minima, which are bfloat16."""
    for line in range(0, ROWS * _row_bytes(part), 64):
        simd.prefetch(part.rows.data, line)
    if part.form != _BFLOAT16:
        for line in range(0, ROWS * ((part.width + GROUP - 1) // GROUP) * 2, 64):
            simd.prefetch(part.rows.scales, line)
            simd.prefetch(part.rows.minima, line)


@subroutine()
def prepare(x: Array, layer: Array, first: int, stop: int, inputs: Inputs, ways: Array) -> None:
    """Prepare what enters the matrices of a layer from ``first`` to before ``stop``: x (T, N)."""
    if inputs.rounded.size > 0:
        round_bits(x.reshape(-1).view(np.uint32), inputs.rounded.view(np.uint32))
        x = inputs.rounded[: x.size].reshape(x.shape)
    for form in range(len(ways)):
        is_wanted = False
        for matrix in range(first, stop):
            is_wanted |= layer[_FORM + matrix] == form
        if is_wanted:
            call_at(ways[form, _PREPARE], (x, form, inputs))


@subroutine(inline=True)
def multiply_part(n_new: int, part: Part, ahead: Part, inputs: Inputs, block: Array, ways: Array) -> None:
    """Fill a block (T, rows), flat, with the input times a part; fetch another one meanwhile."""
    call_at(ways[part.form, _MULTIPLY], (n_new, part, ahead, inputs, block, ways[part.form, _BLOCKS]))


# --- the ways: functions of the same arguments ------------------------------------------------------------------


@compiled()
def configure(shapes: Array) -> None:
    """Get a thread ready for tiles."""
    simd.tile_configure(shapes)


@compiled()
def release() -> None:
    """Undo `configure`."""
    simd.tile_release()


@compiled()
def _prepare_vectors(x: Array, form: int, inputs: Inputs) -> None:
    vector_rows.line_up(x, inputs.kind, inputs.lines)


@compiled()
def _prepare_exact(x: Array, form: int, inputs: Inputs) -> None:
    size = tokens_bytes((x.shape[1] + GROUP - 1) // GROUP, form == _INT4, x.shape[0])
    take_apart(x, form == _INT4, inputs.tokens[form - 1, :size])


@compiled()
def _prepare_rounded(x: Array, form: int, inputs: Inputs) -> None:
    size = rounded_tokens.tokens_bytes((x.shape[1] + GROUP - 1) // GROUP, form == _INT4, x.shape[0])
    rounded_tokens.round_tokens(x, form == _INT4, inputs.tokens[form - 1, :size])


@compiled(counted=False)
def _multiply_bytes(n_new: int, part: Part, ahead: Part, inputs: Inputs, block: Array, work: int) -> None:
    """Multiply blocks of 16 rows, one after the other."""
    groups, is_int4, tokens = (part.width + GROUP - 1) // GROUP, part.form == _INT4, inputs.tokens[part.form - 1]
    for first in range(0, ROWS, _BLOCK_OF_BYTES):
        rows = rows_at(part.rows, first, groups, is_int4)
        coming = rows_at(rows, _BLOCK_OF_BYTES, groups, is_int4)
        if first + _BLOCK_OF_BYTES == ROWS and ahead.width > 0:
            coming = ahead.rows
        output = np.int64(block.ctypes.data) + 4 * first
        call_at(work, (rows, groups, is_int4, tokens, n_new, coming, inputs.scratch, output, 4 * ROWS))


@compiled(counted=False)
def _multiply_vectors(n_new: int, part: Part, ahead: Part, inputs: Inputs, block: Array, work: int) -> None:
    """Multiply blocks of 16 rows, one after the other."""
    row, output, token = _row_bytes(part), np.int64(block.ctypes.data), 4 * ROWS
    for first in range(0, ROWS, vector_rows.BLOCK):
        rows, out = part.rows.data + row * first, output + 4 * first
        coming, size = rows + vector_rows.BLOCK * row, row
        if first + vector_rows.BLOCK == ROWS:
            coming, size = ahead.rows.data, _row_bytes(ahead)
        call_at(work, (rows, part.width, inputs.kind, inputs.lines, n_new, coming, size, inputs.scratch, out, token))


@compiled()
def _prepare_tiles(x: Array, form: int, inputs: Inputs) -> None:
    """Pack an input x (T, N) as a panel. That of a single token has its numbers in order."""
    (n_new, width), panel = x.shape, inputs.panel
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
def _multiply_tiles(n_new: int, part: Part, ahead: Part, inputs: Inputs, block: Array, work: int) -> None:
    width, scratch = part.width, inputs.scratch
    rows_ahead = min(ROWS, (ROWS * _row_bytes(ahead) + 2 * width - 1) // (2 * width))
    _multiply_block(part.rows.data, width, inputs.panel, n_new, ahead.rows.data, rows_ahead, scratch)
    _deliver(scratch, np.int64(block.ctypes.data), 4 * ROWS, n_new)


#: The ways by their names: what prepares an input, what multiplies, and what tells where blocks are multiplied.
_WAYS: dict[str, tuple[Any, Any, Callable[[], int] | None]] = {
    "tiles": (_prepare_tiles, _multiply_tiles, None),
    "vectors": (_prepare_vectors, _multiply_vectors, vector_rows.address_of_block),
    "exact": (_prepare_exact, _multiply_bytes, byte_rows.address_of_block),
    "rounded": (_prepare_rounded, _multiply_bytes, byte_columns.address_of_block),
}


def table_of(ways: Mapping[str, str], x: Array, inputs: Inputs, block: Array) -> NDArray[np.int64]:
    """Compile ways, and return the table of their addresses, a line for each storage type.

    Parameters
    ----------
    ways : mapping of str to str
        For each storage type that matrices have, the name of a way.
    x, inputs, block
        Of the types that the functions will be called with.
    """
    table, part = np.zeros((len(FORMS), 3), np.int64), Part(1, 1, Rows(1, 1, 1))
    for dtype, way in ways.items():
        preparing, multiplying, of_block = _WAYS[way]
        table[FORMS[dtype], _BLOCKS] = 0 if of_block is None else of_block()
        table[FORMS[dtype], _PREPARE] = address_of(preparing, x, 1, inputs)
        table[FORMS[dtype], _MULTIPLY] = address_of(multiplying, 1, part, part, inputs, block, 1)
    return table


# --- what becomes of a block ------------------------------------------------------------------------------------


@subroutine()
def add_residual(block: Array, x: Array, row: int) -> None:
    """Add columns of x (T, M) from ``row`` on to a block (T, rows)."""
    for at in range(0, block.shape[0], 16):
        place = at // ROWS * x.shape[1] + row + at % ROWS
        simd.store(block, at, simd.add(simd.load(x, place), simd.load(block, at)))


@subroutine()
def copy_block(block: Array, y: Array, row: int, skipped: int) -> None:
    """Write a block (T, rows) to columns of y (T, M) from ``row`` on, without the first few."""
    for t in range(y.shape[0]):
        for i in range(skipped, ROWS):
            y[t, row + i] = block[t * ROWS + i]
