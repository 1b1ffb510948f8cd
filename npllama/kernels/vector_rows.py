"""Products of one token, or a few, with float32 and bfloat16 weights in vector registers.

A row of a matrix is taken line by line, 64 bytes at a time. A line of float32 is a vector. One of bfloat16 is two: the
lower halves of its words of 32 bits, the numbers with even places, and the upper halves, those with odd ones; each is a
float32 but for zeros. So the tokens lie by lines as well, the even numbers of a line before the odd ones. Where tokens
are rounded to bfloat16, a line of both is pairs of numbers instead. A row times a token is one sum, in sixteen parts:
the lanes of a vector, which are added up at the end.

One token waits for memory alone. Rows go by as they lie there, a single stream, and each line is asked for four pages
early; only a token too wide for the first-level cache is not taken again for every row. That one, and several tokens,
meet a **band** of rows at once (`npllama.kernels.simd_sums`), so that a number which was loaded is multiplied several
times. Sixteen rows are a **block**. Tokens pass by it in **parties** of eight at most, a **chunk** of them after the
other that stays in the first-level cache; between chunks the sums wait in memory. Meanwhile what comes next is fetched:
the rows' next chunk, or the next band. Narrow registers hold no more than halves of the sums of several tokens: there,
a chunk meets the first half of each line of a band, and then the other one (`npllama.kernels.simd_halves`).

A number of the output is one sum in one order, whatever the threads, the other rows and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np

from npllama.dtypes import Array, Tensor
from npllama.kernels import simd
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import deal_out, job_of, jobs_of
from npllama.kernels.llvm import WIDE
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import nearest
from npllama.kernels.simd_halves import halves_at, inner_halves, store_halves
from npllama.kernels.simd_quantised import load_one_byte
from npllama.kernels.simd_sums import inner_lines, no_sums, store_sums, store_totals, sums_at
from npllama.kernels.subroutines import subroutine

#: Tokens at most.
FEW = 16
#: How products are computed: float32 weights; bfloat16 weights in float32; bfloat16 weights and tokens, in pairs.
FLOATS, HALVES, PAIRS = range(3)
#: Rows of a matrix that are a unit of work.
BLOCK = 16

_LANES = 16
_LINE = 64
#: Bytes of a party in a chunk.
_CHUNK = 1 << 14
#: How many bytes before its turn a line is fetched for one token: four pages.
_EARLY = 1 << 14
#: Numbers of one token that leave room in the first-level cache, 16 kB.
_NARROW = 4096
#: Sums of a band of several tokens, and rows of a band: of one token, four and eight.
_SUMS = 16 if WIDE else 8
_ROWS_OF_ONE, _ROWS_OF_FOUR, _ROWS_OF_EIGHT = 8 if WIDE else 4, _SUMS // 4, _SUMS // 8
#: What begins, adds to and ends the sums of a band of several tokens, for the part of a line that they meet at a time.
_PARTS_AT, _INNER, _STORE = (sums_at, inner_lines, store_sums) if WIDE else (halves_at, inner_halves, store_halves)
#: Numbers of tokens that rows are multiplied with.
_ONE, _FOUR, _EIGHT = 1, 4, 8


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array], kind: int) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all matrices in one parallel loop.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is 16 at most.
    weights : sequence of Tensor of shape (M, N)
        All float32, or all bfloat16. M may differ, and is 16 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    kind : int
        FLOATS, HALVES, or PAIRS, which rounds the input to bfloat16.
    """
    tokens = aligned(tokens_size(len(x), x.shape[1], kind), x)
    line_up(np.ascontiguousarray(x), kind, tokens)
    arguments = tokens, len(x), x.shape[1], kind, address_of_block()
    deal_out(arguments, jobs_of(weights, outputs, BLOCK), BLOCK, numba.get_num_threads(), _address_of_work())


@cache
def _address_of_work() -> int:
    """Return the address of `_multiply_blocks`."""
    arguments = np.empty(1, np.float32), 1, 1, 1, 1
    return address_of(_multiply_blocks, arguments, np.empty((1, 6), np.int64), 1, 1)


