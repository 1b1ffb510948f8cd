"""Products of many tokens in the processor's matrix unit (Intel AMX), its tiles kept in the caches.

`npllama.kernels.tiles` says how the unit multiplies, and how an input is taken apart for it. Its tiles come as fast as
the cache that they lie in. So the work is cut until everything that is used again is near:

- a **panel** is 16 tokens, a **block** 32 rows of a matrix, a **step** 32 numbers of both. A block and two panels make
  four tiles of sums, the most that the unit holds beside what it multiplies;
- a **chunk** is eight steps. For these the weights of a block are laid out tile by tile (`_lay_out`), so that every
  pair of panels in turn finds them in the first-level cache. Between chunks the sums wait in memory;
- a **field** is a few blocks, multiplied by all panels chunk by chunk. Its sums, and the input of one chunk, stay in
  the second-level cache meanwhile. The fields are shared between threads.

While a block is multiplied, the weights of the next one are fetched from memory.

The input is taken apart into three bfloat16, which loses nothing, or rounded to one. Integer weights are dequantised
as they are laid out, and rounded to bfloat16.

A number of the output is one sum in one order, the same as in `npllama.kernels.tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange

from npllama.dtypes import GROUP, Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS, Job, count_blocks, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.subroutines import subroutine
from npllama.kernels.tiles import _BITS, _BLOCK, _NUMBERS, _PARTS, _SQUARE, _STEP, _TILE, _deliver, _split, tile_shapes

#: Numbers of a tile of weights or input.
_TILE_NUMBERS = _TILE * _STEP
#: Steps of a chunk: a block's weights then take 16 kB of the first-level cache, which leaves room for what passes by.
_CHUNK = 8
#: Blocks of a field, and tokens of a pass, at most: the sums take 512 kB.
_FIELD, _TOKENS = 8, 512

_BFLOAT16, _INT8, _INT4, _ = FORMS.values()


class Task(NamedTuple):
    """What is multiplied.

    Attributes
    ----------
    jobs : ndarray of shape (matrices, 6)
        See `npllama.kernels.jobs`.
    blocks : int
        Of all matrices.
    form : int
        Storage type of the weights, in `npllama.kernels.jobs.FORMS`.
    parts : int
        bfloat16 that the input is taken apart into.
    width, steps : int
        N, and its steps.
    pairs : int
        Of panels, in a pass.
    """

    jobs: Array
    blocks: int
    form: int
    parts: int
    width: int
    steps: int
    pairs: int


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array], parts: int) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        N is 32 at least.
    weights : sequence of Tensor of shape (M, N)
        bfloat16, int8 or int4, all of one kind. M may differ, and is 32 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    parts : {1, 3}
        3 takes the input apart without loss. 1 rounds it to bfloat16.
    """
    n_new, width = x.shape
    steps = -(-width // _STEP) if weights[0].width is None else n_groups(width) * (GROUP // _STEP)
    passes = -(-n_new // _TOKENS)
    pairs = -(-n_new // (passes * 2 * _TILE))
    jobs = jobs_of(weights, outputs, _BLOCK)
    form = FORMS[weights[0].dtype]
    task = Task(jobs, count_blocks(jobs, _BLOCK), form, parts, width, steps, pairs)
    packed = aligned(2 * pairs * steps * parts * _TILE_NUMBERS, _BITS)
    for first in range(0, n_new, 2 * pairs * _TILE):
        _pack(x[first:], packed, task)
        _multiply(task, _shapes(), packed, n_new - first, first, numba.get_num_threads())


@cache
def _shapes() -> Array:
    """Return the shapes of the tiles: 0 to 3 sums, 4 and 5 weights, 6 and 7 input."""
    return tile_shapes(*[64] * 8)


# --- the input --------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _pack(x: Array, packed: Array, task: Task) -> None:
    """Pack the panels of a pass: all of one chunk, then all of the next.

    In a panel each step and part is a tile: 16 rows, each with a pair of numbers of every token.
    """
    parts, width, panels = task.parts, task.width, 2 * task.pairs
    last = width - _STEP if task.form == _BFLOAT16 else width
    for panel in prange(panels):
        token = _TILE * panel
        numbers = np.zeros((_PARTS, _TILE, _STEP), np.uint16)
        edge = np.zeros(_STEP, np.float32)
        for s in range(task.steps):
            # The last step of bfloat16 rows ends where they do. What it shares with the one before counts as zero.
            start, stop = min(_STEP * s, last), min(_STEP * (s + 1), width)
            count = min(_TILE, len(x) - token)
            if start == _STEP * s and stop - start == _STEP:
                for t in range(count):
                    _take_apart(x[token + t, start:stop], parts, numbers[0, t], numbers[1, t], numbers[2, t])
            else:
                fresh = max(0, stop - _STEP * s)
                edge[:] = 0
                for t in range(count):
                    edge[_STEP * s - start : _STEP * s - start + fresh] = x[token + t, stop - fresh : stop]
                    _take_apart(edge, parts, numbers[0, t], numbers[1, t], numbers[2, t])
            chunk = s // _CHUNK * _CHUNK
            tile = parts * (panels * chunk + panel * min(_CHUNK, task.steps - chunk) + s - chunk)
            for part in range(parts):
                simd.transpose(numbers, part * _TILE_NUMBERS, 64, packed, (tile + part) * _TILE_NUMBERS, 64)


@subroutine(inline=True)
def _take_apart(x: Array, parts: int, first: Array, second: Array, third: Array) -> None:
    """Write 32 numbers as three bfloat16 that add up to them, or as the one that is nearest."""
    if parts == 1:
        simd.store(first, 0, simd.to_bfloat16(simd.load(x, 0), simd.load(x, 16)))
    else:
        _split(x, first, second, third)


# --- the weights ------------------------------------------------------------------------------------------------


@subroutine(inline=True)
def _step_bytes(form: int) -> int:
    """Bytes of a row that are a step's."""
    return 2 * _STEP if form == _BFLOAT16 else _STEP if form == _INT8 else _STEP // 2


@subroutine()
def _place(jobs: Array, block: int) -> Any:
    """Return the job of a block's matrix, and the block's first row: the last block ends where the matrix does."""
    job, row = job_of(jobs, block, _BLOCK)
    return job, min(row, job.rows - _BLOCK)


@subroutine()
def _lay_out(task: Task, job: Job, row: int, step: int, steps: int, laid: Array) -> None:
    """Write so many steps of 32 rows, from ``step`` on, as tiles: of each step that of the upper 16, then the other."""
    for r in range(_BLOCK):
        at = r // _TILE * _TILE_NUMBERS + r % _TILE * _STEP
        if task.form == _BFLOAT16:
            begin = job.data + 2 * (row + r) * task.width
            for s in range(steps):
                column = 2 * min(_STEP * (step + s), task.width - _STEP)
                simd.store(laid, at + 2 * s * _TILE_NUMBERS, simd.load_bytes(begin, column))
            continue
        for s in range(0, steps, 2):
            group = ((row + r) * task.steps + step + s) // 2
            scale = simd.broadcast(simd.load_one_bfloat16(job.scales, 2 * group))
            if task.form == _INT8:
                a, b, c, d = _dequantised_int8(job.data + GROUP * group, scale)
            else:
                minimum = simd.broadcast(simd.load_one_bfloat16(job.minima, 2 * group))
                a, b, c, d = _dequantised_int4(job.data + GROUP // 2 * group, scale, minimum)
            simd.store(laid, at + 2 * s * _TILE_NUMBERS, simd.to_bfloat16(a, b))
            simd.store(laid, at + 2 * (s + 1) * _TILE_NUMBERS, simd.to_bfloat16(c, d))


@subroutine(inline=True)
def _dequantised_int8(data: int, scale: Any) -> Any:
    """Return the 64 numbers of a group: ``scale · q``."""
    return (
        simd.multiply(simd.load_int8(data, 0), scale),
        simd.multiply(simd.load_int8(data, 16), scale),
        simd.multiply(simd.load_int8(data, 32), scale),
        simd.multiply(simd.load_int8(data, 48), scale),
    )


@subroutine(inline=True)
def _dequantised_int4(data: int, scale: Any, minimum: Any) -> Any:
    """Return the 64 numbers of a group: ``scale · q + minimum``."""
    return (
        simd.fused_multiply_add(simd.load_low_nibbles(data, 0), scale, minimum),
        simd.fused_multiply_add(simd.load_low_nibbles(data, 16), scale, minimum),
        simd.fused_multiply_add(simd.load_high_nibbles(data, 0), scale, minimum),
        simd.fused_multiply_add(simd.load_high_nibbles(data, 16), scale, minimum),
    )


# --- products ---------------------------------------------------------------------------------------------------


@compiled(parallel=True)
def _multiply(task: Task, shapes: Array, packed: Array, n_new: int, first: int, n_threads: int) -> None:
    """Multiply every block by the packed panels of the tokens from ``first`` on, of which there are ``n_new``."""
    rounds = (task.blocks + _FIELD * n_threads - 1) // (_FIELD * n_threads)
    fields = min(task.blocks, rounds * n_threads)
    for thread in prange(n_threads):
        sums = aligned((task.blocks + fields - 1) // fields * task.pairs * 4 * _SQUARE, _NUMBERS)
        laid = aligned(_CHUNK * 2 * _TILE_NUMBERS, packed)
        simd.tile_configure(shapes)
        for field in range(thread * fields // n_threads, (thread + 1) * fields // n_threads):
            begin, end = field * task.blocks // fields, (field + 1) * task.blocks // fields
            for step in range(0, task.steps, _CHUNK):
                _multiply_chunk(task, step, begin, end, laid, packed, sums)
            _deliver_field(task, begin, end, sums, n_new, first)
        simd.tile_release()


@subroutine()
def _multiply_chunk(task: Task, step: int, begin: int, end: int, laid: Array, packed: Array, sums: Array) -> None:
    """Add to the sums of the blocks from ``begin`` to ``end`` what the chunk that begins with ``step`` comes to."""
    steps, step_bytes = min(_CHUNK, task.steps - step), _step_bytes(task.form)
    pitch = 2 * task.width if task.form == _BFLOAT16 else task.steps * step_bytes
    for block in range(begin, end):
        job, row = _place(task.jobs, block)
        _lay_out(task, job, row, step, steps, laid)
        following, coming = (block + 1, step) if block + 1 < end else (begin, step + steps)
        job, row = _place(task.jobs, following)
        ahead = job.data + row * pitch + coming * step_bytes
        _multiply_block(
            task, step, steps, laid, packed, sums[(block - begin) * task.pairs * 4 * _SQUARE :], ahead, pitch
        )


@subroutine()
def _multiply_block(
    task: Task, step: int, steps: int, laid: Array, packed: Array, sums: Array, ahead: int, pitch: int
) -> None:
    """Add one chunk's products to the sums of a block, four tiles for each pair of panels.

    Meanwhile as many numbers of 32 rows at the address ``ahead``, ``pitch`` bytes apart, are fetched from memory.
    """
    pairs, step_bytes = task.pairs, _step_bytes(task.form)
    size = steps * task.parts * _TILE_NUMBERS
    for pair in range(pairs):
        to = pair * 4 * _SQUARE
        if step == 0:
            simd.tile_zero(0)
            simd.tile_zero(1)
            simd.tile_zero(2)
            simd.tile_zero(3)
        else:
            simd.tile_load(0, sums, to, 64)
            simd.tile_load(1, sums, to + _SQUARE, 64)
            simd.tile_load(2, sums, to + 2 * _SQUARE, 64)
            simd.tile_load(3, sums, to + 3 * _SQUARE, 64)
        at = step * 2 * pairs * task.parts * _TILE_NUMBERS + 2 * pair * size
        for s in range(steps):
            for r in range(_BLOCK * pair // pairs, _BLOCK * (pair + 1) // pairs):
                simd.prefetch(ahead, r * pitch + s * step_bytes)
            if s % 4 == 3:
                # Keeps the way from tiles to memory awake, see `tiles`. What this writes is written over below.
                simd.tile_store(7, sums, to, 64)
            simd.tile_load(4, laid, 2 * s * _TILE_NUMBERS, 64)
            simd.tile_load(5, laid, (2 * s + 1) * _TILE_NUMBERS, 64)
            for _ in range(task.parts):
                simd.tile_load(6, packed, at, 64)
                simd.tile_dot_bfloat16(0, 4, 6)
                simd.tile_dot_bfloat16(1, 5, 6)
                simd.tile_load(7, packed, at + size, 64)
                simd.tile_dot_bfloat16(2, 4, 7)
                simd.tile_dot_bfloat16(3, 5, 7)
                at += _TILE_NUMBERS
        simd.tile_store(0, sums, to, 64)
        simd.tile_store(1, sums, to + _SQUARE, 64)
        simd.tile_store(2, sums, to + 2 * _SQUARE, 64)
        simd.tile_store(3, sums, to + 3 * _SQUARE, 64)


@subroutine(counted=True)
def _deliver_field(task: Task, begin: int, end: int, sums: Array, n_new: int, first: int) -> None:
    """Turn the tiles of rows by tokens, and write them to the outputs: those of one panel one after the other."""
    scratch = aligned(4 * _SQUARE, sums)
    for panel in range(min(2 * task.pairs, (n_new + _TILE - 1) // _TILE)):
        tokens = min(_TILE, n_new - panel * _TILE)
        for block in range(begin, end):
            job, row = _place(task.jobs, block)
            output = job.output + 4 * ((first + panel * _TILE) * job.rows + row)
            at = ((block - begin) * task.pairs * 2 + panel) * 2 * _SQUARE
            if tokens == _TILE:
                _deliver(sums[at:], output, 4 * job.rows, tokens)
            else:
                scratch[: 2 * _SQUARE] = sums[at : at + 2 * _SQUARE]
                _deliver(scratch, output, 4 * job.rows, tokens)
