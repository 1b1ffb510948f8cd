"""One piece of attention for many queries, as in a prompt: they stand side by side in **panels** of 32 lanes.

See `npllama.kernels.attend_piece` for what a piece is, and how the softmax is done along the way. Each number of a key
or value meets all lanes at once, sums of some rows stay in registers, and everything that the softmax does is done to
whole vectors.

What is multiplied with bfloat16 keys and values is bfloat16, too (`npllama.rounding`). Where the processor multiplies
pairs of them, the numbers of a query, of a key, and of the weights and values of two positions stand in pairs, and it
takes half of the time. Elsewhere they are widened to float32, which holds them and their products exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npllama.dtypes import Array
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
from npllama.kernels.llvm import WIDE
from npllama.kernels.memory import aligned
from npllama.kernels.simd import add, broadcast, load, maximum, multiply, nearest, store, to_bfloat16, transpose
from npllama.kernels.simd import fused_multiply_add as fma
from npllama.kernels.simd_panels import outer_rows, shrunk_rows
from npllama.kernels.simd_quantised import load_floats
from npllama.kernels.simd_sums import no_sums, store_sums
from npllama.kernels.simd_words import bfloat16_of, rounded_pair
from npllama.kernels.subroutines import subroutine

_LANES = 32  # queries of a panel, two vectors
_LINE = 4 * _LANES  # bytes
#: Rows, of keys or of numbers of a value, whose sums are in registers at a time; there are two vectors of each.
_ROWS = 8 if WIDE else 2
_SUMS = 2 * _ROWS
_PEAKS, _TOTALS, _SHRUNK = range(3)  # rows of a panel's state


@subroutine(counted=True)
def attend_many(
    q: Array,
    scale: np.float32,
    piece: Piece,
    like: Array,
    plain: Array | None,
    pairs: Array | None,
    context: Array,
    row: int,
    head: int,
) -> Any:
    """Do a piece in panels of lanes; see `npllama.kernels.attend_few.attend_few`.

    Where ``plain`` is an array, whichever, the compiler makes what it can of plain loops. Where it is None, vector
    registers are used by name, and no plain loops are compiled; where ``pairs`` is an array, they hold pairs.
    """
    head_dim = q.shape[2]
    width = (head_dim + 31) // 32 * 32
    n_queries = piece.rows * piece.group
    n_panels = (n_queries + _LANES - 1) // _LANES
    per_word = 1 if pairs is None else 2
    lying = aligned(n_panels * _LANES * width // per_word, q).reshape(n_panels, _LANES, width // per_word)
    if n_panels * _LANES * width != n_queries * head_dim:
        lying[:] = _ZERO
    if plain is None:
        _lie_down(q, piece, like, pairs, lying)
    else:
        _lie_down_plainly(q, piece, like, lying)
    queries = _stood_up(lying)
    sums = aligned(n_panels * width * _LANES, q).reshape(n_panels, width, _LANES)
    sums[:] = _ZERO
    state = aligned(n_panels * 3 * _LANES, q).reshape(n_panels, 3, _LANES)
    state[:, _PEAKS], state[:, _TOTALS] = _LOWEST, _ZERO
    scores = aligned(_BLOCK * _LANES, q).reshape(_BLOCK, _LANES)
    keys, values = np.zeros((_BLOCK, width // per_word), np.float32), np.zeros((_BLOCK // per_word, width), np.float32)
    for start in range(piece.start, piece.stop, _BLOCK):
        n_keys = min(_BLOCK, piece.stop - start)
        key_rows, pitch = _keys_at(piece, start, n_keys, head_dim, like, plain, pairs, keys)
        _copy_values(piece, start, n_keys, head_dim, like, pairs, values)
        for panel in range(n_panels):
            first = piece.position + panel * _LANES // piece.group
            last = piece.position + min(panel * _LANES + _LANES - 1, n_queries - 1) // piece.group
            if start > last or start + n_keys <= first - piece.window + 1:
                continue
            height = min(_BLOCK, (last - start) // 8 * 8 + 8)  # keys, in eights, that any lane sees
            if plain is None:
                _score(key_rows, pitch, queries[panel], head_dim, height, pairs, scores)
            else:
                _score_plainly(keys, queries[panel], height, scores)
            if start + _BLOCK > first + 1 or start <= last - piece.window:
                _hide(scores, piece, panel * _LANES, start, height)
            if plain is None:
                _weigh(scores, height, scale, like, pairs, state[panel])
                _add_values(values, scores, head_dim, height, pairs, state[panel], sums[panel])
            else:
                _weigh_plainly(scores, height, scale, like, state[panel])
                _add_values_plainly(values, scores, height, state[panel], sums[panel])
    _deliver(_stood_up(sums), state, piece, head_dim, context, row, head)
    highest, totals = np.empty(n_queries, np.float32), np.empty(n_queries, np.float32)
    for m in range(n_queries):
        highest[m], totals[m] = state[m // _LANES, _PEAKS, m % _LANES], state[m // _LANES, _TOTALS, m % _LANES]
    return highest, totals


# --- layout -----------------------------------------------------------------------------------------------------


@subroutine(counted=True)
def _stood_up(lying: Array) -> Array:
    """Return the transposes (n, B, A) of matrices (n, A, B) of words: a panel's lines are then words of all lanes."""
    n, height, width = lying.shape
    standing = aligned(n * width * height, lying).reshape(n, width, height)
    for i in range(n):
        for a in range(0, height, 16):
            for b in range(0, width, 16):
                at, to = (i * height + a) * width + b, (i * width + b) * height + a
                transpose(lying, at, 4 * width, standing, to, 4 * height)
    return standing