@cache
def address_of_block() -> int:
    """Return the address of `multiply_block`."""
    numbers = np.empty(1, np.float32)
    return address_of(multiply_block, 1, 1, 1, numbers, 1, 1, 1, numbers, 1, 1)


@subroutine()
def tokens_of(n_new: int) -> int:
    """Return with how many tokens rows are multiplied where a party has ``n_new``: the others are zeros."""
    return _ONE if n_new == 1 else _FOUR if n_new <= _FOUR else _EIGHT


@subroutine(inline=True)
def item_bytes(kind: int) -> int:
    """Return the bytes of a weight."""
    return 4 if kind == FLOATS else 2


@subroutine(inline=True)
def _vectors_of(kind: int) -> int:
    """Return how many vectors a line of weights meets in a token."""
    return 2 if kind == HALVES else 1


@subroutine(inline=True)
def _part_of(count: int) -> int:
    """Return how many bytes of a line meet so many tokens at a time."""
    return _LINE if WIDE or count == _ONE else _LINE // 2


@compiled()
def tokens_size(n_new: int, width: int, kind: int) -> Any:
    """Return the room that `line_up` needs for tokens (T, N)."""
    lines, whole = (item_bytes(kind) * width + _LINE - 1) // _LINE, (n_new - 1) // _EIGHT * _EIGHT
    return lines * _vectors_of(kind) * _LANES * (whole + tokens_of(n_new - whole))


@compiled()
def line_up(x: Array, kind: int, tokens: Array) -> None:
    """Lay out tokens x (T, N) as `multiply_block` takes them: parties, lines, tokens, numbers; zeros fill up."""
    for first in range(0, x.shape[0], _EIGHT):
        party = x[first : first + _EIGHT]
        start = tokens_size(first, x.shape[1], kind)
        room = tokens[start : start + tokens_size(len(party), x.shape[1], kind)]
        room[:] = 0
        lines = room.reshape(-1, tokens_of(len(party)), _vectors_of(kind) * _LANES)
        for t in range(len(party)):
            if kind == PAIRS:
                _line_up_pairs(party[t], lines[:, t].view(np.uint32))
            else:
                _line_up_numbers(party[t], lines[:, t])


