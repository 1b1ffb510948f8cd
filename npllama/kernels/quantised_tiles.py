"""Products with int8 and int4 weights in the processor's matrix unit (Intel AMX): for two tokens or more.

The unit multiplies 16 rows of 64 bytes of weights, a group each, with 64 by 16 digits of the input (see
`npllama.kernels.digits`) and sums exactly, as int32. The rows of int8 weights are loaded as they lie in the memory map;
int4 is unpacked to bytes for all tokens at once. A **block** is 32 rows, a **panel** 16 tokens.

The three sums of a group, one for each digit, become one float32, which is multiplied by the token's step and the row's
scale and added to the number of the output::

    y += scale · (step · (65536 H + 256 M + L)) [+ minimum · sum of the input]

That takes vector instructions for as long as the unit needs for its products. So while the unit works on a group, the
sums of the one before are added: rows of one between tiles of the other.

A number of the output is one sum in one order, group by group, whatever the threads, the other rows and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import prange

from npllama.dtypes import PACKINGS, Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.digits import GROUP_BYTES, pack
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import count_blocks, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.subroutines import subroutine
from npllama.kernels.tiles import tile_shapes

_TOKENS = 16
_BLOCK = 32
#: Bytes of digits that are used again for every block of weights: half of a second-level cache.
_PASS_BYTES = 1 << 20
#: Panels of one pass over the weights. With more, fewer groups would fit, and partial sums be read again more often.
_PASS_PANELS = 8


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, for several weights of one dtype that share N.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        int8 or int4. M may differ, and is 32 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    columns = min(len(x), _TOKENS)
    jobs, shapes, groups = jobs_of(weights, outputs, _BLOCK), _shapes(columns), n_groups(x.shape[1])
    is_int4 = PACKINGS[weights[0].dtype].has_minima
    rows = _PASS_PANELS * columns
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        digits, steps, sums = pack(part, columns)
        panels = -(-len(part) // columns)
        count = min(groups, max(1, _PASS_BYTES // (panels * columns * GROUP_BYTES)))
        partial = aligned(count_blocks(jobs, _BLOCK) * panels * _BLOCK * _TOKENS, steps)
        for start in range(0, groups, count):
            stop = min(start + count, groups)
            _multiply(
                jobs, shapes, digits, steps, sums, partial, is_int4, len(part), first, columns, groups, start, stop
            )


@cache
def _shapes(columns: int) -> Array:
    """Return the shapes of the tiles: 0 and 1 weights, 2 and 3 digits, 4 to 7 sums."""
    return tile_shapes(*[64] * 2, *[4 * columns] * 6)


@compiled(parallel=True)
def _multiply(
    jobs: Array,
    shapes: Array,
    digits: Array,
    steps: Array,
    sums: Array,
    partial: Array,
    is_int4: bool,
    n_new: int,
    token: int,
    columns: int,
    groups: int,
    start: int,
    stop: int,
) -> None:
    """Add the groups from ``start`` to ``stop`` to every block's partial sums; deliver these behind the last group."""
    for block in prange(count_blocks(jobs, _BLOCK)):
        _multiply_block(
            jobs, shapes, digits, steps, sums, partial, is_int4, n_new, token, columns, groups, start, stop, block
        )


@subroutine(counted=True)
def _multiply_block(
    jobs: Array,
    shapes: Array,
    digits: Array,
    steps: Array,
    sums: Array,
    partial: Array,
    is_int4: bool,
    n_new: int,
    token: int,
    columns: int,
    groups: int,
    start: int,
    stop: int,
    block: int,
) -> None:
    job, first = job_of(jobs, block, _BLOCK)
    data, output, m = job.data, job.output, job.rows
    first = min(first, m - _BLOCK)
    factors = _floats(job.scales, first, groups, start, stop)
    offsets = _floats(job.minima, first, groups, start, stop) if is_int4 else factors
    weights, stride = data + 64 * (first * groups + start), 64 * groups
    unpacked = aligned(32 * 64 * (stop - start) if is_int4 else 64, digits)
    if is_int4:
        stride = 64 * (stop - start)
        _unpack(data + 32 * (first * groups + start), 32 * groups, unpacked, stride)
        weights = np.int64(unpacked.ctypes.data)
    integers = aligned(2 * 6 * 256, np.empty(0, np.int32))
    simd.tile_configure(shapes)
    panels = (n_new + columns - 1) // columns
    size = 32 if is_int4 else 64
    ahead, pitch = data + size * ((first + 32) * groups + start), size * groups
    for panel in range(panels):
        at = (block * panels + panel) * _BLOCK * _TOKENS
        if start == 0:
            partial[at : at + _BLOCK * _TOKENS] = 0
        place, begin = (panel * groups + start) * columns, 32 * panel // panels
        _add_panel(
            weights, stride, digits, steps, sums, place, columns, stop - start, integers, factors, offsets, is_int4,
            partial, at, ahead + begin * pitch, pitch, size, 32 * (panel + 1) // panels - begin,
        )  # fmt: skip
        if stop == groups:
            done = panel * columns
            _deliver(partial, at, output + 4 * ((token + done) * m + first), m, min(columns, n_new - done))
    simd.tile_release()
    unpacked[0] = 0  # Numba frees an array behind its last use, and an address is none


