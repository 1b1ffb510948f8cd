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
FEW = 16

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
        T is 16 at most.
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
    groups, n_new = (x.shape[1] + GROUP - 1) // GROUP, x.shape[0]
    tokens = aligned(tokens_bytes(groups, n_new), np.empty(0, np.int8))
    round_tokens(x, is_int4, tokens)
    room = np.empty(products_size(BLOCK), np.float32)
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        rows = rows_at(Rows(job[DATA], job[SCALES], job[MINIMA]), first, groups, is_int4)
        n_rows, ahead = min(BLOCK, job[ROWS] - first), rows_at(rows, BLOCK, groups, is_int4)
        output, token = job[OUTPUT] + 4 * first, 4 * job[ROWS]
        multiply_block(rows, n_rows, groups, is_int4, tokens, n_new, ahead, room, output, token)


@compiled()
def tokens_bytes(groups: int, n_new: int) -> int:
    """Return how many bytes so many tokens take: whole cache lines."""
    count = (n_new - 1) // _EIGHT * _EIGHT
    return (count + tokens_of(n_new - count)) * ((groups + 1) // 2 * 2 * GROUP + 3 * _pitch(groups))


@compiled(inline=True)
def products_size(n_rows: int) -> int:
    """Return the numbers of room that `multiply_block` needs for so many rows."""
    return n_rows * _EIGHT


@compiled(inline=True)
def _pitch(groups: int) -> int:
    """Return the bytes of a number for each group: a whole number of vectors."""
    return (groups + _LANES - 1) // _LANES * _LANES * 4


@compiled()
def round_tokens(x: Array, is_int4: bool, room: Array) -> None:
    """Round tokens x (T, N) to integers, in parties of eight, to as many int8 of room as `tokens_bytes` says."""
    groups = (x.shape[1] + GROUP - 1) // GROUP
    for first in range(0, x.shape[0], _EIGHT):
        party = x[first : first + _EIGHT]
        start = tokens_bytes(groups, first)
        _round_party(party, is_int4, room[start : start + tokens_bytes(groups, len(party))])


@compiled()
def _round_party(x: Array, is_int4: bool, room: Array) -> None:
    """Do `round_tokens` to up to eight tokens."""
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


@compiled()
def _tokens_at(address: int, groups: int, count: int) -> Tokens:
    """Return where the parts of a party are that lies at an address."""
    pitch, begins = _pitch(groups), address + (groups + 1) // 2 * 2 * GROUP * count
    return Tokens(address, begins, begins + count * pitch, begins + 2 * count * pitch, pitch)


@compiled()
def multiply_block(
    rows: Rows,
    n_rows: int,
    groups: int,
    is_int4: bool,
    tokens: Array,
    n_new: int,
    ahead: Rows,
    room: Array,
    output: int,
    token_bytes: int,
) -> None:
    """Write the products of some rows with all tokens to an address, as float32.

    Parameters
    ----------
    rows : Rows
        Where the first row is.
    n_rows, groups : int
        Rows, and groups of 64 numbers that a row has.
    is_int4 : bool
        The weights are int4, not int8.
    tokens : ndarray, int8
        From `round_tokens`.
    n_new : int
        T.
    ahead : Rows
        As many rows from there are fetched from memory meanwhile: the processor by itself looks no further than a page.
    room : ndarray, float32
        As long as `products_size` says.
    output, token_bytes : int
        Where to, and bytes from one token's numbers to the next one's.
    """
    products = np.int64(room.ctypes.data)
    for first in range(0, n_new, _EIGHT):
        party = min(_EIGHT, n_new - first)
        count = tokens_of(party)
        where = _tokens_at(np.int64(tokens.ctypes.data) + tokens_bytes(groups, first), groups, count)
        _multiply_rows(rows, n_rows, groups, is_int4, where, count, ahead, products)
        for t in range(party):
            for r in range(n_rows):
                simd.store_one(output + (first + t) * token_bytes, 4 * r, room[r * count + t])
        ahead = rows  # once is enough


@compiled()
def _multiply_rows(
    weights: Rows, n_rows: int, groups: int, is_int4: bool, tokens: Tokens, count: int, ahead: Rows, output: int
) -> None:
    """Write the products of some rows with a party to an address, those of a row one after the other."""
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
    """Do `_multiply_rows` to one row and literally so many tokens."""
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
