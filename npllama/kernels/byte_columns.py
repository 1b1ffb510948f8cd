"""Products of one token, or a few, that are rounded to int8, with int8 and int4 weights: sixteen rows at a time.

The rows of a **block** are turned into columns (`npllama.kernels.simd_columns`), a group of 64 numbers at a time, and
each column meets all tokens of a **party**, eight at most. A sum's lanes are rows then, and several tokens cost little
more than their multiplications. A single token meets rows as they lie (`npllama.kernels.simd_groups`), in the order of
the memory, which is what it waits for: only the sums of groups are turned.

Where no instruction multiplies bytes, registers have no room for the sums of a party. Columns of int4 go to memory
first, and meet four tokens at a time. Rows of int8 meet a party as they lie, and the lanes of sums are its tokens.

Weights count as unsigned: int8 as 128 more than they are (but as they are where rows meet a party), int4 as it is
stored, 8 more than around zero. The exact sum of a group begins with what that makes too much
(`npllama.kernels.rounded_tokens`). It is then multiplied by what the group has in common::

    y += scale · step · sum(q · integer)  [+ (minimum + 8 scale) · sum of the token's group, for int4]

That is what `npllama.kernels.vector_blocks` does to many tokens, in the same order: the numbers of a token are, bit by
bit, the same, whatever the tokens beside it, as few or many as they are.

What comes next, sixteen rows that lie one behind the other, is fetched from memory meanwhile, in the order in which it
lies there.
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
from npllama.kernels.byte_rows import EARLY, Rows, rows_at
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS, deal_out, job_of, jobs_of
from npllama.kernels.llvm import DOTS
from npllama.kernels.memory import aligned
from npllama.kernels.rounded_tokens import PARTY, group_bytes, integers_bytes, numbers_pitch, round_tokens, tokens_bytes
from npllama.kernels.simd_blocks import add_stepped, add_to_memory, outer_floats
from npllama.kernels.simd_columns import add_bytes, add_nibbles, add_turned_nibbles, columns_at
from npllama.kernels.simd_groups import add_first_to_memory, add_row, products_of_bytes, products_of_nibbles
from npllama.kernels.simd_quantised import load_floats, load_integers
from npllama.kernels.simd_sums import first_sums, no_sums, store_sums, store_totals, sums_at
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_fields import SIDE
from npllama.kernels.vector_rows import tokens_of
from npllama.kernels.vector_squares import (
    BYTES,
    INT8_KIND,
    LINE,
    MIDDLE,
    SCALE,
    SQUARE,
    WEIGHT_LINES,
    chunk_groups,
    lay_factors,
)

#: Tokens at most.
FEW = 16
#: Rows of a matrix that are a unit of work.
BLOCK = 16

#: A multiple of this many bytes from one row to the next, and all rows have their lines in the same few places of the
#: first-level cache: turned where they lie, they would drive one another out before a line is used up.
_SAME_PLACES = 4096
#: Numbers of tokens that columns are multiplied with, see `npllama.kernels.vector_rows.tokens_of`.
_ONE, _FOUR, _EIGHT = 1, 4, 8
#: Bytes of a row that are turned at once, and of the four columns that they become; a group of int4 takes it twice.
_PIECE, _COLUMNS, _PIECES = 16, 16 * BLOCK, 2
_INT8, _INT4 = FORMS["int8"], FORMS["int4"]
_BYTE, _FLOAT = np.empty(0, np.int8), np.empty(0, np.float32)  # only their dtypes matter


class Block(NamedTuple):
    """Sixteen rows, and what else it takes to multiply them.

    Attributes
    ----------
    rows, ahead : Rows
        The rows; as many that are multiplied next.
    groups : int
        Groups of 64 numbers that a row has.
    is_int4 : bool
        The weights are int4, not int8.
    factors : int
        Address of two lines for each group, of scales and middles.
    sums : int
        Address of a line for each token of a party: its numbers for the sixteen rows. As much room is behind these.
    lines : int
        Address of room for a line of each row, and what is behind these, see `room_size`.
    """

    rows: Rows
    ahead: Rows
    groups: int
    is_int4: bool
    factors: int
    sums: int
    lines: int


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with round(x) (T, N) · weight (M, N)ᵀ, for weights of one dtype that share N.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is 16 at most. It is rounded to int8, see `npllama.rounding`.
    weights : sequence of Tensor of shape (M, N)
        All int8, or all int4. M may differ, and is 16 at least.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    is_int4, groups = PACKINGS[weights[0].dtype].has_minima, n_groups(x.shape[1])
    tokens = aligned(tokens_bytes(groups, is_int4, len(x)), _BYTE)
    round_tokens(np.ascontiguousarray(x), is_int4, tokens)
    arguments = tokens, len(x), groups, is_int4, address_of_block()
    deal_out(arguments, jobs_of(weights, outputs, BLOCK), BLOCK, numba.get_num_threads(), _address_of_work())


@cache
def _address_of_work() -> int:
    """Return the address of `_multiply_blocks`."""
    return address_of(_multiply_blocks, (_BYTE, 1, 1, True, 1), np.empty((1, 6), np.int64), 1, 1)


@cache
def address_of_block() -> int:
    """Return the address of `multiply_block`."""
    rows = Rows(1, 1, 1)
    return address_of(multiply_block, rows, 1, True, _BYTE, 1, rows, _FLOAT, 1, 1)


@compiled()
def _multiply_blocks(arguments: Any, jobs: Array, start: int, stop: int) -> None:
    """Multiply the blocks from ``start`` to ``stop``. The last block of a matrix ends where the matrix does."""
    tokens, n_new, groups, is_int4, work = arguments
    room = aligned(room_size(groups), _FLOAT)
    for block in range(start, stop):
        job, first = job_of(jobs, block, BLOCK)
        row = min(first, job.rows - BLOCK)
        rows = rows_at(Rows(job.data, job.scales, job.minima), row, groups, is_int4)
        ahead, output = rows_at(rows, BLOCK, groups, is_int4), job.output + 4 * row
        call_at(work, (rows, groups, is_int4, tokens, n_new, ahead, room, output, 4 * job.rows))


@subroutine()
def room_size(groups: int) -> int:
    """Return how many numbers `multiply_block` needs for a party's sums, factors, lines, and what is behind these.

    That is the sums of groups, or a chunk of int4 rows.
    """
    behind = max(SQUARE * ((groups + SIDE - 1) // SIDE), BLOCK * GROUP // 2 * chunk_groups(BYTES, groups))
    return (2 * LINE * PARTY + WEIGHT_LINES * groups + SQUARE + behind) // 4


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
        From `npllama.kernels.rounded_tokens.round_tokens`.
    n_new : int
        T.
    ahead : Rows
        What is multiplied next.
    room : ndarray, float32
        As long as `room_size` says.
    output, token_bytes : int
        Where to, and bytes from one token's numbers to the next one's.
    """
    sums, x = np.int64(room.ctypes.data), np.int64(tokens.ctypes.data)
    factors, form = sums + 2 * LINE * PARTY, _INT4 if is_int4 else _INT8
    lines, per_chunk = factors + WEIGHT_LINES * groups, _per_chunk(is_int4, groups)
    for g in range(0, groups, per_chunk):
        here, count = factors + WEIGHT_LINES * g, min(per_chunk, groups - g)
        lay_factors(rows.scales, rows.minima, BLOCK, groups, g, count, form, lines, here, WEIGHT_LINES)
    for first in range(0, n_new, PARTY):
        block, party = Block(rows, ahead, groups, is_int4, factors, sums, lines), min(PARTY, n_new - first)
        count = tokens_of(party)
        if count == _ONE:
            _multiply_one(block, x)
        elif is_int4 and not DOTS:
            _multiply_turned(count, block, x)
        elif count == _FOUR:
            _multiply_some(_FOUR, block, x)
        else:
            _multiply_some(_EIGHT, block, x)
        for t in range(party):
            simd.store(output + (first + t) * token_bytes, 0, load_floats(sums, LINE * t))
        x += groups * group_bytes(count, is_int4)
        ahead = rows  # once is enough


