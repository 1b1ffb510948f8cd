"""Products with bfloat16 weights in the processor's matrix unit (Intel AMX), as exact as in float32.

The unit multiplies tiles of bfloat16 numbers and sums in float32. The weights are bfloat16 as they are; each float32
of the input is taken apart into three bfloat16 numbers of 8 bits each, exactly::

    x = x1 + x2 + x3            y = W x1 + W x2 + W x3

so nothing is rounded but the sums. The unit computes ``Yᵀ = W · Xᵀ``: it takes the weights in rows as they lie in the
memory map, 16 rows of 32 numbers a tile. The input is packed for it once: 16 tokens a tile, two of their numbers in a
row. A **block** of two or three tiles of weights (32 or 48 rows) meets a **panel** of 16 tokens along the whole row, 32
numbers a **step**, in as many sums that stay in registers.

A number of the output is one sum in one order: step by step, and in each step first W x1, then W x2, then W x3. It
does not depend on the other rows and tokens of the call, nor on the number of threads. Numbers smaller than 2**-126
count as zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from npllama.dtypes import Array, Tensor
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.memory import address, aligned

_TILE = 16  # rows of a tile of weights, and tokens of a panel
_SQUARE = _TILE * _TILE  # sums of a tile
_STEP = 32
_PARTS = 3

#: Bytes of packed input that are used again for every block of weights: most of a second-level cache of 2 MB.
_PASS_BYTES = 1_250_000
#: Steps of one pass where there are several panels: a block of weights then takes 200 kB of that cache.
_PASS_STEPS = 64
#: Tiles of a block: three keep the unit busy. Two are read from memory faster, which is what one panel waits for.
_TILES_OF_ONE, _TILES_OF_MANY = 2, 3
#: Bytes of a row up to which one panel fetches the next block ahead of its turn. The processor foresees longer rows
#: better by itself: it follows some dozens of streams, one in each page of 4096 bytes.
_NARROW = 4096

_BITS = np.empty(0, np.uint16)


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        bfloat16. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    matrices = [weight.data for weight in weights]
    if x.shape[1] < _STEP or min(len(matrix) for matrix in matrices) < _TILES_OF_MANY * _TILE:
        _multiply_small(x, matrices, outputs)
    else:
        _multiply_large(x, matrices, outputs)


def _multiply_large(x: Array, matrices: Sequence[Array], outputs: Sequence[Array]) -> None:
    """Do what `multiply` does, for matrices of at least a block of rows and a step of columns."""
    n_tiles = _TILES_OF_ONE if len(x) <= _TILE else _TILES_OF_MANY
    jobs, blocks = [], 0
    for matrix, output in zip(matrices, outputs, strict=True):
        jobs.append((address(matrix), address(output), len(matrix), blocks))
        blocks += -(-len(matrix) // (n_tiles * _TILE))
    columns = min(len(x), _TILE)
    _run(x, np.array(jobs), blocks, n_tiles, columns, _shapes(columns))


def _multiply_small(x: Array, matrices: Sequence[Array], outputs: Sequence[Array]) -> None:
    """Do what `multiply` does, by way of matrices that are filled up with zeros."""
    width, least = max(x.shape[1], _STEP), _TILES_OF_MANY * _TILE

    def filled_up(matrix: Array, rows: int) -> Array:
        larger = np.zeros((max(rows, len(matrix)), width), matrix.dtype)
        larger[: matrix.shape[0], : matrix.shape[1]] = matrix
        return larger

    results = [np.empty((len(x), max(len(matrix), least)), np.float32) for matrix in matrices]
    _multiply_large(filled_up(x, 1), [filled_up(matrix, least) for matrix in matrices], results)
    for output, result in zip(outputs, results, strict=True):
        output[:] = result[:, : output.shape[1]]


@cache
def _shapes(columns: int) -> Array:
    """Return the shapes of the tiles: 0 to 2 sums, 3 to 5 weights, 6 and 7 input. See `simd.tile_configure`."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32:2] = [4 * columns] * 3 + [2 * _STEP] * 3 + [4 * columns] * 2
    shapes[48:56] = _TILE
    return shapes


