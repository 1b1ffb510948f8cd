"""Products with bfloat16 weights in the processor's matrix unit (Intel AMX), as exact as in float32.

The unit multiplies tiles of bfloat16 numbers and sums in float32. The weights are bfloat16 as they are; each float32
of the input is taken apart into three bfloat16 numbers of 8 bits each, exactly::

    x = x1 + x2 + x3            y = W x1 + W x2 + W x3

so nothing is rounded but the sums. The unit computes ``Yᵀ = W · Xᵀ``: it takes the weights in rows as they lie in the
memory map, 16 rows of 32 numbers a tile. The input is packed for it once: 16 tokens a tile, two of their numbers in a
row. A **block** of two tiles of weights (32 rows) meets a **panel** of up to 16 tokens along the whole row, 32 numbers
a **step**, in two tiles of sums. More tokens are the business of `npllama.kernels.tile_blocks`.

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
from npllama.kernels.jobs import count_blocks, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.subroutines import subroutine

_TILE = 16  # rows of a tile of weights, and tokens of a panel
_SQUARE = _TILE * _TILE  # sums of a tile
_STEP = 32
_PARTS = 3

#: Rows of a block: two tiles. With three, one panel waits longer for memory.
_BLOCK = 2 * _TILE
#: Bytes of a row up to which the next block is fetched ahead of its turn. The processor foresees longer rows better by
#: itself: it follows some dozens of streams, one in each page of 4096 bytes.
_NARROW = 4096

#: Only their dtypes matter.
_BITS, _NUMBERS = np.empty(0, np.uint16), np.empty(0, np.float32)


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is 16 at most, N 32 at least.
    weights : sequence of Tensor of shape (M, N)
        bfloat16. M may differ, and is 32 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    _run(x, jobs_of(weights, outputs, _BLOCK), _shapes(len(x)))


def tile_shapes(*row_bytes: int) -> Array:
    """Return what `simd.tile_configure` takes, for eight tiles of 16 rows of so many bytes."""
    shapes: Array = np.zeros(64, np.uint8)
    shapes[0] = 1
    shapes[16:32:2] = row_bytes
    shapes[48:56] = 16
    return shapes


@cache
def _shapes(columns: int) -> Array:
    """Return the shapes of the tiles: 0 and 1 sums, 3 and 4 weights, 6 and 7 input."""
    return tile_shapes(*[4 * columns] * 3, *[2 * _STEP] * 3, *[4 * columns] * 2)


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


@subroutine(counted=True)
def _pack_panel(x: Array, packed: Array) -> None:
    """Pack x (T, N), one panel: for each step and part 16 rows, each with a pair of numbers of every token.

    The last step ends where the row does. What it shares with the one before counts as zero here.
    """
    n_new, width = x.shape
    parts = np.zeros((_PARTS, _TILE, _STEP), np.uint16)
    for s in range((width + _STEP - 1) // _STEP):
        start = min(_STEP * s, width - _STEP)
        for t in range(n_new):
            _split(x[t, start : start + _STEP], parts[0, t], parts[1, t], parts[2, t])
        for part in range(_PARTS):
            for t in range(_TILE):
                for j in range(_STEP * s - start):
                    parts[part, t, j] = 0
            at = (s * _PARTS + part) * _STEP * n_new
            simd.transpose(parts, part * _TILE * _STEP, 2 * _STEP, packed, at, 4 * n_new)


@subroutine(inline=True)
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


@compiled()
def _run(x: Array, jobs: Array, shapes: Array) -> None:
    """Pack x (T, N) and multiply every block of every matrix by it. See `npllama.kernels.jobs`."""
    n_new, width = x.shape
    steps = (width + _STEP - 1) // _STEP
    packed = aligned(steps * _PARTS * _STEP * n_new + 2 * _STEP, _BITS)  # packing writes a line past the last row
    _pack_panel(x, packed)
    _multiply(jobs, shapes, packed, n_new, width)


@compiled(parallel=True)
def _multiply(jobs: Array, shapes: Array, packed: Array, n_new: int, width: int) -> None:
    """Multiply every block of every matrix by the packed panel, the blocks shared between threads.

    The last block of a matrix ends where the matrix does. What it shares with the one before is computed twice.
    """
    for block in prange(count_blocks(jobs, _BLOCK)):
        job, first = job_of(jobs, block, _BLOCK)
        row = min(first, job.rows - _BLOCK)
        weight = job.data + 2 * width * row
        scratch = aligned(4 * _SQUARE, _NUMBERS)
        simd.tile_configure(shapes)
        rows_ahead = _BLOCK if 2 * width <= _NARROW else 0
        _multiply_block(weight, width, packed, n_new, weight + 2 * width * _BLOCK, rows_ahead, scratch)
        _deliver(scratch, job.output + 4 * row, 4 * job.rows, n_new)
        simd.tile_release()


@subroutine(inline=True)
def _multiply_block(
    weight: int, width: int, packed: Array, n_new: int, ahead: int, rows_ahead: int, scratch: Array
) -> None:
    """Fill the first two tiles of ``scratch``, which holds four, with the products of 32 rows with a packed panel.

    Meanwhile ``rows_ahead`` rows at the address ``ahead`` are fetched from memory, for the next block.
    """
    stride, row = 4 * n_new, 2 * width  # bytes from row to row of a tile
    part = 8 * stride  # numbers of a tile of input
    steps = (width + _STEP - 1) // _STEP
    at = line = 0
    simd.tile_zero(0)
    simd.tile_zero(1)
    for s in range(steps):
        for _ in range(rows_ahead):
            simd.prefetch(ahead, line)
            line += 64
            if line >= 64 * steps:
                line = 0
                ahead += row
        # The way from tiles to memory falls asleep after about 500 ns without a store, and takes 200 ns to wake up.
        # One that nobody reads, every now and then, keeps it awake.
        if s % 4 == 0:
            simd.tile_store(7, scratch, 3 * _SQUARE, 64)
        column = 2 * min(_STEP * s, width - _STEP)
        simd.tile_load(3, weight, column, row)
        simd.tile_load(4, weight, column + _TILE * row, row)
        simd.tile_load(6, packed, at, stride)
        simd.tile_dot_bfloat16(0, 3, 6)
        simd.tile_dot_bfloat16(1, 4, 6)
        simd.tile_load(7, packed, at + part, stride)
        simd.tile_dot_bfloat16(0, 3, 7)
        simd.tile_dot_bfloat16(1, 4, 7)
        simd.tile_load(6, packed, at + 2 * part, stride)
        simd.tile_dot_bfloat16(0, 3, 6)
        simd.tile_dot_bfloat16(1, 4, 6)
        at += 3 * part
    simd.tile_store(0, scratch, 0, 64)
    simd.tile_store(1, scratch, _SQUARE, 64)


@subroutine()
def _deliver(scratch: Array, output: int, stride: int, tokens: int) -> None:
    """Turn two tiles of rows by tokens: ``tokens`` rows of 32 numbers, ``stride`` bytes apart.

    With fewer than 16 the fourth tile of ``scratch`` is written over.
    """
    if tokens == _TILE:
        simd.transpose(scratch, 0, 64, output, 0, stride)
        simd.transpose(scratch, _SQUARE, 64, output, 64, stride)
        return
    for i in range(2):
        simd.transpose(scratch, i * _SQUARE, 64, scratch, 3 * _SQUARE, 64)
        for t in range(tokens):
            simd.store(output, t * stride + 64 * i, simd.load(scratch, 3 * _SQUARE + _TILE * t))