@subroutine(counted=True)
def _lie_down(q: Array, piece: Piece, like: Array, pairs: Array | None, lying: Array) -> None:
    """Write a piece's queries into the rows of panels (n, lanes, N), as words of two bfloat16 if there are pairs."""
    _, n_heads, head_dim = q.shape
    width, spare, numbers = lying.shape[2], np.zeros(32, np.float32), q.ravel()
    for m in range(piece.rows * piece.group):
        at = ((piece.row + m // piece.group) * n_heads + piece.head + m % piece.group) * head_dim
        for d in range(0, head_dim, 32):
            if d + 32 <= head_dim:
                low, high = load(q, at + d), load(q, at + d + 16)
            else:
                for i in range(head_dim - d):
                    spare[i] = numbers[at + d + i]
                low, high = load(spare, 0), load(spare, 16)
            if pairs is None:
                if like.itemsize == 2:
                    words = rounded_pair(low, high)
                    low, high = bfloat16_of(words, 0), bfloat16_of(words, 1)
                store(lying, m * width + d, low)
                store(lying, m * width + d + 16, high)
            else:
                store(lying, m * width + d // 2, to_bfloat16(low, high))


@subroutine()
def _keys_at(
    piece: Piece,
    start: int,
    n_keys: int,
    head_dim: int,
    like: Array,
    plain: Array | None,
    pairs: Array | None,
    block: Array,
) -> Any:
    """Return where the keys of a block are as words, and the bytes from one to the next.

    That is where they lie, unless they have to be widened, have half a word at their end, or there may be no memory
    behind them: then they are copied to ``block``.
    """
    address = piece.keys + start * piece.stride
    is_narrow = like.itemsize == 2
    if n_keys == _BLOCK and plain is None and (head_dim % 2 == 0 if pairs is not None else not is_narrow):
        return address, piece.stride
    if pairs is None:
        _widen(address, piece.stride, like, n_keys, head_dim, block)
    else:
        _copy(address, piece.stride, like, n_keys, head_dim, block)
    return np.int64(block.ctypes.data), 4 * block.shape[1]


@subroutine()
def _copy_values(
    piece: Piece, start: int, n_keys: int, head_dim: int, like: Array, pairs: Array | None, block: Array
) -> None:
    """Write the values of a block as words of one position, or of two where there are pairs."""
    address = piece.values + start * piece.stride
    if pairs is None:
        _widen(address, piece.stride, like, n_keys, head_dim, block)
    else:
        _pair_up(address, piece.stride, like, n_keys, head_dim, block)


@subroutine(counted=True)
def _widen(address: int, stride: int, like: Array, count: int, width: int, block: Array) -> None:
    """Copy the first ``width`` numbers of ``count`` positions into a block of float32."""
    stored = _matrix_at(address, like, count, stride // like.itemsize)
    for s in range(count):
        for d in range(width):
            block[s, d] = widened(stored[s, d])


@subroutine(counted=True)
def _copy(address: int, stride: int, like: Array, count: int, width: int, block: Array) -> None:
    """Copy the first ``width`` numbers of ``count`` positions, bfloat16, into a block of words of two."""
    stored = _matrix_at(address, like, count, stride // like.itemsize)
    copies = _matrix_at(np.int64(block.ctypes.data), like, block.shape[0], 2 * block.shape[1])
    for s in range(count):
        for d in range(width):
            copies[s, d] = stored[s, d]


@subroutine(counted=True)
def _pair_up(address: int, stride: int, like: Array, count: int, width: int, block: Array) -> None:
    """Do the same into words (block/2, width) of two positions, the first in the lower half; there may be no second."""
    stored = _matrix_at(address, like, count, stride // like.itemsize)
    words = block.view(np.uint32)
    for s in range(0, count - 1, 2):
        for d in range(width):
            words[s // 2, d] = np.uint32(stored[s, d]) | (np.uint32(stored[s + 1, d]) << np.uint32(16))
    if count % 2 == 1:
        for d in range(width):
            words[count // 2, d] = np.uint32(stored[count - 1, d])


@subroutine()
def _deliver(contexts: Array, state: Array, piece: Piece, head_dim: int, context: Array, row: int, head: int) -> None:
    """Write the sums of panels (n, lanes, N), divided by their totals, to context (T, H, Dh) from a row and head on."""
    for m in range(piece.rows * piece.group):
        panel, lane = m // _LANES, m % _LANES
        part = _ONE / state[panel, _TOTALS, lane]
        for d in range(head_dim):
            context[row + m // piece.group, head + m % piece.group, d] = contexts[panel, lane, d] * part


@subroutine()
def _hide(scores: Array, piece: Piece, first_query: int, start: int, height: int) -> None:
    """Set the scores (height, lanes) of keys that a lane's query does not see to -inf."""
    for lane in range(_LANES):
        first, end = _seen(piece, first_query + lane, start)
        for s in range(min(first, height)):
            scores[s, lane] = -np.inf
        for s in range(end, height):
            scores[s, lane] = -np.inf


# --- in vector registers ----------------------------------------------------------------------------------------


@subroutine()
def _score(
    row: int, pitch: int, queries: Array, head_dim: int, height: int, pairs: Array | None, scores: Array
) -> None:
    """Fill the first ``height`` scores (block, lanes) with keys times queries (N, lanes), some keys at a time.

    The first key lies at ``row``, the others behind it, ``pitch`` bytes apart.
    """
    lines, out = np.int64(queries.ctypes.data), np.int64(scores.ctypes.data)
    depth = head_dim if pairs is None else (head_dim + 1) // 2
    for _ in range(0, height, _ROWS):
        tile = no_sums(_SUMS)
        for n in range(depth):
            tile = outer_rows(tile, pairs, lines + _LINE * n, row + 4 * n, pitch)
        store_sums(out, tile)
        row += _ROWS * pitch
        out += _ROWS * _LINE


@subroutine()
def _weigh(scores: Array, height: int, scale: np.float32, like: Array, pairs: Array | None, state: Array) -> None:
    """Turn scores (height, lanes) into weights, or words of pairs of them, and bring a panel's state up to date."""
    place, at = np.int64(scores.ctypes.data), np.int64(state.ctypes.data)
    for lane in range(0, _LINE, _LINE // 2):
        highest = broadcast(_LOWEST)
        for s in range(height):
            highest = maximum(load_floats(place, _LINE * s + lane), highest)
        before = load_floats(at, lane + _LINE * _PEAKS)
        peak = maximum(nearest(fma(highest, broadcast(scale), broadcast(_HALF))), before)
        minus_peak = multiply(peak, broadcast(-_ONE))
        shrunk = _exp2_lanes(add(before, minus_peak))
        total = multiply(load_floats(at, lane + _LINE * _TOTALS), shrunk)
        for s in range(0, height, 2):
            low = _exp2_lanes(fma(load_floats(place, _LINE * s + lane), broadcast(scale), minus_peak))
            high = _exp2_lanes(fma(load_floats(place, _LINE * (s + 1) + lane), broadcast(scale), minus_peak))
            words = rounded_pair(low, high)
            if like.itemsize == 2:
                low, high = bfloat16_of(words, 0), bfloat16_of(words, 1)
            if pairs is None:
                store(place, _LINE * s + lane, low)
                store(place, _LINE * (s + 1) + lane, high)
            else:
                store(place, _LINE * (s // 2) + lane, words)
            total = add(total, add(low, high))
        store(at, lane + _LINE * _PEAKS, peak)
        store(at, lane + _LINE * _TOTALS, total)
        store(at, lane + _LINE * _SHRUNK, shrunk)


@subroutine()
def _add_values(
    values: Array, weights: Array, head_dim: int, height: int, pairs: Array | None, state: Array, sums: Array
) -> None:
    """Shrink sums (N, lanes), and add values · weights (height, lanes)."""
    step = 4 * values.shape[1]
    numbers, lines, out = np.int64(values.ctypes.data), np.int64(weights.ctypes.data), np.int64(sums.ctypes.data)
    factors = np.int64(state.ctypes.data) + _LINE * _SHRUNK
    depth = height if pairs is None else height // 2
    for d in range(0, head_dim, _ROWS):
        tile = shrunk_rows(out, _SUMS, factors)
        for n in range(depth):
            tile = outer_rows(tile, pairs, lines + _LINE * n, numbers + 4 * d + step * n, 4)
        store_sums(out, tile)
        out += _ROWS * _LINE


# --- in plain loops ---------------------------------------------------------------------------------------------


@subroutine()
def _lie_down_plainly(q: Array, piece: Piece, like: Array, lying: Array) -> None:
    """Do `_lie_down` in plain loops."""
    for m in range(piece.rows * piece.group):
        for d in range(q.shape[2]):
            number = q[piece.row + m // piece.group, piece.head + m % piece.group, d]
            lying[m // _LANES, m % _LANES, d] = widened(narrowed(number, like))


@subroutine()
def _score_plainly(keys: Array, queries: Array, height: int, scores: Array) -> None:
    """Do `_score` in plain loops."""
    scores[:height] = _ZERO
    add_product_plainly(keys, queries, height, keys.shape[1], scores)


@subroutine(counted=True)
def _weigh_plainly(scores: Array, height: int, scale: np.float32, like: Array, state: Array) -> None:
    """Do `_weigh` in plain loops."""
    highest = np.full(_LANES, _LOWEST)
    for s in range(height):
        for lane in range(_LANES):
            highest[lane] = max(highest[lane], scores[s, lane])
    for lane in range(_LANES):
        before = state[_PEAKS, lane]
        state[_PEAKS, lane] = max(before, np.rint(highest[lane] * scale + _HALF))
        state[_SHRUNK, lane] = exp2(before - state[_PEAKS, lane])
        state[_TOTALS, lane] *= state[_SHRUNK, lane]
    for s in range(height):
        for lane in range(_LANES):
            weight = widened(narrowed(exp2(scores[s, lane] * scale - state[_PEAKS, lane]), like))
            scores[s, lane] = weight
            state[_TOTALS, lane] += weight


@subroutine()
def _add_values_plainly(values: Array, weights: Array, height: int, state: Array, sums: Array) -> None:
    """Do `_add_values` in plain loops."""
    for d in range(sums.shape[0]):
        for lane in range(_LANES):
            sums[d, lane] *= state[_SHRUNK, lane]
    add_product_plainly(values.T, weights, sums.shape[0], height, sums)


@subroutine()
def add_product_plainly(a: Array, b: Array, height: int, depth: int, c: Array) -> None:
    """Add a (P, N) · b (N, lanes) to c (P, lanes) in as many rows, and over as much of N, as the numbers say.

    Rows and depth come in fours: sixteen numbers of ``a`` at a time, which the compiler keeps in registers beside
    vectors along the rows of c. Those of b may be longer, and bfloat16.
    """
    for p in range(0, height, 4):
        for n in range(0, depth, 4):
            a00, a01, a02, a03 = a[p, n], a[p, n + 1], a[p, n + 2], a[p, n + 3]
            a10, a11, a12, a13 = a[p + 1, n], a[p + 1, n + 1], a[p + 1, n + 2], a[p + 1, n + 3]
            a20, a21, a22, a23 = a[p + 2, n], a[p + 2, n + 1], a[p + 2, n + 2], a[p + 2, n + 3]
            a30, a31, a32, a33 = a[p + 3, n], a[p + 3, n + 1], a[p + 3, n + 2], a[p + 3, n + 3]
            for m in range(c.shape[1]):
                b0, b1, b2, b3 = widened(b[n, m]), widened(b[n + 1, m]), widened(b[n + 2, m]), widened(b[n + 3, m])
                c[p, m] += a00 * b0 + a01 * b1 + a02 * b2 + a03 * b3
                c[p + 1, m] += a10 * b0 + a11 * b1 + a12 * b2 + a13 * b3
                c[p + 2, m] += a20 * b0 + a21 * b1 + a22 * b2 + a23 * b3
                c[p + 3, m] += a30 * b0 + a31 * b1 + a32 * b2 + a33 * b3