@compiled()
def _run(x: Array, jobs: Array, blocks: int, n_tiles: int, columns: int, shapes: Array) -> None:
    """Go through x (T, N) in passes of so many panels and steps that their packed form stays in the cache.

    Each row of ``jobs`` is a matrix: its address, that of its output, M, and the number of its first block. A block
    has ``n_tiles`` tiles, a panel ``columns`` tokens.
    """
    n_new, width = x.shape
    steps = (width + _STEP - 1) // _STEP
    pass_steps = steps if n_new <= columns else min(steps, _PASS_STEPS)
    panel_size = pass_steps * _PARTS * _STEP * columns
    pass_panels = min((n_new + columns - 1) // columns, max(1, _PASS_BYTES // (2 * panel_size)))
    packed = aligned(pass_panels * panel_size + 2 * _STEP, _BITS)  # packing writes a line past the last row
    sums = aligned(blocks * pass_panels * n_tiles * _SQUARE if pass_steps < steps else 0, x)
    for first in range(0, n_new, pass_panels * columns):
        panels = min(pass_panels, (n_new - first + columns - 1) // columns)
        for step in range(0, steps, pass_steps):
            last = min(step + pass_steps, steps)
            if panels == 1:
                _pack_panel(x, packed, 0, columns, first, step, last)
            else:
                _pack(x, packed, columns, first, panels, step, last)
            _multiply(jobs, blocks, n_tiles, shapes, packed, sums, n_new, width, columns, first, panels, step, last)


# --- packing ----------------------------------------------------------------------------------------------------


def _float_to_upper(context: Any, number: Any) -> Any:
    """``upper(number)``: a float32 without the lower half of its bits: the bfloat16 next to it towards zero."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.and_(builder.bitcast(arguments[0], word), word(0xFFFF0000))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.float32), code


def _float_to_upper_bits(context: Any, number: Any) -> Any:
    """``upper_bits(number)``: the upper half of a float32's bits, a bfloat16."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.trunc(builder.lshr(builder.bitcast(arguments[0], word), word(16)), ir.IntType(16))

    return types.uint16(types.float32), code


_upper: Any = intrinsic(_float_to_upper)
_upper_bits: Any = intrinsic(_float_to_upper_bits)
_INFINITY = np.float32(np.inf)


@compiled(parallel=True)
def _pack(x: Array, packed: Array, columns: int, first: int, panels: int, step: int, last: int) -> None:
    """Pack panels of ``columns`` tokens, from token ``first`` on, each of the steps from ``step`` to ``last``."""
    size = (last - step) * _PARTS * _STEP * columns
    for panel in prange(panels):
        _pack_panel(x, packed, panel * size, columns, first + panel * columns, step, last)


@compiled()
def _pack_panel(x: Array, packed: Array, at: int, columns: int, first: int, step: int, last: int) -> None:
    """Pack one panel: for each step and part 16 rows, each with a pair of numbers of every token.

    The last step ends where the row does. What it shares with the one before counts as zero here.
    """
    n_new, width = x.shape
    parts = np.zeros((_PARTS, _TILE, _STEP), np.uint16)
    for s in range(step, last):
        start = min(_STEP * s, width - _STEP)
        for t in range(min(columns, n_new - first)):
            _split(x[first + t, start : start + _STEP], parts[0, t], parts[1, t], parts[2, t])
        for part in range(_PARTS):
            for t in range(_TILE):
                for j in range(_STEP * s - start):
                    parts[part, t, j] = 0
            simd.transpose(parts, part * _TILE * _STEP, 2 * _STEP, packed, at, 4 * columns)
            at += _STEP * columns


@compiled(inline=True)
def _split(numbers: Array, high: Array, middle: Array, low: Array) -> None:
    """Take numbers apart into three bfloat16 that add up to them: the first 8 bits of each, the next 8, the last 8.

    Infinity is its first part alone. The other parts of a NaN are NaN, too: its first could lose what makes it one.
    """
    for j in range(_STEP):
        first = _upper(numbers[j])
        rest = np.float32(0) if abs(numbers[j]) == _INFINITY else numbers[j] - first
        second = _upper(rest)
        high[j], middle[j], low[j] = _upper_bits(first), _upper_bits(second), _upper_bits(rest - second)


# --- products ---------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _multiply(
    jobs: Array,
    blocks: int,
    n_tiles: int,
    shapes: Array,
    packed: Array,
    sums: Array,
    n_new: int,
    width: int,
    columns: int,
    first: int,
    panels: int,
    step: int,
    last: int,
) -> None:
    """Multiply every block of every matrix by the packed panels, the blocks shared between threads.

    The last block of a matrix ends where the matrix does. What it shares with the one before is computed twice.
    """
    for block in prange(blocks):
        job = 0
        while job + 1 < len(jobs) and jobs[job + 1, 3] <= block:
            job += 1
        weight, output, m, first_block = jobs[job]
        row = min(n_tiles * _TILE * (block - first_block), m - n_tiles * _TILE)
        simd.tile_configure(shapes)
        _multiply_block(
            weight + 2 * row * width,
            output + 4 * (first * m + row),
            m,
            n_tiles,
            sums[block * panels * n_tiles * _SQUARE :],
            packed,
            n_new - first,
            width,
            columns,
            panels,
            step,
            last,
        )
        simd.tile_release()


@compiled()
def _multiply_block(
    weight: int,
    output: int,
    m: int,
    n_tiles: int,
    sums: Array,
    packed: Array,
    n_new: int,
    width: int,
    columns: int,
    panels: int,
    step: int,
    last: int,
) -> None:
    """Multiply the rows of a block at an address by the packed panels, and write to the output at another, (n_new, m).

    Sums wait in ``sums``, tile by tile, when the row goes on in the next pass.
    """
    scratch = aligned(4 * _SQUARE, sums)
    size = (last - step) * _PARTS * _STEP * columns
    rows = n_tiles * _TILE
    rows_ahead = (rows + panels - 1) // panels if panels > 1 or 2 * width <= _NARROW else 0
    for panel in range(panels):
        tokens = min(columns, n_new - panel * columns)
        target = output + 4 * panel * columns * m
        at = panel * n_tiles * _SQUARE
        if step == 0:
            simd.tile_zero(0)
            simd.tile_zero(1)
            simd.tile_zero(2)
        else:
            simd.tile_load(0, sums, at, 64)
            simd.tile_load(1, sums, at + _SQUARE, 64)
            simd.tile_load(2, sums, at + 2 * _SQUARE, 64)
        ahead = weight + 2 * width * (rows + rows_ahead * panel)
        # Pasted in twice, so that the number of tiles is a constant in each: asking in every step costs 8 %.
        if n_tiles == _TILES_OF_ONE:
            _add_products(weight, width, 2, packed, panel * size, 4 * columns, step, last, ahead, rows_ahead, scratch)
        else:
            _add_products(weight, width, 3, packed, panel * size, 4 * columns, step, last, ahead, rows_ahead, scratch)
        if _STEP * last < width:
            simd.tile_store(0, sums, at, 64)
            simd.tile_store(1, sums, at + _SQUARE, 64)
            simd.tile_store(2, sums, at + 2 * _SQUARE, 64)
        else:
            simd.tile_store(0, scratch, 0, 64)
            simd.tile_store(1, scratch, _SQUARE, 64)
            simd.tile_store(2, scratch, 2 * _SQUARE, 64)
            _deliver(scratch, n_tiles, target, 4 * m, tokens)


@compiled(inline=True)
def _add_products(
    weight: int,
    width: int,
    n_tiles: int,
    packed: Array,
    at: int,
    stride: int,
    step: int,
    last: int,
    ahead: int,
    rows_ahead: int,
    scratch: Array,
) -> None:
    """Add to the tiles 0, 1 and 2 the products of the tiles of a block with one panel, from ``step`` to ``last``.

    Meanwhile ``rows_ahead`` rows at the address ``ahead`` are fetched from memory, for the next block.
    """
    part, row = 8 * stride, 2 * width
    line = 64 * step
    for s in range(step, last):
        for _ in range(rows_ahead):
            simd.prefetch(ahead, line)
            line += 64
            if line >= 64 * last:
                line = 64 * step
                ahead += row
        # The way from tiles to memory falls asleep after about 500 ns without a store, and takes 200 ns to wake up.
        # One that nobody reads, every now and then, keeps it awake.
        if s % 4 == 0:
            simd.tile_store(7, scratch, 3 * _SQUARE, 64)
        column = 2 * min(_STEP * s, width - _STEP)
        simd.tile_load(3, weight, column, row)
        simd.tile_load(4, weight, column + _TILE * row, row)
        if n_tiles == 3:
            simd.tile_load(5, weight, column + 2 * _TILE * row, row)
        simd.tile_load(6, packed, at, stride)
        simd.tile_dot_bfloat16(0, 3, 6)
        simd.tile_dot_bfloat16(1, 4, 6)
        if n_tiles == 3:
            simd.tile_dot_bfloat16(2, 5, 6)
        simd.tile_load(7, packed, at + part, stride)
        simd.tile_dot_bfloat16(0, 3, 7)
        simd.tile_dot_bfloat16(1, 4, 7)
        if n_tiles == 3:
            simd.tile_dot_bfloat16(2, 5, 7)
        simd.tile_load(6, packed, at + 2 * part, stride)
        simd.tile_dot_bfloat16(0, 3, 6)
        simd.tile_dot_bfloat16(1, 4, 6)
        if n_tiles == 3:
            simd.tile_dot_bfloat16(2, 5, 6)
        at += 3 * part


@compiled()
def _deliver(scratch: Array, n_tiles: int, output: int, stride: int, tokens: int) -> None:
    """Turn tiles of rows by tokens, and write ``tokens`` rows of 16 numbers from each, ``stride`` bytes apart."""
    for i in range(n_tiles):
        if tokens == _TILE:
            simd.transpose(scratch, _SQUARE * i, 64, output, 64 * i, stride)
        else:
            simd.transpose(scratch, _SQUARE * i, 64, scratch, 3 * _SQUARE, 64)
            for t in range(tokens):
                simd.store(output, t * stride + 64 * i, simd.load(scratch, 3 * _SQUARE + _TILE * t))
