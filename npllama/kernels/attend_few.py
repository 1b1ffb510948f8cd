"""One piece of attention for a few queries, as in decoding: keys and values stream by from memory, and are read once.

See `npllama.kernels.attend_piece` for what a piece is, and how the softmax is done along the way. In vector registers,
queries go through a block of keys in **parties** of four, two or one. Of as many keys as make sixteen scores with a
party, the sums of all stay in registers (`npllama.kernels.simd_chunks`), and so do those of its queries over the values
of a block, 64 numbers of a head at a time. A vector of scores is those of a key for each query, then those of the next
key: a lane belongs to one query throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.attend_piece import (
    _BLOCK,
    _LOWEST,
    _ONE,
    _ZERO,
    Piece,
    _add_product_plainly,
    _exp2_lanes,
    _matrix_at,
    _seen,
    exp2,
)
from npllama.kernels.jit import compiled
from npllama.kernels.memory import aligned
from npllama.kernels.portable import dot_tile
from npllama.kernels.simd import add, broadcast, load, maximum, multiply, store
from npllama.kernels.simd_chunks import exchanged, inner_chunk, outer_chunk, totals_of
from npllama.kernels.simd_sums import no_sums, store_sums, sums_at

_PARTY = 4
_LANES = 16
_CHUNK = 64  # numbers of a head


@compiled()
def attend_few(
    q: Array, scale: np.float32, piece: Piece, like: Array, plain: Array | None, context: Array, row: int, head: int
) -> Any:
    """Write the context of a piece's queries, and return their peaks and totals, by which parts can be merged.

    Each key and value is read once, where it lies; ``like`` has their dtype. Scores are multiplied by ``scale``. The
    context goes into context (T, H, Dh) from a row and a head on; peaks and totals have a number for each query, row by
    row, and perhaps some more. Where ``plain`` is an array, whichever, the compiler makes what it can of plain loops.
    Where it is None, vector registers are used by name; what is not used is not compiled.
    """
    if plain is None:
        return _attend_in_parties(q, scale, piece, like, context, row, head)
    return _attend_plainly(q, scale, piece, like, context, row, head)


class Party(NamedTuple):
    """What a party of queries is, and how far it has come: float32, some of it by lanes.

    Attributes
    ----------
    first : int
        The number of its first query among those of the piece.
    queries, sums : ndarray
        By lines, as `_place` says.
    scores : ndarray
        Of a block of keys, later their weights.
    peaks, totals, shrunk : ndarray of shape (16,)
        Lanes: the largest score so far of a lane's query; the sum of the lane's weights; by what sums shrank last.
    spare : ndarray of shape (16, Dh), of the dtype of keys
        Room for the last keys. What lies behind them there is any number, whose scores nobody sees.
    """

    first: int
    queries: Array
    scores: Array
    peaks: Array
    totals: Array
    shrunk: Array
    sums: Array
    spare: Array


# --- in vector registers ----------------------------------------------------------------------------------------


@compiled()
def _attend_in_parties(
    q: Array, scale: np.float32, piece: Piece, like: Array, context: Array, row: int, head: int
) -> Any:
    """Do `attend_few` with vector registers by name."""
    head_dim = q.shape[2]
    n_queries = piece.rows * piece.group
    n_parties, width = (n_queries + _PARTY - 1) // _PARTY, (head_dim + _CHUNK - 1) // _CHUNK * _CHUNK
    parties = aligned(2 * n_parties * _PARTY * width, q).reshape(2, n_parties, _PARTY * width)
    parties[:] = _ZERO
    queries, sums = parties[0], parties[1]
    state = aligned(2 * n_parties * _LANES, q).reshape(2, n_parties, _LANES)
    peaks, totals = state[0], state[1]
    peaks[:], totals[:] = _LOWEST, _ZERO
    scores, shrunk = aligned(_BLOCK * _PARTY, q), aligned(_LANES, q)
    spare = aligned(_LANES * head_dim, like).reshape(_LANES, head_dim)
    for m in range(n_queries):
        party, size = m // _PARTY, _size_of(n_queries, m)
        for d in range(head_dim):
            number = q[piece.row + m // piece.group, piece.head + m % piece.group, d] * scale
            queries[party, _place(d, m % _PARTY, size, like)] = number
    for start in range(piece.start, piece.stop, _BLOCK):
        for first in range(0, n_queries, _PARTY):
            p, size = first // _PARTY, _size_of(n_queries, first)
            party = Party(first, queries[p], scores, peaks[p], totals[p], shrunk, sums[p], spare)
            if size == 4:
                _pass_block(4, 16, piece, like, start, party)
            elif size == 2:
                _pass_block(2, 8, piece, like, start, party)
            else:
                _pass_block(1, 4, piece, like, start, party)
    highest, total = np.empty(n_queries, np.float32), np.empty(n_queries, np.float32)
    for m in range(n_queries):
        party, query, size = m // _PARTY, m % _PARTY, _size_of(n_queries, m)
        highest[m], total[m] = peaks[party, query], totals[party, query::size].sum()
        for d in range(head_dim):
            number = sums[party, _place(d, query, size, like)]
            context[row + m // piece.group, head + m % piece.group, d] = number / total[m]
    return highest, total


@compiled(inline=True)
def _size_of(n_queries: int, m: int) -> int:
    """Return with how many queries the party of query m goes through the keys; those that are too many are zeros."""
    left = n_queries - m // _PARTY * _PARTY
    return _PARTY if left > 2 else left


@compiled(inline=True)
def _place(d: int, query: int, size: int, like: Array) -> int:
    """Return where number d of a query lies among those of its party; see `npllama.kernels.simd_chunks`."""
    parts = 4 // like.itemsize
    numbers = _LANES * parts
    return (d // numbers * size + query) * numbers + d % parts * _LANES + d % numbers // parts


@compiled(inline=True)
def _pass_block(size: int, n_sums: int, piece: Piece, like: Array, start: int, party: Party) -> None:
    """Bring a party up to date with the block of keys at ``start``.

    Its size is a literal, and so are the vectors of its sums over a chunk of values, four times as many. While keys are
    read, their values are fetched from memory, and meanwhile the next block's keys.
    """
    n_keys, offset = min(_BLOCK, piece.stop - start), start * piece.stride
    _score(size, piece, like, piece.keys + offset, n_keys, piece.values - piece.keys, party)
    n_scores = (n_keys * size + _LANES - 1) // _LANES * _LANES
    for query in range(size):
        begin, end = _seen(piece, party.first + query, start)
        for s in range(begin):
            party.scores[s * size + query] = -np.inf
        for s in range(end, n_scores // size):
            party.scores[s * size + query] = -np.inf
    _weigh(size, n_scores, party)
    ahead = piece.keys - piece.values + _BLOCK * piece.stride
    _add_values(size, n_sums, piece, like, piece.values + offset, n_keys, ahead, party)


@compiled(inline=True)
def _score(size: int, piece: Piece, like: Array, keys: int, n_keys: int, ahead: int, party: Party) -> None:
    """Write a party's scores with some keys, sixteen at a time; fetch what is ``ahead`` bytes behind each key.

    There may be no memory behind the last key: keys that are no sixteen scores are copied to a place that has it.
    """
    n_rows, head_dim, x = _LANES // size, party.spare.shape[1], np.int64(party.queries.ctypes.data)
    for s in range(0, n_keys, n_rows):
        rows, row_bytes = keys + s * piece.stride, piece.stride
        if s + n_rows > n_keys:
            stored = _matrix_at(rows, like, n_keys - s, piece.stride // like.itemsize)
            for r in range(n_keys - s):
                for d in range(head_dim):
                    party.spare[r, d] = stored[r, d]
            rows, row_bytes = np.int64(party.spare.ctypes.data), head_dim * like.itemsize
        tile = no_sums(_LANES)
        for d in range(0, head_dim, _CHUNK):
            place, numbers = rows + d * like.itemsize, x + 4 * size * d
            tile = inner_chunk(tile, size, like, place, row_bytes, _there(head_dim - d), ahead, numbers)
        store(party.scores, s * size, totals_of(tile))


@compiled(inline=True)
def _there(count: int) -> Any:
    """Return the bits of a chunk that has so many numbers, or all if there are more."""
    return np.int64(-1) if count >= _CHUNK else (np.int64(1) << count) - 1


@compiled(inline=True)
def _weigh(size: int, n_scores: int, party: Party) -> None:
    """Turn a party's scores into weights, update peaks and totals, and say by what its sums shrink."""
    before = load(party.peaks, 0)
    peak = before
    for at in range(0, n_scores, _LANES):
        peak = maximum(load(party.scores, at), peak)
    peak = maximum(exchanged(peak, 8), peak)
    peak = maximum(exchanged(peak, 4), peak)
    if size <= 2:
        peak = maximum(exchanged(peak, 2), peak)
    if size == 1:
        peak = maximum(exchanged(peak, 1), peak)
    minus_peak = multiply(peak, broadcast(-_ONE))
    shrunk = _exp2_lanes(add(before, minus_peak))
    total = multiply(load(party.totals, 0), shrunk)
    for at in range(0, n_scores, _LANES):
        weight = _exp2_lanes(add(load(party.scores, at), minus_peak))
        store(party.scores, at, weight)
        total = add(total, weight)
    store(party.peaks, 0, peak)
    store(party.totals, 0, total)
    store(party.shrunk, 0, shrunk)