@subroutine(inline=True)
def _multiply_some(count: int, block: Block, x: int) -> None:
    """Fill the sums of literally so many tokens, which begin at an address, in one way or the other."""
    if DOTS:
        _multiply_party(count, block, x)
    else:
        _multiply_rows(count, block, x)


@subroutine(inline=True)
def _per_chunk(is_int4: bool, groups: int) -> int:
    """Return how many groups are added up by themselves, which decides the bits: as many as among many tokens."""
    return chunk_groups(BYTES if is_int4 else INT8_KIND, groups)


@subroutine(inline=True)
def _multiply_party(count: int, block: Block, x: int) -> None:
    """Fill the sums of literally so many tokens, which begin at an address.

    The sums of a chunk are added up by themselves. A line of each row is a group of int8, or two of int4.
    """
    store_sums(block.sums, no_sums(count))
    per_chunk, per_line = _per_chunk(block.is_int4, block.groups), _per_line(block.is_int4)
    steps, pitch = integers_bytes(count, block.is_int4), numbers_pitch(count)
    for start in range(0, block.groups, per_chunk):
        stop = min(start + per_chunk, block.groups)
        _fetch(block, BLOCK * start, BLOCK * stop)
        totals = no_sums(count)
        for first in range(start, stop, per_line):
            rows, apart = _lines_of_rows(block, first)
            for g in range(first, min(first + per_line, stop)):
                factors = block.factors + WEIGHT_LINES * g
                tile = first_sums(x + steps + pitch, count)
                tile = add_nibbles(tile, rows, apart, x) if block.is_int4 else add_bytes(tile, rows, apart, x)
                totals = add_stepped(totals, tile, (load_floats(factors, SCALE),), x + steps)
                if block.is_int4:
                    totals = outer_floats(totals, (load_floats(factors, MIDDLE),), x + steps + 2 * pitch)
                rows, x = rows + LINE // per_line, x + group_bytes(count, block.is_int4)
        add_to_memory(block.sums, 0, count, totals)


