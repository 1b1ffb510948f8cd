"""Products of one token, or a few, with int8 and int4 weights, the tokens rounded to int8, in vectors of 512 bits.

See `npllama.rounding` for what the rounding is: 64 numbers, a group, become integers and one step. A group of weights
times a group of a token is one instruction then, whose sums are exact; a multiplication by ``scale · step`` adds it to
the row's sum. The instruction wants the weights unsigned, int8 as 128 more than they are, int4 as they are stored. So a
row's sum begins with what belongs to no single weight::

    int8:  - scale · 128 step · sum(integers)              int4:  minimum · step · sum(integers)

summed over the groups. A row's result is one sum in one order, whatever the rows and tokens computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numba
import numpy as np

from npllama.dtypes import GROUP, PACKINGS, Array, Tensor
from npllama.kernels import simd
from npllama.kernels.by_address import address_of
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import DATA, MINIMA, OUTPUT, ROWS, SCALES, job_of, jobs_of
from npllama.kernels.memory import aligned
from npllama.kernels.quantised_dots import BLOCK, multiply_in_parts
from npllama.kernels.quantised_rows import Rows, rows_at
from npllama.kernels.rounded import int8_step
from npllama.kernels.simd_quantised import (
    high_nibbles,
    load_first_bfloat16,
    load_floats,
    load_half,
    low_nibbles,
)
from npllama.kernels.simd_sums import add_products_at, inner_bytes, inner_nibbles, no_sums, store_totals
from npllama.kernels.vector_rows import tokens_of

#: Tokens at most.
FEW = 8

_LANES = 16
_LINE = 64
#: Numbers of tokens that rows are multiplied with at once, see `npllama.kernels.vector_rows.tokens_of`.
_ONE, _FOUR, _EIGHT = 1, 4, 8


class Tokens(NamedTuple):
    """Addresses of what some tokens are to the rows of one storage type.

    Attributes
    ----------
    lines : int
        int8: of each group a line of each token. int4: of each two groups two lines of each token, the first halves of
        both groups, and the last ones.
    begins, steps, factors : int
        float32, a number for each group: what the sums of a row begin with, before it is multiplied by the scale
        (int8) or minimum; the step; and room for ``scale · step`` of one row.
    pitch : int
        Bytes from a token's numbers of this kind to the next one's.
    """

    lines: int
    begins: int
    steps: int
    factors: int
    pitch: int


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, x rounded to int8, for weights of one dtype.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is 8 at most.
    weights : sequence of Tensor of shape (M, N)
        int8 or int4. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    is_int4 = PACKINGS[weights[0].dtype].has_minima
    multiply_in_parts(x, jobs_of(weights, outputs, BLOCK), is_int4, numba.get_num_threads(), _address_of_work())


@cache
def _address_of_work() -> int:
    """Return the address of `_multiply_blocks`."""
    return address_of(_multiply_blocks, np.empty((1, 1), np.float32), np.empty((1, 6), np.int64), True, 1, 1)


@compiled()
def _multiply_blocks(x: Array, jobs: Array, is_int4: bool, start: int, stop: int) -> None:
    """Multiply the blocks from ``start`` to ``stop`` by all tokens."""
    groups, count = (x.shape[1] + GROUP - 1) // GROUP, tokens_of(x.shape[0])
    room = aligned(tokens_bytes(groups, count), np.empty(0, np.int8))
    tokens = round_tokens(x, is_int4, room)
    block_sums = np.empty((BLOCK, count), np.float32)
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        rows = rows_at(Rows(job[DATA], job[SCALES], job[MINIMA]), first, groups, is_int4)
        n_rows = min(BLOCK, job[ROWS] - first)
        ahead = rows_at(rows, BLOCK, groups, is_int4)
        multiply_rows(rows, n_rows, groups, is_int4, tokens, count, ahead, np.int64(block_sums.ctypes.data))
        for t in range(x.shape[0]):
            for r in range(n_rows):
                simd.store_one(job[OUTPUT] + 4 * (t * job[ROWS] + first), 4 * r, block_sums[r, t])
    room[0] = 0  # Numba frees an array behind its last use, and an address is none


@compiled()
def tokens_bytes(groups: int, count: int) -> int:
    """Return how many bytes so many tokens take: whole cache lines."""
    return count * ((groups + 1) // 2 * 2 * GROUP + 3 * _pitch(groups))


@compiled(inline=True)
def _pitch(groups: int) -> int:
    """Return the bytes of a number for each group: a whole number of vectors."""
    return (groups + _LANES - 1) // _LANES * _LANES * 4


@compiled()
def round_tokens(x: Array, is_int4: bool, room: Array) -> Tokens:
    """Round tokens x (T, N) to integers in ``room``, as many int8 as `tokens_bytes` says; return where they are."""
    groups, count = (x.shape[1] + GROUP - 1) // GROUP, tokens_of(x.shape[0])
    pitch, size = _pitch(groups), (groups + 1) // 2 * 2 * GROUP * count
    numbers = room[size:].view(np.float32).reshape(3, count, pitch // 4)
    integers, group = np.empty(GROUP, np.int8), np.empty(GROUP, np.float32)
    room[:] = 0
    for t in range(x.shape[0]):
        for g in range(groups):
            width, total = min(GROUP, x.shape[1] - GROUP * g), np.int32(0)
            group[:width] = x[t, GROUP * g : GROUP * g + width]
            group[width:] = 0
            step = int8_step(group, integers)
            for j in range(GROUP):
                total += np.int32(integers[j])
            numbers[0, t, g], numbers[1, t, g] = np.float32(total if is_int4 else -128 * total) * step, step
            if is_int4:
                at = (g // 2 * count + t) * 2 * GROUP + g % 2 * GROUP // 2
                room[at : at + GROUP // 2] = integers[: GROUP // 2]
                room[at + GROUP : at + GROUP + GROUP // 2] = integers[GROUP // 2 :]
            else:
                at = (g * count + t) * GROUP
                room[at : at + GROUP] = integers
    return tokens_at(np.int64(room.ctypes.data), groups, count)


@compiled()
def tokens_at(address: int, groups: int, count: int) -> Tokens:
    """Return where the parts of tokens are that lie at an address."""
    pitch, begins = _pitch(groups), address + (groups + 1) // 2 * 2 * GROUP * count
    return Tokens(address, begins, begins + count * pitch, begins + 2 * count * pitch, pitch)


@compiled()
def multiply_rows(
    weights: Rows, n_rows: int, groups: int, is_int4: bool, tokens: Tokens, count: int, ahead: Rows, output: int
) -> None:
    """Write the products of some rows with all tokens to an address, as float32, those of a row one after the other.

    Meanwhile as many rows at ``ahead`` are fetched from memory: the processor by itself looks no further than a page.
    """
    for row in range(n_rows):
        here, there = rows_at(weights, row, groups, is_int4), rows_at(ahead, row, groups, is_int4)
        to = output + 4 * row * count
        if count == _ONE:
            _multiply_row(_ONE, here, groups, is_int4, tokens, there, to)
        elif count == _FOUR:
            _multiply_row(_FOUR, here, groups, is_int4, tokens, there, to)
        else:
            _multiply_row(_EIGHT, here, groups, is_int4, tokens, there, to)


@compiled(inline=True)
def _multiply_row(count: int, row: Rows, groups: int, is_int4: bool, tokens: Tokens, ahead: Rows, output: int) -> None:
    """Do `multiply_rows` to one row and literally so many tokens."""
    sums = no_sums(count)
    for g in range(0, groups, _LANES):
        simd.prefetch(ahead.scales, 2 * g)
        scale = load_first_bfloat16(row.scales, 2 * g, groups - g)
        shared = scale
        if is_int4:
            simd.prefetch(ahead.minima, 2 * g)
            shared = load_first_bfloat16(row.minima, 2 * g, groups - g)
        sums = add_products_at(sums, shared, tokens.begins + 4 * g, tokens.pitch)
        for t in range(count):
            place = t * tokens.pitch + 4 * g
            simd.store(tokens.factors, place, simd.multiply(scale, load_floats(tokens.steps, place)))
    if is_int4:
        for g in range(0, groups, 2):
            at, x = GROUP // 2 * g, tokens.lines + GROUP * g * count
            simd.prefetch(ahead.data, at)
            pair = simd.load_bytes(row.data, at) if g + 1 < groups else load_half(row.data, at)
            low, high = low_nibbles(pair), high_nibbles(pair)
            sums = inner_nibbles(sums, low, high, x, tokens.factors + 4 * g, tokens.pitch)
    else:
        for g in range(groups):
            simd.prefetch(ahead.data, GROUP * g)
            integers = simd.flip_signs(simd.load_bytes(row.data, GROUP * g))
            x = tokens.lines + GROUP * g * count
            sums = inner_bytes(sums, integers, x, tokens.factors + 4 * g, tokens.pitch)
    store_totals(output, sums)