@compiled(inline=True)
def _add_values(
    size: int, n_sums: int, piece: Piece, like: Array, values: int, n_keys: int, ahead: int, party: Party
) -> None:
    """Shrink a party's sums, and add values times weights; fetch what is ``ahead`` bytes behind each value."""
    sums, weights, parts = party.sums, np.int64(party.scores.ctypes.data), 4 // like.itemsize
    head_dim, address = party.spare.shape[1], np.int64(sums.ctypes.data)
    for at in range(0, sums.shape[0] // _PARTY * size, _LANES):
        store(sums, at, multiply(load(sums, at), broadcast(party.shrunk[at // (_LANES * parts) % size])))
    for d in range(0, head_dim, _CHUNK):
        there, place = _there(head_dim - d), address + 4 * size * d
        tile = sums_at(place, n_sums)
        for s in range(n_keys):
            row = values + s * piece.stride + d * like.itemsize
            tile = outer_chunk(tile, size, like, row, there, ahead, weights + 4 * size * s)
        store_sums(place, tile)


# --- in plain loops ---------------------------------------------------------------------------------------------


@compiled()
def _attend_plainly(q: Array, scale: np.float32, piece: Piece, like: Array, context: Array, row: int, head: int) -> Any:
    """Do `attend_few` in plain loops."""
    head_dim = q.shape[2]
    n_queries = piece.rows * piece.group
    padded = (n_queries + 3) // 4 * 4
    queries = np.zeros((padded, head_dim), np.float32)
    for m in range(n_queries):
        for d in range(head_dim):
            queries[m, d] = q[piece.row + m // piece.group, piece.head + m % piece.group, d] * scale
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
            shrunk = _weigh_row(weights[m], peaks, totals, m)
            for d in range(head_dim):
                sums[m, d] *= shrunk
        values = _block(piece.values + start * piece.stride, piece.stride, n_keys, spare)
        _add_product_plainly(weights, values, padded, n_keys, sums)
    for m in range(n_queries):
        for d in range(head_dim):
            context[row + m // piece.group, head + m % piece.group, d] = sums[m, d] / totals[m]
    return peaks, totals


@compiled(inline=True)
def _block(address: int, stride: int, count: int, spare: Array) -> Any:
    """Return a block of positions where it lies, or a shorter one in ``spare`` (block, Dh)."""
    stored = _matrix_at(address, spare, count, stride // spare.itemsize)
    if count == _BLOCK:
        return stored
    for s in range(count):
        for d in range(spare.shape[1]):
            spare[s, d] = stored[s, d]
    return spare


@compiled()
def _weigh_row(scores: Array, peaks: Array, totals: Array, m: int) -> Any:
    """Turn one query's scores (block,) into weights, update its peak and total, and return what its sums shrink by."""
    peak = peaks[m]
    for s in range(_BLOCK):
        peak = max(peak, scores[s])
    shrunk = exp2(peaks[m] - peak)
    total = _ZERO
    for s in range(_BLOCK):
        weight = exp2(scores[s] - peak)
        scores[s] = weight
        total += weight
    peaks[m], totals[m] = peak, totals[m] * shrunk + total
    return shrunk
