"""One piece of attention for a few queries, as in decoding: keys and values stream by from memory, and are read once.

See `npllama.kernels.attend_piece` for what a piece is, and how the softmax is done along the way. In vector registers,
queries go through a block of keys in **parties** of four, filled up with zeros, or alone where each head has keys of
its own: that decides the order of sums, so it does not depend on how many tokens there are. Of as many keys as make
sixteen scores with a party (with narrow registers four), the sums of all stay in registers
(`npllama.kernels.simd_chunks`), and so do those of its queries over the values of a block, 64 numbers of a head at a
time (with narrow registers 32 of bfloat16, for one pair of queries after the other). A vector of scores is those of a
key for each query, then those of the next key: a lane belongs to one query throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.attend_many import add_product_plainly
from npllama.kernels.attend_piece import (
    _BLOCK,
    _HALF,
    _LOWEST,
    _ONE,
    _ZERO,
    Piece,
    _exp2_lanes,
    _matrix_at,
    _seen,
    exp2,
)
from npllama.kernels.jit import narrowed, widened
from npllama.kernels.llvm import NARROW, WIDE
from npllama.kernels.memory import aligned
from npllama.kernels.portable import dot_tile
from npllama.kernels.simd import add, broadcast, load, maximum, multiply, nearest, store, store_one
from npllama.kernels.simd import fused_multiply_add as fma
from npllama.kernels.simd_chunks import (
    exchanged,
    inner_chunk,
    outer_chunk,
    put_together,
    shrunk_sums_at,
    taken_apart,
)
from npllama.kernels.simd_quantised import load_floats
from npllama.kernels.simd_sums import no_sums, store_sums, store_totals
from npllama.kernels.simd_words import bfloat16_of, rounded_pair
from npllama.kernels.subroutines import subroutine

_PARTY = 4
_PAIR, _SUMS_OF_PAIR = 2, 4
_LANES = 16
_SUMS = 16 if WIDE else 4  # of scores, in registers
_LINE = 64
_CHUNK = 64  # numbers of a head
_STATE = 3 * _LANES
_EARLY = 1 << 14  # bytes of keys, or values, before whose turn the next ones are fetched: four pages
_HIDDEN = np.float32(-np.inf)


# --- in vector registers ----------------------------------------------------------------------------------------


class Party(NamedTuple):
    """Some queries of a piece, and how far they have come: addresses of float32 in a room of the piece's own.

    Attributes
    ----------
    first : int
        The number of the first query among those of the piece.
    head_dim : int
        Dh.
    queries, sums : int
        By lines, as `_write_lines` says.
    state : int
        Three vectors of lanes: the largest score so far of a lane's query, the sum of the lane's weights, and by what
        sums shrank last.
    scores, spare : int
        Room of all parties: for the scores of a block of keys, later their weights; and for sixteen keys.
    scale : float32
        What scores are multiplied by, in units of ln 2.
    """

    first: int
    head_dim: int
    queries: int
    sums: int
    state: int
    scores: int
    spare: int
    scale: np.float32


@subroutine(counted=True)
def attend_few(q: Array, scale: np.float32, piece: Piece, like: Array, context: Array, row: int, head: int) -> Any:
    """Write the context of a piece's queries, and return their peaks and totals, by which parts can be merged.

    Each key and value is read once, where it lies; ``like`` has their dtype. Scores are multiplied by ``scale``, which
    makes their unit ln 2. The context goes into context (T, H, Dh) from a row and a head on; peaks and totals have a
    number for each query, row by row, and perhaps some more. Vector registers are used by name.
    """
    head_dim, n_queries, size = q.shape[2], piece.rows * piece.group, 1 if piece.group == 1 else _PARTY
    width = (head_dim + _CHUNK - 1) // _CHUNK * _CHUNK
    own, n_parties = 2 * size * width + _STATE, (n_queries + size - 1) // size
    room = aligned(n_parties * own + _BLOCK * _PARTY + _LANES * width + width, q)
    parties, padded = room[: n_parties * own].reshape(n_parties, own), room[len(room) - width :]
    room[:] = _ZERO
    for p in range(n_parties):
        for lane in range(_LANES):
            parties[p, own - _STATE + lane] = _LOWEST
    address = np.int64(room.ctypes.data)
    shared = address + 4 * n_parties * own
    for m in range(n_queries):
        for d in range(head_dim):
            padded[d] = widened(narrowed(q[piece.row + m // piece.group, piece.head + m % piece.group, d], like))
        _write_lines(padded, m % size, size, like, address + 4 * own * (m // size))
    for start in range(piece.start, piece.stop, _BLOCK):
        for p in range(n_parties):
            queries = address + 4 * own * p
            sums, state = queries + 4 * size * width, queries + 8 * size * width
            party = Party(size * p, head_dim, queries, sums, state, shared, shared + 4 * _BLOCK * _PARTY, scale)
            if size == 4:
                _pass_block(4, 16, piece, like, start, party)
            else:
                _pass_block(1, 4, piece, like, start, party)
    highest, totals = np.empty(n_queries, np.float32), np.empty(n_queries, np.float32)
    for m in range(n_queries):
        p, query = m // size, m % size
        highest[m], totals[m] = parties[p, own - _STATE + query], _ZERO
        for lane in range(query, _LANES, size):
            totals[m] += parties[p, own - _STATE + _LANES + lane]
        sums, part = address + 4 * own * p + 4 * size * width, _ONE / totals[m]
        _read_lines(sums, query, size, like, padded)
        for d in range(head_dim):
            context[row + m // piece.group, head + m % piece.group, d] = padded[d] * part
    return highest, totals


@subroutine()
def _write_lines(numbers: Array, query: int, size: int, like: Array, lines: int) -> None:
    """Write a query's numbers, whole chunks, among those of its party; see `npllama.kernels.simd_chunks`."""
    line = _LANES * 4 // like.itemsize
    for d in range(0, len(numbers), line):
        place = lines + 4 * (d * size + query * line)
        if line == _LANES:
            store(place, 0, load(numbers, d))
        else:
            even, odd = taken_apart(load(numbers, d), load(numbers, d + _LANES))
            store(place, 0, even)
            store(place, _LINE, odd)


