"""Products of one token, or a few, with int8 and int4 weights in vector registers.

Tokens become integers of three digits, which is as exact as float32 arithmetic (`npllama.kernels.byte_tokens`). A
**line** of weights, 64 bytes, is a group of int8 or two groups of int4, unpacked to low and high halves. With each
digit of a token it takes an instruction or two, 64 or 128 multiplications whose sums are exact (Intel VNNI); a float32
multiplication by ``scale · step`` then adds the line to the row's sum. Nothing is widened to float32, which is what
lets a core keep up with its memory. Only where registers are narrow, and lack that instruction, both become float32
(`npllama.kernels.simd_bytes`).

The instruction wants one operand unsigned. int8 weights are so, taken 128 larger than they are, for the highest digit;
for the others the digits are. int4 is stored unsigned. What belongs to no single weight is known before any is: the
sum of a line begins, lane by lane and exactly, with -128 times the highest digits, or with -8 times the integers. Of
int4, which then lies around zero, there remains ``(minimum + 8 scale) · sum of the token's group``, summed over the
groups, with which the row's sum begins.

Two rows (with narrow registers one), a **band**, meet a party of tokens at once (`npllama.kernels.simd_bytes`), so that
a line which was loaded is multiplied several times. Sixteen rows are a **block**. A party passes by it in **chunks**
that stay in the first-level cache; between chunks the sums wait in memory. Meanwhile what comes next is fetched.

A number of the output is one sum in one order, whatever the threads, the other rows and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

from npllama.dtypes import GROUP, PACKINGS, Array, Tensor, n_groups
from npllama.kernels import simd
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.byte_tokens import PARTY, Tokens, line_bytes, party_at, take_apart, tokens_bytes
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import deal_out, job_of, jobs_of
from npllama.kernels.llvm import WIDE
from npllama.kernels.memory import aligned
from npllama.kernels.simd_bytes import inner_bytes, inner_nibbles
from npllama.kernels.simd_quantised import load_first_bfloat16, load_floats, load_half
from npllama.kernels.simd_sums import add_products_at, no_sums, store_sums, store_totals, sums_at
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_rows import tokens_of

#: Tokens at most.
FEW = 16
#: Rows of a matrix that are a unit of work.
BLOCK = 16

_LANES = 16
_LINE = 64
#: Bytes of a party in a chunk.
_CHUNK = 1 << 14
#: How many bytes before its turn a line is fetched where a row is one chunk: two pages. The first-level cache has room
#: for them beside a party; rows that came from the second took up to a tenth longer.
EARLY = 1 << 13
#: Rows of a band.
_BAND = 2 if WIDE else 1
#: Numbers of tokens that rows are multiplied with, see `npllama.kernels.vector_rows.tokens_of`; sums of a band then.
_ONE, _FOUR, _EIGHT = 1, 4, 8
_SUMS_OF_ONE, _SUMS_OF_FOUR, _SUMS_OF_EIGHT = _BAND, 4 * _BAND, 8 * _BAND


class Rows(NamedTuple):
    """Addresses of the first of some rows: of integers, scales, and minima, if there are any."""

    data: int
    scales: int
    minima: int


class Chunk(NamedTuple):
    """What of sixteen rows is multiplied by a party next, and what else that takes.

    Attributes
    ----------
    rows, ahead : Rows
        The rows; as many that are multiplied next.
    groups, first, n_here : int
        Groups of a row, the first one of the chunk, and how many the chunk has.
    last : int
        Address of a line for each row, one after the other, that is multiplied behind the chunk's; 0 where there is
        none.
    x : int
        What the party is to the chunk's first line.
    sums, factors : int
        Addresses of 16 float32 for each row and token, and of room for ``scale · step`` of a band.
    coming, coming_row, coming_line : int
        What is fetched meanwhile: where, and bytes from one row of a band, and one line, to the next.
    comes_soon : bool
        It is so little that it goes to the first-level cache.
    """

    rows: Rows
    ahead: Rows
    groups: int
    first: int
    n_here: int
    last: int
    x: int
    sums: int
    factors: int
    coming: int
    coming_row: int
    coming_line: int
    comes_soon: bool


@subroutine(inline=True)
def rows_at(weights: Rows, row: int, groups: int, is_int4: bool) -> Rows:
    """Return the rows from ``row`` on."""
    data, scales = GROUP // 2 * groups if is_int4 else GROUP * groups, 2 * groups
    return Rows(weights.data + data * row, weights.scales + scales * row, weights.minima + scales * row)


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, for weights of one dtype that share N.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is 16 at most.
    weights : sequence of Tensor of shape (M, N)
        All int8, or all int4. M may differ, and is 16 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    is_int4, groups = PACKINGS[weights[0].dtype].has_minima, n_groups(x.shape[1])
    tokens = aligned(tokens_bytes(groups, is_int4, len(x)), np.empty(0, np.int8))
    take_apart(np.ascontiguousarray(x), is_int4, tokens)
    arguments = tokens, len(x), groups, is_int4, address_of_block()
    deal_out(arguments, jobs_of(weights, outputs, BLOCK), BLOCK, numba.get_num_threads(), _address_of_work())


@cache
def _address_of_work() -> int:
    """Return the address of `_multiply_blocks`."""
    return address_of(_multiply_blocks, (np.empty(1, np.int8), 1, 1, True, 1), np.empty((1, 6), np.int64), 1, 1)


@cache
def address_of_block() -> int:
    """Return the address of `multiply_block`."""
    rows, tokens, room = Rows(1, 1, 1), np.empty(1, np.int8), np.empty(1, np.float32)
    return address_of(multiply_block, rows, 1, True, tokens, 1, rows, room, 1, 1)


@compiled()
def _multiply_blocks(arguments: Any, jobs: Array, start: int, stop: int) -> None:
    """Multiply the blocks from ``start`` to ``stop``. The last block of a matrix ends where the matrix does."""
    tokens, n_new, groups, is_int4, work = arguments
    room = aligned(room_size(groups), np.empty(0, np.float32))
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        row = min(first, job.rows - BLOCK)
        rows = rows_at(Rows(job.data, job.scales, job.minima), row, groups, is_int4)
        ahead, output = rows_at(rows, BLOCK, groups, is_int4), job.output + 4 * row
        call_at(work, (rows, groups, is_int4, tokens, n_new, ahead, room, output, 4 * job.rows))


@subroutine()
def room_size(groups: int) -> int:
    """Return how many numbers `multiply_block` needs for a party's products, sums and factors, and last lines."""
    return BLOCK * (PARTY * (1 + _LANES) + _LANES) + _SUMS_OF_EIGHT * (groups + 2 * _LANES)