@subroutine()
def _line_up_numbers(x: Array, lines: Array) -> None:
    """Write a token's numbers; where a line has two vectors, those with even places come first."""
    numbers = lines.shape[1]
    parts, whole = numbers // _LANES, len(x) // numbers
    for line in range(whole):
        for part in range(parts):
            for i in range(_LANES):
                lines[line, part * _LANES + i] = x[numbers * line + i * parts + part]
    for j in range(len(x) - numbers * whole):
        lines[whole, j % parts * _LANES + j // parts] = x[numbers * whole + j]


@subroutine()
def _line_up_pairs(x: Array, lines: Array) -> None:
    """Write a token's numbers as words of two bfloat16."""
    bits, whole = x.view(np.uint32), len(x) // (2 * _LANES)
    for line in range(whole):
        for i in range(_LANES):
            j = 2 * (_LANES * line + i)
            lines[line, i] = nearest(bits[j]) >> np.uint32(16) | nearest(bits[j + 1])
    for j in range(2 * _LANES * whole, len(x)):
        number = nearest(bits[j])
        lines[whole, (j - 2 * _LANES * whole) // 2] |= number if j % 2 == 1 else number >> np.uint32(16)


@compiled()
def _multiply_blocks(arguments: Any, jobs: Array, start: int, stop: int) -> None:
    """Multiply the blocks from ``start`` to ``stop``. The last block of a matrix ends where the matrix does."""
    tokens, n_new, width, kind, work = arguments
    room = aligned(room_size(), tokens)
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        row = min(first, job.rows - BLOCK)
        pitch = item_bytes(kind) * width
        rows = job.data + pitch * row
        output, token = job.output + 4 * row, 4 * job.rows
        call_at(work, (rows, width, kind, tokens, n_new, rows + BLOCK * pitch, pitch, room, output, token))


@subroutine()
def room_size() -> int:
    """Return how many numbers `multiply_block` needs for a party's products, its sums, and last lines."""
    return BLOCK * (_EIGHT * (1 + _LANES) + _LANES)


@compiled(counted=False)
def multiply_block(
    rows: int,
    width: int,
    kind: int,
    tokens: Array,
    n_new: int,
    ahead: int,
    ahead_row: int,
    room: Array,
    output: int,
    token_bytes: int,
) -> None:
    """Write the products of sixteen rows with all tokens to an address, as float32.

    Parameters
    ----------
    rows : int
        Address of the first row; they lie one behind the other.
    width : int
        N.
    kind : int
        FLOATS, HALVES or PAIRS.
    tokens : ndarray, float32
        From `line_up`.
    n_new : int
        T.
    ahead, ahead_row : int
        What is multiplied next, and the bytes of a row there; its beginning is fetched from memory at the end.
    room : ndarray, float32
        As long as `room_size` says.
    output, token_bytes : int
        Where to, and bytes from one token's numbers to the next one's.
    """
    pitch, x = item_bytes(kind) * width, np.int64(tokens.ctypes.data)
    last = _last_lines(rows, pitch, pitch // _LINE * _LINE, room)
    for first in range(0, n_new, _EIGHT):
        party = min(_EIGHT, n_new - first)
        count = tokens_of(party)
        if count == _ONE and width <= _NARROW:
            _multiply_rows(rows, pitch, kind, x, ahead, last, np.int64(room.ctypes.data))
        else:
            _multiply_bands(rows, pitch, kind, x, count, ahead, ahead_row, last, room)
        for t in range(party):
            for r in range(BLOCK):
                simd.store_one(output + (first + t) * token_bytes, 4 * r, room[r * count + t])
        x += 4 * tokens_size(party, width, kind)
        ahead, ahead_row = rows, pitch  # once is enough


@subroutine()
def _multiply_rows(rows: int, pitch: int, kind: int, x: int, ahead: int, last: int, total: int) -> None:
    """Write sixteen rows' products with one token to an address, a row at a time."""
    end = rows + BLOCK * pitch
    for row in range(rows, end, pitch):
        coming = row + _EARLY if row + _EARLY < end else ahead + row + _EARLY - end
        if kind == PAIRS:
            _multiply_row(PAIRS, row, pitch // _LINE, last, x, coming, total)
        elif kind == HALVES:
            _multiply_row(HALVES, row, pitch // _LINE, last, x, coming, total)
        else:
            _multiply_row(FLOATS, row, pitch // _LINE, last, x, coming, total)
        total += 4
        last += _LINE if last > 0 else 0


@subroutine(inline=True)
def _multiply_row(kind: int, row: int, n_lines: int, last: int, x: int, coming: int, total: int) -> None:
    """Write the product of a row and one token to an address, with a last line that lies elsewhere, if there is one.

    The kind is a literal.
    """
    tile, x_line = no_sums(1), _vectors_of(kind) * _LINE
    for n in range(n_lines):
        simd.prefetch(coming, _LINE * n)
        tile = inner_lines(tile, 1, kind, row + _LINE * n, 0, x + x_line * n)
    if last > 0:
        simd.prefetch(coming, _LINE * n_lines)
        tile = inner_lines(tile, 1, kind, last, 0, x + x_line * n_lines)
    store_totals(total, tile)


@subroutine()
def _multiply_bands(
    rows: int, pitch: int, kind: int, x: int, count: int, ahead: int, ahead_row: int, last: int, room: Array
) -> None:
    """Fill the beginning of the room with the products of sixteen rows and a party, a band and chunk at a time."""
    whole, x_line = pitch // _LINE, count * _vectors_of(kind) * _LINE
    totals, band = np.int64(room.ctypes.data), _ROWS_OF_ONE if count == _ONE else _SUMS // count
    sums = totals + 4 * BLOCK * count
    room[BLOCK * count : BLOCK * count * (1 + _LANES)] = 0
    chunks = 1 if count == _ONE else (whole * x_line + _CHUNK - 1) // _CHUNK
    for chunk in range(chunks):
        start, stop = whole * chunk // chunks, whole * (chunk + 1) // chunks
        for r in range(0, BLOCK, band):
            column, coming, coming_pitch = rows + r * pitch + start * _LINE, ahead + r * ahead_row, ahead_row
            if chunk + 1 < chunks:
                coming, coming_pitch = rows + r * pitch + stop * _LINE, pitch
            elif chunks == 1:
                coming, coming_pitch = (column + band * pitch, pitch) if r + band < BLOCK else (ahead, ahead_row)
            at, to = x + start * x_line, sums + r * count * _LINE
            for part in range(0, _LINE, _part_of(count)):
                here = column + part
                _add_band(here, pitch, kind, at + part, count, stop - start, coming, coming_pitch, to + part)
    for r in range(0, BLOCK if last > 0 else 0, band):
        for part in range(0, _LINE, _part_of(count)):
            here, at, to = last + r * _LINE + part, x + whole * x_line + part, sums + r * count * _LINE + part
            _add_band(here, _LINE, kind, at, count, 1, last, 0, to)
    for r in range(0, BLOCK * count, _SUMS):
        store_totals(totals + 4 * r, sums_at(sums + r * _LINE, _SUMS))


@subroutine()
def _last_lines(rows: int, pitch: int, whole: int, room: Array) -> Any:
    """Copy what rows have behind so many bytes, less than a line, to lines filled up with zeros, and return where.

    There may be no memory behind the last row. Return 0 where rows end with a line.
    """
    if whole == pitch:
        return np.int64(0)
    spare = room[room.shape[0] - BLOCK * _LANES :].view(np.uint8)
    spare[:] = 0
    for r in range(BLOCK):
        for i in range(pitch - whole):
            spare[r * _LINE + i] = load_one_byte(rows + r * pitch, whole + i)
    return np.int64(spare.ctypes.data)


@subroutine()
def _add_band(
    rows: int, pitch: int, kind: int, x: int, count: int, n_lines: int, coming: int, coming_pitch: int, sums: int
) -> None:
    """Add so many lines of a band, or a part of each, to its sums; fetch as many of the rows that come meanwhile."""
    if kind == PAIRS:
        _add_to(PAIRS, rows, pitch, x, count, n_lines, coming, coming_pitch, sums)
    elif kind == HALVES:
        _add_to(HALVES, rows, pitch, x, count, n_lines, coming, coming_pitch, sums)
    else:
        _add_to(FLOATS, rows, pitch, x, count, n_lines, coming, coming_pitch, sums)


@subroutine(inline=True)
def _add_to(
    kind: int, rows: int, pitch: int, x: int, count: int, n_lines: int, coming: int, coming_pitch: int, sums: int
) -> None:
    """Do `_add_band` for a literal kind."""
    one, four, eight = _ROWS_OF_ONE, _ROWS_OF_FOUR, _ROWS_OF_EIGHT
    if count == _ONE:
        _add(sums_at, inner_lines, store_sums, one, one, kind, rows, pitch, x, n_lines, coming, coming_pitch, sums)
    elif count == _FOUR:
        _add(_PARTS_AT, _INNER, _STORE, _SUMS, four, kind, rows, pitch, x, n_lines, coming, coming_pitch, sums)
    else:
        _add(_PARTS_AT, _INNER, _STORE, _SUMS, eight, kind, rows, pitch, x, n_lines, coming, coming_pitch, sums)


@subroutine(inline=True)
def _add(
    sums_from: Any,
    inner: Any,
    sums_to: Any,
    n_sums: int,
    n_rows: int,
    kind: int,
    rows: int,
    pitch: int,
    x: int,
    n_lines: int,
    coming: int,
    coming_pitch: int,
    sums: int,
) -> None:
    """Do `_add_band` for literally so many sums and rows, and a literal kind, by three instructions on sums."""
    tile = sums_from(sums, n_sums)
    x_line = n_sums // n_rows * _vectors_of(kind) * _LINE
    for n in range(n_lines):
        for row in range(n_rows):
            simd.prefetch(coming + row * coming_pitch, _LINE * n)
        tile = inner(tile, n_rows, kind, rows + _LINE * n, pitch, x + x_line * n)
    sums_to(sums, tile)