@subroutine(counted=True)
def _floats(scales: int, first: int, groups: int, start: int, stop: int) -> Array:
    """Return the bfloat16 scales of 32 rows as float32: (32, stop - start)."""
    floats = np.empty((32, stop - start), np.float32)
    whole = (stop - start) // 16 * 16
    for row in range(32):
        place = (first + row) * groups + start
        for g in range(0, whole, 16):
            simd.store(floats, row * (stop - start) + g, simd.load_bfloat16(scales, 2 * (place + g)))
        for g in range(whole, stop - start):
            floats[row, g] = simd.load_one_bfloat16(scales, 2 * (place + g))
    return floats


@subroutine()
def _unpack(data: int, pitch: int, unpacked: Array, stride: int) -> None:
    """Unpack 32 rows of int4 to bytes."""
    for row in range(32):
        for g in range(stride // 64):
            simd.store(unpacked, row * stride + 64 * g, simd.load_nibbles(data, row * pitch + 32 * g))


@subroutine()
def _add_panel(
    weights: int,
    stride: int,
    digits: Array,
    steps: Array,
    sums: Array,
    place: int,
    columns: int,
    count: int,
    integers: Array,
    factors: Array,
    offsets: Array,
    is_int4: bool,
    partial: Array,
    at: int,
    ahead: int,
    pitch: int,
    size: int,
    rows: int,
) -> None:
    """Add ``count`` groups to a panel's 32 rows of 16 sums in ``partial``.

    ``integers`` has two places for the sums of a group: the unit fills one while the other is added up. Meanwhile
    ``rows`` of the next block are fetched from memory: tiles are loaded by columns, which no processor foresees.
    """
    for g in range(count + 1):
        for row in range(rows):
            simd.prefetch(ahead, row * pitch + g * size)
        here, there = 1536 * (g % 2), 1536 * ((g + 1) % 2)
        before = max(g - 1, 0)
        column = place + before * columns
        step, total = simd.load(steps, column), simd.load(sums, column)
        if g < count:
            tile = GROUP_BYTES * (place + g * columns)
            simd.tile_load(0, weights, 64 * g, stride)
            simd.tile_load(1, weights, 64 * g + 16 * stride, stride)
            simd.tile_zero(4)
            simd.tile_zero(5)
            simd.tile_load(2, digits, tile, 4 * columns)
            simd.tile_dot_int8(4, 0, 2)
            simd.tile_dot_int8(5, 1, 2)
        if g > 0:
            _add_rows(integers, there, step, total, before, factors, offsets, is_int4, partial, at, 0, 10)
        if g < count:
            simd.tile_store(4, integers, here, 64)
            simd.tile_store(5, integers, here + 256, 64)
            simd.tile_zero(6)
            simd.tile_zero(7)
            simd.tile_load(3, digits, tile + 64 * columns, 4 * columns)
            simd.tile_dot_int8(6, 0, 3)
            simd.tile_dot_int8(7, 1, 3)
        if g > 0:
            _add_rows(integers, there, step, total, before, factors, offsets, is_int4, partial, at, 10, 20)
        if g < count:
            simd.tile_store(6, integers, here + 512, 64)
            simd.tile_store(7, integers, here + 768, 64)
            simd.tile_zero(4)
            simd.tile_zero(5)
            simd.tile_load(2, digits, tile + 128 * columns, 4 * columns)
            simd.tile_dot_int8(4, 0, 2)
            simd.tile_dot_int8(5, 1, 2)
        if g > 0:
            _add_rows(integers, there, step, total, before, factors, offsets, is_int4, partial, at, 20, 32)
        if g < count:
            simd.tile_store(4, integers, here + 1024, 64)
            simd.tile_store(5, integers, here + 1280, 64)


@subroutine(inline=True)
def _add_rows(
    integers: Array,
    there: int,
    step: Any,
    total: Any,
    group: int,
    factors: Array,
    offsets: Array,
    is_int4: bool,
    partial: Array,
    at: int,
    first: int,
    last: int,
) -> None:
    """Add one group to the rows from ``first`` to ``last``."""
    base = simd.broadcast(np.float32(256))
    for row in range(first, last):
        place = there + 16 * row
        high, middle = simd.to_float(simd.load(integers, place)), simd.to_float(simd.load(integers, place + 512))
        number = simd.fused_multiply_add(high, base, middle)
        number = simd.fused_multiply_add(number, base, simd.to_float(simd.load(integers, place + 1024)))
        number = simd.multiply(number, step)
        so_far = simd.load(partial, at + 16 * row)
        if is_int4:
            so_far = simd.fused_multiply_add(total, simd.broadcast(offsets[row, group]), so_far)
        so_far = simd.fused_multiply_add(number, simd.broadcast(factors[row, group]), so_far)
        simd.store(partial, at + 16 * row, so_far)


@subroutine()
def _deliver(partial: Array, at: int, output: int, m: int, count: int) -> None:
    """Write the first ``count`` columns of 32 rows of 16 as rows of an output of M columns."""
    if count == 16:
        simd.transpose(partial, at, 64, output, 0, 4 * m)
        simd.transpose(partial, at + 256, 64, output, 64, 4 * m)
    else:
        for t in range(count):
            for row in range(32):
                simd.store_one(output, 4 * (t * m + row), partial[at + 16 * row + t])