@compiled(counted=False)
def multiply_block(
    rows: Rows,
    groups: int,
    is_int4: bool,
    tokens: Array,
    n_new: int,
    ahead: Rows,
    room: Array,
    output: int,
    token_bytes: int,
) -> None:
    """Write the products of sixteen rows with all tokens to an address, as float32.

    Parameters
    ----------
    rows : Rows
        Where the first row is.
    groups : int
        Groups of 64 numbers that a row has.
    is_int4 : bool
        The weights are int4, not int8.
    tokens : ndarray, int8
        From `npllama.kernels.byte_tokens.take_apart`.
    n_new : int
        T.
    ahead : Rows
        What is multiplied next. It is fetched from memory: the processor by itself looks no further than a page.
    room : ndarray, float32
        As long as `room_size` says.
    output, token_bytes : int
        Where to, and bytes from one token's numbers to the next one's.
    """
    last = _last_lines(rows, groups, room) if is_int4 and groups % 2 == 1 else np.int64(0)
    for first in range(0, n_new, PARTY):
        party = min(PARTY, n_new - first)
        count = tokens_of(party)
        where = party_at(np.int64(tokens.ctypes.data), groups, is_int4, first, n_new)
        _multiply_party(rows, groups, is_int4, where, count, last, ahead, room)
        for t in range(party):
            for r in range(BLOCK):
                simd.store_one(output + (first + t) * token_bytes, 4 * r, room[r * count + t])
        ahead = rows  # once is enough


