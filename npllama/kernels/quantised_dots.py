"""Products with int8 and int4 weights by dot products of bytes (Intel VNNI): for one token, or a few.

A group of 64 weights is a vector register. With the three digits of the input (`npllama.kernels.digits`) it takes
three instructions, each 64 multiplications whose sums are exact; a float32 multiplication by ``scale · step`` then adds
the group to the row's sum. Nothing is widened to float32, which is what lets a core keep up with its memory.

The instruction wants its first operand unsigned, so the weights are taken larger than they are: int8 by 128, which
makes them uint8, and int4, which is stored unsigned, by 8, so that they lie around zero. What that adds, 128 or 8 times
the sum of four digits, is known before any weight is: the sums begin with its negative (`_corrections`). For int4 there
remains ``(minimum + 8 scale) · sum of the input``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import prange

from npllama.dtypes import PACKINGS, Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.digits import GROUP_BYTES, pack
from npllama.kernels.jit import compiled

#: Rows of a matrix that a thread takes at a time.
_BLOCK = 8
#: Rows that share what is loaded of the input.
_ROWS = 4


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, for several weights of one dtype that share N.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        int8 or int4.
    outputs : sequence of ndarray of shape (T, M), float32

    Notes
    -----
    A number of the output is one sum in one order, whatever the threads and the other tokens.
    """
    digits, steps, sums = pack(x, 1)
    is_int4 = PACKINGS[weights[0].dtype].has_minima
    corrections = _corrections(digits, 8 if is_int4 else 128)
    product = _multiply_int4 if is_int4 else _multiply_int8
    product(jobs_of(weights, outputs, _BLOCK), digits, corrections, steps, sums, x.shape[0], n_groups(x.shape[1]))


@compiled()
def _corrections(digits: Array, offset: int) -> Array:
    """Return ``-offset`` times the sums of four digits, two rows of 16 for each group: of h, and of 256 m + l."""
    by_four = digits.reshape(-1, 3, 16, 4)
    sums = np.empty((by_four.shape[0], 2, 16), np.int32)
    for g in range(by_four.shape[0]):
        for lane in range(16):
            high = middle = low = np.int32(0)
            for j in range(4):
                high += np.int32(by_four[g, 0, lane, j])
                middle += np.int32(by_four[g, 1, lane, j])
                low += np.int32(by_four[g, 2, lane, j])
            sums[g, 0, lane] = -offset * high
            sums[g, 1, lane] = -offset * (256 * middle + low)
    return sums


def jobs_of(weights: Sequence[Tensor], outputs: Sequence[Array], block: int) -> Array:
    """Return a row for each matrix: addresses of data, scales, minima and output, M, and the number of its first block.

    Minima that do not exist have the address of the scales.
    """
    data, scales = (tuple(part) for part in zip(*((weight.data, weight.scales) for weight in weights), strict=True))
    minima = tuple(weight.scales if weight.minima is None else weight.minima for weight in weights)
    jobs: Array = _jobs(data, scales, minima, tuple(outputs), block)
    return jobs


@compiled()
def _jobs(data: Any, scales: Any, minima: Any, outputs: Any, block: int) -> Array:
    jobs = np.empty((len(data), 6), np.int64)
    blocks = 0
    for i in range(len(data)):
        jobs[i, 0], jobs[i, 1] = data[i].ctypes.data, scales[i].ctypes.data
        jobs[i, 2], jobs[i, 3] = minima[i].ctypes.data, outputs[i].ctypes.data
        jobs[i, 4], jobs[i, 5] = outputs[i].shape[1], blocks
        blocks += (outputs[i].shape[1] + block - 1) // block
    return jobs


