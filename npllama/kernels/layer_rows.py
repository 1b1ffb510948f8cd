"""What a unit of rows multiplies: a part of a matrix, whatever it is stored as, times what enters the matrix.

The matrices of a layer may be stored differently from one another. What enters them is taken apart for each storage
type that asks for it. See `npllama.kernels.layer_units`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS
from npllama.kernels.memory import aligned
from npllama.kernels.quantised_rows import Rows, multiply_rows, rows_at, take_apart, token_at, token_bytes
from npllama.kernels.rounded import round_bits
from npllama.kernels.tiles import _BLOCK, _PARTS, _SQUARE, _STEP, _deliver, _multiply_block, _pack_panel, _split

_BFLOAT16, _INT8, _INT4 = FORMS.values()
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
    """A thread's own: what rows are multiplied by, for each storage type.

    Attributes
    ----------
    panel : ndarray, uint16
        For bfloat16, see `npllama.kernels.tiles`.
    tokens : ndarray of shape (2, bytes), int8
        For int8 and int4, see `npllama.kernels.quantised_rows`.
    scratch : ndarray, float32
        Room for four tiles.
    rounded : ndarray, float32
        Room for an input that is rounded to bfloat16 before it is taken apart; empty where none is.
    """

    panel: Array
    tokens: Array
    scratch: Array
    rounded: Array


@compiled()
def inputs_room(n_new: int, widest: int, like: Array, rounds: bool) -> Inputs:
    """Return room for inputs (T, N) of up to so many numbers a row."""
    groups = (widest + GROUP - 1) // GROUP
    size = max(token_bytes(groups, False), token_bytes(groups, True))
    return Inputs(
        aligned((widest + _STEP - 1) // _STEP * _PARTS * _STEP * n_new + 2 * _STEP, np.empty(0, np.uint16)),
        aligned(2 * size, np.empty(0, np.int8)).reshape(2, size),
        aligned(4 * _SQUARE, like),
        np.empty(n_new * widest if rounds else 0, np.float32),
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
def take_input_apart(
    x: Array, layer: Array, first: int, stop: int, inputs: Inputs, floats: Array | None, integers: Array | None
) -> None:
    """Take apart what enters the matrices of a layer from ``first`` to before ``stop``: x (T, N).

    ``floats`` and ``integers`` are None for a model without matrices in bfloat16, or in int8 or int4: what is for these
    is not compiled then. Numba leaves a branch out whose condition asks for None, and asks for nothing else. Integers
    are multiplied with one token.
    """
    if inputs.rounded.size > 0:
        round_bits(x.reshape(-1).view(np.uint32), inputs.rounded.view(np.uint32))
        x = inputs.rounded[: x.size].reshape(x.shape)
    for form in range(3):
        is_wanted = False
        for matrix in range(first, stop):
            is_wanted |= layer[_FORM + matrix] == form
        if floats is not None:  # noqa: SIM102
            if is_wanted and form == _BFLOAT16:
                _pack_floats(x, inputs.panel)
        if integers is not None:  # noqa: SIM102
            if is_wanted and form != _BFLOAT16:
                size = token_bytes((x.shape[1] + GROUP - 1) // GROUP, form == _INT4)
                take_apart(x[0], form == _INT4, inputs.tokens[form - 1, :size])


@compiled()
def multiply_part(
    n_new: int, part: Part, ahead: Part, inputs: Inputs, block: Array, floats: Array | None, integers: Array | None
) -> None:
    """Fill a block (T, rows), flat, with the input times a part; fetch another one meanwhile.

    See `take_input_apart` for ``floats`` and ``integers``.
    """
    if floats is not None:  # noqa: SIM102
        if part.form == _BFLOAT16:
            _multiply_tiles(part, n_new, inputs, block, ahead)
    if integers is not None:  # noqa: SIM102
        if part.form != _BFLOAT16:
            groups, is_int4 = (part.width + GROUP - 1) // GROUP, part.form == _INT4
            token = token_at(np.int64(inputs.tokens[part.form - 1].ctypes.data), groups, is_int4)
            following = ahead.rows if ahead.width else part.rows
            multiply_rows(part.rows, np.int64(ROWS), groups, is_int4, token, following, np.int64(block.ctypes.data))


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