@subroutine()
def _last_lines(rows: Rows, groups: int, room: Array) -> Any:
    """Copy the last group of sixteen rows of int4, half a line, to lines filled up with zeros, and return where.

    There may be no memory behind the last row.
    """
    spare = np.int64(room[room.shape[0] - BLOCK * _LANES :].ctypes.data)
    for r in range(BLOCK):
        row = rows_at(rows, r, groups, True)
        simd.store(spare, r * _LINE, load_half(row.data, GROUP // 2 * (groups - 1)))
    return spare


@subroutine(inline=True)
def _multiply_party(
    rows: Rows,
    groups: int,
    is_int4: bool,
    tokens: Tokens,
    count: int,
    last: int,
    ahead: Rows,
    room: Array,
) -> None:
    """Fill the beginning of the room with the products of sixteen rows and a party, a chunk at a time."""
    pitch, per_line = (GROUP // 2 * groups, 2) if is_int4 else (GROUP * groups, 1)
    whole, x_line = groups // per_line, count * line_bytes(is_int4)
    totals = np.int64(room.ctypes.data)
    sums, factors = totals + 4 * BLOCK * count, totals + 4 * BLOCK * PARTY * (1 + _LANES)
    chunks = max(1, (whole * x_line + _CHUNK - 1) // _CHUNK)
    for chunk in range(chunks):
        start, stop = whole * chunk // chunks, whole * (chunk + 1) // chunks
        is_last = chunk + 1 == chunks
        first, end = start * per_line, groups if is_last else stop * per_line
        coming, coming_row, coming_line = rows.data + EARLY, _LINE, _BAND * _LINE
        if chunks > 1:
            coming = ahead.data if is_last else rows.data + stop * _LINE
            coming_row, coming_line = pitch, _LINE
        elif BLOCK * pitch <= EARLY:
            coming += ahead.data - (rows.data + BLOCK * pitch)
        here = Chunk(
            rows,
            ahead,
            groups,
            first,
            end - first,
            last if is_last else np.int64(0),
            tokens.lines + start * x_line,
            sums,
            factors,
            coming,
            coming_row,
            coming_line,
            chunks == 1,
        )
        _add_chunk(here, tokens, is_int4, count)
    for r in range(0, BLOCK * count, BLOCK):
        store_totals(totals + 4 * r, sums_at(sums + r * _LINE, BLOCK))


@subroutine()
def _add_chunk(chunk: Chunk, tokens: Tokens, is_int4: bool, count: int) -> None:
    """Add a chunk's products to the sums, or begin them with those of the first chunk."""
    if count == _ONE:
        _add(_ONE, _SUMS_OF_ONE, chunk, tokens, is_int4)
    elif count == _FOUR:
        _add(_FOUR, _SUMS_OF_FOUR, chunk, tokens, is_int4)
    else:
        _add(_EIGHT, _SUMS_OF_EIGHT, chunk, tokens, is_int4)


@subroutine(inline=True)
def _add(count: int, n_sums: int, chunk: Chunk, tokens: Tokens, is_int4: bool) -> None:
    """Do `_add_chunk` for literally so many tokens, and sums of a band."""
    pitch = (chunk.n_here + _LANES) // _LANES * _LANES * 4
    data_row, x_line = (GROUP // 2 if is_int4 else GROUP) * chunk.groups, count * line_bytes(is_int4)
    n_lines = chunk.n_here // 2 if is_int4 else chunk.n_here
    for r in range(0, BLOCK, _BAND):
        rows, sums = rows_at(chunk.rows, r, chunk.groups, is_int4), chunk.sums + r * count * _LINE
        tile = no_sums(n_sums)
        if chunk.first > 0:
            tile = sums_at(sums, n_sums)
        else:
            _fetch_scales(rows_at(chunk.ahead, r, chunk.groups, is_int4), chunk.groups, is_int4)
            tile = _begin(n_sums, rows, chunk, tokens, is_int4)
        _weigh(count, rows.scales, chunk, tokens, pitch)
        data = rows.data + (chunk.first // 2 if is_int4 else chunk.first) * _LINE
        coming = chunk.coming + r * data_row
        if is_int4:
            for n in range(n_lines):
                _fetch(chunk, coming, n)
                x, factors = chunk.x + n * x_line, chunk.factors + 8 * n
                tile = inner_nibbles(tile, _BAND, data + _LINE * n, data_row, x, factors, pitch)
            if chunk.last > 0:
                _fetch(chunk, coming, n_lines)
                x, factors = chunk.x + n_lines * x_line, chunk.factors + 8 * n_lines
                tile = inner_nibbles(tile, _BAND, chunk.last + r * _LINE, _LINE, x, factors, pitch)
        else:
            for n in range(n_lines):
                _fetch(chunk, coming, n)
                x, factors = chunk.x + n * x_line, chunk.factors + 4 * n
                tile = inner_bytes(tile, _BAND, data + _LINE * n, data_row, x, factors, pitch)
        store_sums(sums, tile)


@subroutine(inline=True)
def _fetch(chunk: Chunk, coming: int, line: int) -> None:
    """Fetch a line of each row of the band that comes."""
    for row in range(_BAND):
        if chunk.comes_soon:
            simd.prefetch_near(coming + row * chunk.coming_row, line * chunk.coming_line)
        else:
            simd.prefetch(coming + row * chunk.coming_row, line * chunk.coming_line)


@subroutine(inline=True)
def _fetch_scales(rows: Rows, groups: int, is_int4: bool) -> None:
    """Fetch the scales and minima of a band."""
    for place in range(0, _BAND * groups * 2, _LINE):
        simd.prefetch_near(rows.scales, place)
        if is_int4:
            simd.prefetch_near(rows.minima, place)


@subroutine(inline=True)
def _begin(n_sums: int, rows: Rows, chunk: Chunk, tokens: Tokens, is_int4: bool) -> Any:
    """Return what literally so many sums of a band begin with, see above; the room of its factors is free for it."""
    sums = no_sums(n_sums)
    if is_int4:
        for g in range(0, chunk.groups, _LANES):
            for r in range(_BAND):
                row = rows_at(rows, r, chunk.groups, is_int4)
                simd.store(chunk.factors, _LINE * r, _middles(row, g, chunk.groups))
            sums = add_products_at(sums, _BAND, chunk.factors, tokens.sums + 4 * g, tokens.pitch)
    return sums


@subroutine()
def _middles(row: Rows, first: int, groups: int) -> Any:
    """Return ``minimum + 8 scale`` of sixteen groups of a row, zeros where it has no more."""
    scales, eight = _bfloat16_at(row.scales + 2 * first, groups - first), simd.broadcast(np.float32(8))
    return simd.add(simd.multiply(scales, eight), _bfloat16_at(row.minima + 2 * first, groups - first))


@subroutine(inline=True)
def _weigh(count: int, scales: int, chunk: Chunk, tokens: Tokens, pitch: int) -> None:
    """Write ``scale · step`` of a band and literally so many tokens for the groups of a chunk.

    With narrow registers, where a step is 1, those of the first token are all that anybody reads.
    """
    for r in range(_BAND):
        for g in range(0, chunk.n_here, _LANES):
            group = chunk.first + g
            scale = _bfloat16_at(scales + 2 * (chunk.groups * r + group), chunk.groups - group)
            for t in range(count if WIDE else 1):
                step = load_floats(tokens.steps + t * tokens.pitch, 4 * group)
                simd.store(chunk.factors + (r * count + t) * pitch, 4 * g, simd.multiply(scale, step))


@subroutine(inline=True)
def _bfloat16_at(address: int, count: int) -> Any:
    """Return sixteen numbers, the first ``count`` from memory, behind which there may be none, and zeros."""
    return simd.load_bfloat16(address, 0) if count >= _LANES else load_first_bfloat16(address, 0, count)