@compiled(parallel=True)
def _multiply_int8(
    jobs: Array, digits: Array, corrections: Array, steps: Array, sums: Array, n_new: int, groups: int
) -> None:
    for block in prange(jobs[-1, 5] + (jobs[-1, 4] + _BLOCK - 1) // _BLOCK):
        data, scales, _, output, m, first = job_of(jobs, block, _BLOCK)
        factors = np.empty((_ROWS, groups), np.float32)
        for row in range(first, min(first + _BLOCK, m), _ROWS):
            count = min(_ROWS, m - row)
            for t in range(n_new):
                for i in range(_ROWS):
                    _factors(scales, min(row + i, m - 1), steps, t, groups, factors[i])
                totals = _rows_int8(data + 64 * groups * row, digits, corrections, t * groups, factors, count)
                for i in range(count):
                    simd.store_one(output, 4 * (t * m + row + i), totals[i])


@compiled(parallel=True)
def _multiply_int4(
    jobs: Array, digits: Array, corrections: Array, steps: Array, sums: Array, n_new: int, groups: int
) -> None:
    for block in prange(jobs[-1, 5] + (jobs[-1, 4] + _BLOCK - 1) // _BLOCK):
        data, scales, minima, output, m, first = job_of(jobs, block, _BLOCK)
        factors = np.empty((_ROWS, groups), np.float32)
        for row in range(first, min(first + _BLOCK, m), _ROWS):
            count = min(_ROWS, m - row)
            for t in range(n_new):
                for i in range(_ROWS):
                    _factors(scales, min(row + i, m - 1), steps, t, groups, factors[i])
                totals = _rows_int4(data + 32 * groups * row, digits, corrections, t * groups, factors, count)
                for i in range(count):
                    total = totals[i] + _middles(scales, minima, row + i, sums, t, groups)
                    simd.store_one(output, 4 * (t * m + row + i), total)


@compiled(inline=True)
def job_of(jobs: Array, block: int, size: int) -> Any:
    """Return the addresses of data, scales, minima and output of a block's matrix, its M, and the block's first row."""
    i = 0
    while i + 1 < jobs.shape[0] and jobs[i + 1, 5] <= block:
        i += 1
    return jobs[i, 0], jobs[i, 1], jobs[i, 2], jobs[i, 3], jobs[i, 4], size * (block - jobs[i, 5])


@compiled(inline=True)
def _factors(scales: int, row: int, steps: Array, t: int, groups: int, factors: Array) -> None:
    """Fill ``factors`` with ``scale · step`` of each group."""
    whole = groups // 16 * 16
    for g in range(0, whole, 16):
        scale = simd.load_bfloat16(scales, 2 * (row * groups + g))
        simd.store(factors, g, simd.multiply(scale, simd.load(steps, t * groups + g)))
    for g in range(whole, groups):
        factors[g] = simd.load_one_bfloat16(scales, 2 * (row * groups + g)) * steps[t * groups + g]


@compiled(inline=True)
def _middles(scales: int, minima: int, row: int, sums: Array, t: int, groups: int) -> Any:
    """Return the sum over the groups of ``(minimum + 8 scale) · sum of the input``."""
    total, eight = simd.broadcast(np.float32(0)), simd.broadcast(np.float32(8))
    whole = groups // 16 * 16
    for g in range(0, whole, 16):
        place = 2 * (row * groups + g)
        middle = simd.fused_multiply_add(simd.load_bfloat16(scales, place), eight, simd.load_bfloat16(minima, place))
        total = simd.fused_multiply_add(middle, simd.load(sums, t * groups + g), total)
    rest = np.float32(0)
    for g in range(whole, groups):
        place = 2 * (row * groups + g)
        middle = simd.load_one_bfloat16(minima, place) + np.float32(8) * simd.load_one_bfloat16(scales, place)
        rest += middle * sums[t * groups + g]
    result: np.float32 = simd.add_lanes(total) + rest
    return result


@compiled(inline=True)
def _rows_int8(
    data: int, digits: Array, corrections: Array, first: int, factors: Array, count: int
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return ``sum(scale · step · sum(q · integer))`` over the groups of each of four rows.

    The two high digits share an accumulator: four products of 8 and 16 bits fit 32 bits, of 8 and 24 they do not. Where
    fewer rows are left, the last one stands in for those that are missing.
    """
    groups = factors.shape[1]
    row = 64 * groups
    b, c, d = row * min(1, count - 1), row * min(2, count - 1), row * min(3, count - 1)
    upper0 = upper1 = upper2 = upper3 = lower0 = lower1 = lower2 = lower3 = simd.broadcast(np.float32(0))
    for g in range(groups):
        place, at = GROUP_BYTES * (first + g), 32 * (first + g)
        high, middle, low = simd.load(digits, place), simd.load(digits, place + 64), simd.load(digits, place + 128)
        start, begin = simd.load(corrections, at), simd.load(corrections, at + 16)
        for line in range(4):  # of the next four rows: the processor itself looks no further than a page of memory
            simd.prefetch(data, 4 * row + 64 * (4 * g + line))
        upper0, lower0 = _add_int8(data + 64 * g, high, middle, low, start, begin, factors[0, g], upper0, lower0)
        upper1, lower1 = _add_int8(data + b + 64 * g, high, middle, low, start, begin, factors[1, g], upper1, lower1)
        upper2, lower2 = _add_int8(data + c + 64 * g, high, middle, low, start, begin, factors[2, g], upper2, lower2)
        upper3, lower3 = _add_int8(data + d + 64 * g, high, middle, low, start, begin, factors[3, g], upper3, lower3)
    base = simd.broadcast(np.float32(256))
    return (
        simd.add_lanes(simd.fused_multiply_add(upper0, base, lower0)),
        simd.add_lanes(simd.fused_multiply_add(upper1, base, lower1)),
        simd.add_lanes(simd.fused_multiply_add(upper2, base, lower2)),
        simd.add_lanes(simd.fused_multiply_add(upper3, base, lower3)),
    )


@compiled(inline=True)
def _add_int8(
    data: int, high: Any, middle: Any, low: Any, start: Any, begin: Any, factor: np.float32, upper: Any, lower: Any
) -> Any:
    """Add a group of one row to its sums."""
    weights, scale = simd.flip_signs(simd.load_bytes(data, 0)), simd.broadcast(factor)
    two = simd.dot_bytes(simd.shift_left(simd.dot_bytes(start, weights, high), 8), weights, middle)
    one = simd.dot_bytes(begin, weights, low)
    return (
        simd.fused_multiply_add(simd.to_float(two), scale, upper),
        simd.fused_multiply_add(simd.to_float(one), scale, lower),
    )


@compiled(inline=True)
def _rows_int4(
    data: int, digits: Array, corrections: Array, first: int, factors: Array, count: int
) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """Return ``sum(scale · step · sum((q - 8) · integer))`` over the groups of each of four rows, or fewer."""
    groups = factors.shape[1]
    row = 32 * groups
    b, c, d = row * min(1, count - 1), row * min(2, count - 1), row * min(3, count - 1)
    total0 = total1 = total2 = total3 = simd.broadcast(np.float32(0))
    for g in range(groups):
        place, at = GROUP_BYTES * (first + g), 32 * (first + g)
        high, middle, low = simd.load(digits, place), simd.load(digits, place + 64), simd.load(digits, place + 128)
        start, begin = simd.load(corrections, at), simd.load(corrections, at + 16)
        for line in range(2):  # of the next four rows
            simd.prefetch(data, 4 * row + 64 * (2 * g + line))
        total0 = _add_int4(data + 32 * g, high, middle, low, start, begin, factors[0, g], total0)
        total1 = _add_int4(data + b + 32 * g, high, middle, low, start, begin, factors[1, g], total1)
        total2 = _add_int4(data + c + 32 * g, high, middle, low, start, begin, factors[2, g], total2)
        total3 = _add_int4(data + d + 32 * g, high, middle, low, start, begin, factors[3, g], total3)
    return simd.add_lanes(total0), simd.add_lanes(total1), simd.add_lanes(total2), simd.add_lanes(total3)


@compiled(inline=True)
def _add_int4(
    data: int, high: Any, middle: Any, low: Any, start: Any, begin: Any, factor: np.float32, total: Any
) -> Any:
    """Add a group of one row to its sum: all three digits in one accumulator."""
    weights = simd.load_nibbles(data, 0)
    sums = simd.dot_bytes(simd.shift_left(simd.dot_bytes(start, weights, high), 8), weights, middle)
    sums = simd.dot_bytes(simd.add(simd.shift_left(sums, 8), begin), weights, low)
    return simd.fused_multiply_add(simd.to_float(sums), simd.broadcast(factor), total)