@subroutine()
def _multiply_turned(count: int, block: Block, x: int) -> None:
    """Do what `_multiply_party` does to int4 weights where no instruction multiplies bytes, with four or eight tokens.

    All at once, eight tokens take a fifth longer or more: their sums alone need all registers that there are.
    """
    size, per_chunk = GROUP // 2, _per_chunk(True, block.groups)
    pitch, steps = numbers_pitch(count), integers_bytes(count, True)
    chunk, columns, copies = block.sums + LINE * PARTY, block.lines, block.lines + SQUARE
    for t in range(0, count, _FOUR):
        store_sums(block.sums + LINE * t, no_sums(_FOUR))
    for start in range(0, block.groups, per_chunk):
        stop = min(start + per_chunk, block.groups)
        _fetch(block, BLOCK * start, BLOCK * stop)
        for t in range(0, count, _FOUR):
            store_sums(chunk + LINE * t, no_sums(_FOUR))
        rows, apart = _in_other_places(block.rows.data + size * start, size * block.groups, size * per_chunk, copies)
        for g in range(start, stop):
            factors = block.factors + WEIGHT_LINES * g
            scales, middles = (load_floats(factors, SCALE),), (load_floats(factors, MIDDLE),)
            for line in range(0, BLOCK * size, LINE):
                simd.prefetch(block.ahead.data + BLOCK * size * g, line)
            _turn(rows, apart, columns)
            for t in range(0, count, _FOUR):
                numbers = x + steps + 4 * t
                tile = first_sums(numbers + pitch, _FOUR)
                for piece in range(_PIECES):
                    tile = add_turned_nibbles(tile, columns + _COLUMNS * piece, x + LINE * t + _PIECE * piece)
                totals = add_stepped(sums_at(chunk + LINE * t, _FOUR), tile, scales, numbers)
                totals = outer_floats(totals, middles, numbers + 2 * pitch)
                store_sums(chunk + LINE * t, totals)
            rows, x = rows + size, x + group_bytes(count, True)
        for t in range(0, count, _FOUR):
            add_to_memory(block.sums + LINE * t, 0, _FOUR, sums_at(chunk + LINE * t, _FOUR))


@subroutine(inline=True)
def _turn(rows: int, row_bytes: int, columns: int) -> None:
    """Write the columns of a group of each row, 32 bytes."""
    for piece in range(_PIECES):
        four = columns_at(rows + _PIECE * piece, row_bytes)
        for i in range(len(four)):
            simd.store(columns, _COLUMNS * piece + LINE * i, four[i])


@subroutine(inline=True)
def _multiply_rows(count: int, block: Block, x: int) -> None:
    """Do what `_multiply_party` does to int8 weights where no instruction multiplies bytes, with so many tokens.

    Bytes become int16 as a row is loaded, and no number of a token must be in all lanes: columns would take a quarter
    more instructions. Of int4 they take fewer: sums stay in 16 bits, and adding up their lanes is most of the work.
    """
    per_chunk, row_bytes, steps = _per_chunk(False, block.groups), GROUP * block.groups, integers_bytes(count, False)
    coming = block.ahead.data
    store_sums(block.lines, no_sums(count))
    for start in range(0, block.groups, per_chunk):
        stop = min(start + per_chunk, block.groups)
        _fetch(block, BLOCK * start, BLOCK * stop)
        for r in range(BLOCK):
            row, scales = block.rows.data + row_bytes * r + GROUP * start, block.factors + SCALE + 4 * r
            token, totals = x, simd.broadcast(np.float32(0))
            for g in range(start, stop):
                simd.prefetch(coming, 0)
                totals = add_row(count, totals, row, token, scales + WEIGHT_LINES * g, token + steps)
                row, token, coming = row + GROUP, token + group_bytes(count, False), coming + LINE
            add_first_to_memory(count, block.lines + 4 * count * r, totals)
        x += group_bytes(count, False) * (stop - start)
    simd.transpose(block.lines, 0, 4 * count, block.sums, 0, LINE)


@subroutine(inline=True)
def _per_line(is_int4: bool) -> int:
    """Return how many groups a line of a row has."""
    return 2 if is_int4 else 1