@subroutine()
def _read_lines(lines: int, query: int, size: int, like: Array, numbers: Array) -> None:
    """Do the opposite of `_write_lines`."""
    line = _LANES * 4 // like.itemsize
    for d in range(0, len(numbers), line):
        place = lines + 4 * (d * size + query * line)
        if line == _LANES:
            store(numbers, d, load_floats(place, 0))
        else:
            first, second = put_together(load_floats(place, 0), load_floats(place, _LINE))
            store(numbers, d, first)
            store(numbers, d + _LANES, second)


@subroutine(inline=True)
def _pass_block(size: int, n_sums: int, piece: Piece, like: Array, start: int, party: Party) -> None:
    """Bring a party up to date with the block of keys at ``start``.

    Its size is a literal, and so are the vectors of its sums over a chunk of values, four times as many. What comes
    some pages behind is fetched from memory meanwhile.
    """
    n_keys, offset = min(_BLOCK, piece.stop - start), start * piece.stride
    ahead = max(1, _EARLY // (party.head_dim * like.itemsize)) * piece.stride
    _score(size, piece, like, piece.keys + offset, n_keys, ahead, party)
    n_scores = (n_keys * size + _LANES - 1) // _LANES * _LANES
    _hide(size, n_scores, piece, start, party)
    _weigh(size, n_scores, like, party)
    _add_values(size, n_sums, piece, like, piece.values + offset, n_keys, ahead, party)


@subroutine(inline=True)
def _score(size: int, piece: Piece, like: Array, keys: int, n_keys: int, ahead: int, party: Party) -> None:
    """Write a party's scores with some keys, a few at a time; fetch what is ``ahead`` bytes behind each key.

    There may be no memory behind the last key: keys that make too few scores are copied to where there is. What lies
    behind them there is any number, whose scores nobody sees.
    """
    n_rows = _SUMS // size
    for s in range(0, n_keys, n_rows):
        rows, row_bytes = keys + s * piece.stride, piece.stride
        if s + n_rows > n_keys:
            _copy(rows, piece.stride, like, n_keys - s, party.head_dim, party.spare)
            rows, row_bytes = party.spare, party.head_dim * like.itemsize
        tile = no_sums(_SUMS)
        for d in range(0, party.head_dim, _CHUNK):
            place, x, there = rows + d * like.itemsize, party.queries + 4 * size * d, _there(party.head_dim - d, _CHUNK)
            tile = inner_chunk(tile, size, like, place, row_bytes, there, ahead, x)
        store_totals(party.scores + 4 * s * size, tile)


@subroutine(counted=True)
def _copy(rows: int, stride: int, like: Array, count: int, head_dim: int, target: int) -> None:
    """Copy the numbers of a few positions to an address, one position behind the other."""
    stored, copies = _matrix_at(rows, like, count, stride // like.itemsize), _matrix_at(target, like, count, head_dim)
    for s in range(count):
        for d in range(head_dim):
            copies[s, d] = stored[s, d]


@subroutine(inline=True)
def _there(count: int, size: int) -> Any:
    """Return the bits of a chunk, or a line, of a size of which so many numbers are there; all, if those are all."""
    return np.int64(-1) if count >= size else (np.int64(1) << count) - 1


@subroutine()
def _hide(size: int, n_scores: int, piece: Piece, start: int, party: Party) -> None:
    """Set the scores of keys that a party's query does not see to -inf."""
    for query in range(size):
        begin, end = _seen(piece, party.first + query, start)
        for s in range(begin):
            store_one(party.scores, 4 * (s * size + query), _HIDDEN)
        for s in range(end, n_scores // size):
            store_one(party.scores, 4 * (s * size + query), _HIDDEN)


@subroutine()
def _weigh(size: int, n_scores: int, like: Array, party: Party) -> None:
    """Turn a party's scores into weights, and bring its state up to date."""
    before, highest = load_floats(party.state, 0), broadcast(_LOWEST)
    for at in range(0, 4 * n_scores, _LINE):
        highest = maximum(load_floats(party.scores, at), highest)
    highest = maximum(exchanged(highest, 8), highest)
    highest = maximum(exchanged(highest, 4), highest)
    if size == 1:
        highest = maximum(exchanged(highest, 2), highest)
        highest = maximum(exchanged(highest, 1), highest)
    peak = maximum(nearest(fma(highest, broadcast(party.scale), broadcast(_HALF))), before)
    minus_peak = multiply(peak, broadcast(-_ONE))
    shrunk = _exp2_lanes(add(before, minus_peak))
    total = multiply(load_floats(party.state, _LINE), shrunk)
    for at in range(0, 4 * n_scores, _LINE):
        weight = _exp2_lanes(fma(load_floats(party.scores, at), broadcast(party.scale), minus_peak))
        if like.itemsize == 2:
            weight = bfloat16_of(rounded_pair(weight, weight), 1)
        store(party.scores, at, weight)
        total = add(total, weight)
    store(party.state, 0, peak)
    store(party.state, _LINE, total)
    store(party.state, 2 * _LINE, shrunk)


@subroutine(inline=True)
def _add_values(
    size: int, n_sums: int, piece: Piece, like: Array, values: int, n_keys: int, ahead: int, party: Party
) -> None:
    """Shrink a party's sums, and add values times weights; fetch what is ``ahead`` bytes behind each value."""
    if NARROW and size == _PARTY and like.itemsize == 2:
        _add_lines(piece, like, values, n_keys, ahead, party)
        return
    for d in range(0, party.head_dim, _CHUNK):
        place, there = party.sums + 4 * size * d, _there(party.head_dim - d, _CHUNK)
        tile = shrunk_sums_at(like, place, n_sums, size, party.state + 2 * _LINE)
        for s in range(n_keys):
            row = values + s * piece.stride + d * like.itemsize
            tile = outer_chunk(tile, size, like, row, there, ahead, party.scores + 4 * size * s)
        store_sums(place, tile)


@subroutine(inline=True)
def _add_lines(piece: Piece, like: Array, values: int, n_keys: int, ahead: int, party: Party) -> None:
    """Do `_add_values` to a line of bfloat16 values after the other, and to two of four queries at a time.

    These are four sums at a time, which is what narrow registers hold. Values of float32 are read in their order, which
    takes longer than to add them.
    """
    line = _LINE // like.itemsize
    for d in range(0, party.head_dim, line):
        there = _there(party.head_dim - d, line)
        for query in range(0, _PARTY, _PAIR):
            place = party.sums + 4 * (_PARTY * d + query * line)
            tile = shrunk_sums_at(like, place, _SUMS_OF_PAIR, _PAIR, party.state + 2 * _LINE + 4 * query)
            for s in range(n_keys):
                row, weights = values + s * piece.stride + d * like.itemsize, 4 * (_PARTY * s + query)
                tile = outer_chunk(tile, _PAIR, like, row, there, ahead, party.scores + weights)
            store_sums(place, tile)


# --- in plain loops ---------------------------------------------------------------------------------------------


@subroutine(counted=True)
def attend_few_plainly(
    q: Array, scale: np.float32, piece: Piece, like: Array, context: Array, row: int, head: int
) -> Any:
    """Do `attend_few` in plain loops, of which the compiler makes what it can."""
    head_dim = q.shape[2]
    n_queries = piece.rows * piece.group
    padded = (n_queries + 3) // 4 * 4
    queries = np.zeros((padded, head_dim), np.float32)
    for m in range(n_queries):
        for d in range(head_dim):
            number = q[piece.row + m // piece.group, piece.head + m % piece.group, d]
            queries[m, d] = widened(narrowed(number, like))
    sums = np.zeros((padded, head_dim), np.float32)
    weights = np.zeros((padded, _BLOCK), np.float32)
    peaks = np.full(padded, _LOWEST, np.float32)
    totals = np.zeros(padded, np.float32)
    spare = np.zeros((_BLOCK, head_dim), like.dtype)
    for start in range(piece.start, piece.stop, _BLOCK):
        n_keys = min(_BLOCK, piece.stop - start)
        keys = _block(piece.keys + start * piece.stride, piece.stride, n_keys, spare)
        for m in range(0, padded, 4):
            for s in range(0, n_keys, 4):
                dot_tile(queries[m : m + 4], keys[s : s + 4], weights[m : m + 4, s : s + 4])
        for m in range(n_queries):
            first, end = _seen(piece, m, start)
            for s in range(first):
                weights[m, s] = -np.inf
            for s in range(end, _BLOCK):
                weights[m, s] = -np.inf
            shrunk = _weigh_row(weights[m], scale, like, peaks, totals, m)
            for d in range(head_dim):
                sums[m, d] *= shrunk
        values = _block(piece.values + start * piece.stride, piece.stride, n_keys, spare)
        add_product_plainly(weights, values, padded, n_keys, sums)
    for m in range(n_queries):
        for d in range(head_dim):
            context[row + m // piece.group, head + m % piece.group, d] = sums[m, d] / totals[m]
    return peaks, totals


@subroutine(inline=True, counted=True)
def _block(address: int, stride: int, count: int, spare: Array) -> Any:
    """Return a block of positions where it lies, or a shorter one in ``spare`` (block, Dh)."""
    stored = _matrix_at(address, spare, count, stride // spare.itemsize)
    if count == _BLOCK:
        return stored
    for s in range(count):
        for d in range(spare.shape[1]):
            spare[s, d] = stored[s, d]
    return spare


@subroutine()
def _weigh_row(scores: Array, scale: np.float32, like: Array, peaks: Array, totals: Array, m: int) -> Any:
    """Turn one query's scores (block,) into weights, update its peak and total, and return what its sums shrink by."""
    highest = _LOWEST
    for s in range(_BLOCK):
        highest = max(highest, scores[s])
    peak = max(peaks[m], np.rint(highest * scale + _HALF))
    shrunk = exp2(peaks[m] - peak)
    total = _ZERO
    for s in range(_BLOCK):
        weight = widened(narrowed(exp2(scores[s] * scale - peak), like))
        scores[s] = weight
        total += weight
    peaks[m], totals[m] = peak, totals[m] * shrunk + total
    return shrunk