@subroutine(inline=True)
def _lines_of_rows(block: Block, first: int) -> Any:
    """Return where the line of the first row is that begins with a group, and how far apart those of the others are.

    As many lines that are needed next are fetched.
    """
    size = LINE // _per_line(block.is_int4)
    for line in range(0, LINE * BLOCK, LINE):
        simd.prefetch(block.ahead.data + BLOCK * size * first, line)
    return _in_other_places(block.rows.data + size * first, size * block.groups, LINE, block.lines)


@subroutine(inline=True)
def _in_other_places(rows: int, row_bytes: int, size: int, copies: int) -> Any:
    """Return where the first row's bytes are, and how far apart those of the others are.

    Of rows that have their lines in the same places, so many bytes, whole lines, are copied to an address.
    """
    if row_bytes % _SAME_PLACES != 0:
        return rows, row_bytes
    for r in range(BLOCK):
        for line in range(0, size, LINE):
            simd.store(copies + size * r, line, simd.load_bytes(rows + row_bytes * r, line))
    return copies, np.int64(size)


@subroutine()
def _multiply_one(block: Block, x: int) -> None:
    """Do what `_multiply_party` does to a single token, which begins at an address.

    Nothing is gained by columns then: rows are multiplied as they lie in memory, which is read in its order, and only
    the exact sums of their groups are turned. Meanwhile some of the rows that come next are fetched, or memory would
    stand idle; int4 is not waited for.
    """
    per_chunk, pitch = _per_chunk(block.is_int4, block.groups), numbers_pitch(_ONE)
    steps = integers_bytes(_ONE, block.is_int4)
    coming, ahead = block.ahead.data + EARLY, 0 if block.is_int4 else 2 * LINE
    _sum_groups(block, x)
    store_sums(block.sums, no_sums(_ONE))
    for start in range(0, block.groups, per_chunk):
        totals = no_sums(_ONE)
        for g in range(start, min(start + per_chunk, block.groups)):
            for line in range(0, ahead, LINE):
                simd.prefetch_near(coming + ahead * g, line)
            if g % SIDE == 0:
                simd.transpose(block.lines, LINE * g, LINE, block.lines, LINE * g, LINE)
            factors = block.factors + WEIGHT_LINES * g
            tile = (simd.add(first_sums(x + steps + pitch, _ONE)[0], load_integers(block.lines, LINE * g)),)
            totals = add_stepped(totals, tile, (load_floats(factors, SCALE),), x + steps)
            if block.is_int4:
                totals = outer_floats(totals, (load_floats(factors, MIDDLE),), x + steps + 2 * pitch)
            x += group_bytes(_ONE, block.is_int4)
        add_to_memory(block.sums, 0, _ONE, totals)


@subroutine(inline=True)
def _sum_groups(block: Block, x: int) -> None:
    """Write the sum of each group of each row: of sixteen groups a line for each row, then of the next sixteen."""
    size = GROUP // 2 if block.is_int4 else GROUP
    row_bytes = size * block.groups
    for r in range(BLOCK):
        _fetch(block, r * block.groups, (r + 1) * block.groups)
        row, early = block.rows.data + r * row_bytes, r * row_bytes + EARLY - BLOCK * row_bytes
        coming = row + EARLY if early < 0 else block.ahead.data + early
        g = 0
        while g < block.groups:
            at_once = _EIGHT if g + _EIGHT <= block.groups else _ONE
            for line in range(0, size * at_once, LINE):
                simd.prefetch_near(coming, size * g + line)
            weights, integers = row + size * g, x + group_bytes(_ONE, block.is_int4) * g
            place = block.lines + g // SIDE * SQUARE + LINE * r + 4 * (g % SIDE)
            if at_once == _EIGHT:
                _sum(_EIGHT, block.is_int4, weights, integers, place)
            else:
                _sum(_ONE, block.is_int4, weights, integers, place)
            g += at_once


@subroutine(inline=True)
def _sum(count: int, is_int4: bool, weights: int, x: int, place: int) -> None:
    """Write the sums of literally so many groups of a row to a place."""
    pitch = group_bytes(_ONE, is_int4)
    if is_int4:
        store_totals(place, products_of_nibbles(count, weights, x, pitch))
    else:
        store_totals(place, products_of_bytes(count, weights, x, pitch))


@subroutine(inline=True)
def _fetch(block: Block, start: int, stop: int) -> None:
    """Fetch some of the scales and minima that are needed next, two bytes each, in the order in which they lie."""
    for place in range(2 * start, 2 * stop, LINE):
        simd.prefetch_near(block.ahead.scales, place)
        if block.is_int4:
            simd.prefetch_near(block.ahead.minima, place)
