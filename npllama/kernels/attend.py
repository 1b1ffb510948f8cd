"""Twins of `npllama.ops.softmax`, `attention` and `attentions`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import prange
from numpy.typing import NDArray

from npllama.dtypes import Array
from npllama.kernels.attend_few import attend_few, attend_few_plainly
from npllama.kernels.attend_many import attend_many
from npllama.kernels.attend_piece import _BLOCK, Piece, exp2
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.features import choose, host_features, ladder
from npllama.kernels.jit import compiled, exp
from npllama.kernels.subroutines import subroutine

#: Taps that `attention` does not materialise: scores and probabilities live for a block of keys at a time.
UNMATERIALISED = frozenset({"scores", "probs"})

#: New tokens of a sequence up to which a piece is dot products along memory rather than panels of lanes. Whatever is
#: below, a token's numbers do not depend on the tokens beside it: those of a draft are what they would be alone.
_FEW = 16
#: Queries of a key/value head that go through a block of keys together; a panel is 32.
_TILE = 128
#: Keys of a piece where there is only one tile of queries, so that a long cache is more than one thread's work.
_SPAN = 512
_UNLIMITED = 1 << 62

# Arrays of which only the dtype matters: that of keys and values.
_NUMBERS: Array = np.empty(0, np.float32)
_BITS: Array = np.empty(0, np.uint16)

_KEYS, _VALUES, _STRIDE, _HEAD_STRIDE, _COUNT, _LENGTH, _ROW = range(7)  # columns of a table of sequences
_SEQUENCE, _HEAD, _FIRST, _END, _START, _STOP, _SPANS, _PART = range(8)  # columns of a table of pieces


def softmax(scores: Array) -> Array:
    """Turn each row of scores into probabilities. See `npllama.ops.softmax`."""
    probs = np.array(scores, order="C")
    _softmax(probs.reshape(-1, scores.shape[-1]))
    return probs


@dataclass(frozen=True, slots=True)
class Attending:
    """Attention on one path.

    Attributes
    ----------
    path : str
        One of `npllama.kernels.features.PATHS`. All but the portable one use vector registers by name.
    """

    path: str

    def attention(
        self,
        q: Array,
        keys: Array,
        values: Array,
        tap: Callable[[str, Array], Array],
        *,
        divisor: float | None = None,
        window: int | None = None,
    ) -> Array:
        """Let each new position gather values from the positions up to its own. See `npllama.ops.attention`.

        Memory does not grow with S, and the taps ``scores`` and ``probs`` are never there to show. Keys and values may
        be bfloat16 (that of ml_dtypes), as a cache can hold them; what they are multiplied with is rounded to it then.
        The numbers do not depend on how many threads there are.
        """
        return self.attentions(q, (len(q),), ((keys, values),), divisor=divisor, window=window)

    def attentions(
        self,
        q: Array,
        counts: Sequence[int],
        caches: Sequence[tuple[Array, Array]],
        *,
        divisor: float | None = None,
        window: int | None = None,
    ) -> Array:
        """Do `attention` to several sequences laid end to end, in one parallel loop.

        The part of each sequence is, bit by bit, what it would be alone. See `npllama.ops.attentions`.
        """
        q = np.ascontiguousarray(q)
        context = np.empty_like(q)
        readable, like = _readable(caches)
        scale = np.float32(math.log2(math.e) / (math.sqrt(q.shape[2]) if divisor is None else divisor))
        limit = _UNLIMITED if window is None else window
        kind = like.dtype.name, self.path
        many, few = many_for(*kind), few_for(*kind)  # in this order: another process begins with the few
        table, n_kv_heads = _table(counts, readable), readable[0][0].shape[1]
        _attend(q, table, n_kv_heads, scale, limit, like, *_means(*kind), context, few, many)
        return context


@cache
def attending(forced: str | None = None) -> Attending:
    """Return attention on the best path for this processor, or on a forced one.

    Raises
    ------
    ParameterError, UnsupportedError
        See `npllama.kernels.features.choose`.
    """
    return Attending(choose(host_features(), forced))


def attention(
    q: Array,
    keys: Array,
    values: Array,
    tap: Callable[[str, Array], Array],
    *,
    divisor: float | None = None,
    window: int | None = None,
) -> Array:
    """Let each new position gather values from the positions up to its own. See `npllama.ops.attention`."""
    return attending().attention(q, keys, values, tap, divisor=divisor, window=window)


def attentions(
    q: Array,
    counts: Sequence[int],
    caches: Sequence[tuple[Array, Array]],
    *,
    divisor: float | None = None,
    window: int | None = None,
) -> Array:
    """Do `attention` to several sequences laid end to end. See `Attending.attentions`."""
    return attending().attentions(q, counts, caches, divisor=divisor, window=window)


def _readable(caches: Sequence[tuple[Array, Array]]) -> tuple[Sequence[tuple[Array, Array]], Array]:
    """Return keys and values that the kernels can read, and an empty array of the dtype in which they will.

    That is those given, unless they are neither all float32 nor all bfloat16, or the numbers of a head do not lie in a
    row.
    """
    dtype = caches[0][0].dtype
    if any(not keys.dtype == values.dtype == dtype for keys, values in caches):
        dtype = _NUMBERS.dtype
    like = _NUMBERS
    if dtype != _NUMBERS.dtype:
        dtype, like = (dtype, _BITS) if dtype.name == "bfloat16" else (_NUMBERS.dtype, _NUMBERS)
    if all(
        keys.dtype == values.dtype == dtype and keys.strides == values.strides and keys.strides[2] == dtype.itemsize
        for keys, values in caches
    ):
        return caches, like
    return [(np.ascontiguousarray(keys, dtype), np.ascontiguousarray(values, dtype)) for keys, values in caches], like


def _table(counts: Sequence[int], caches: Sequence[tuple[Array, Array]]) -> NDArray[np.int64]:
    """Return a row for each sequence, with the columns named above: a kernel cannot take a list of arrays."""
    table = np.empty((len(counts), 7), np.int64)
    row = 0
    for i, (count, (keys, values)) in enumerate(zip(counts, caches, strict=True)):
        stride, head_stride, _ = keys.strides
        table[i] = keys.ctypes.data, values.ctypes.data, stride, head_stride, count, len(keys), row
        row += count
    return table


@cache
def _means(dtype: str, path: str) -> tuple[Array | None, Array | None]:
    """Return ``plain`` and ``pairs`` as `_do_few` and `_do_many` take them."""
    pairs = "avx512bf16" in ladder(path) and dtype == _BITS.dtype
    return _NUMBERS if path == "portable" else None, _NUMBERS if pairs else None


def _work(dtype: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return arguments of the types that `_do_few` and `_do_many` take, before and behind the means."""
    cube, square = np.empty((1, 1, 1), np.float32), np.empty((1, 1), np.float32)
    table, like = np.empty((1, 8), np.int64), np.empty(0, dtype)
    return (cube, table, table[0], 1, np.float32(1), 1, like), (cube, square, square, cube)


@cache
def few_for(dtype: str, path: str) -> int:
    """Return the address of `_do_few` on a path, for keys and values of "float32", or "uint16" for bfloat16."""
    work, rooms = _work(dtype)
    return address_of(_do_few, *work, _means(dtype, path)[0], *rooms)


@cache
def many_for(dtype: str, path: str) -> int:
    """Return the address of `_do_many`; see `few_for`."""
    work, rooms = _work(dtype)
    return address_of(_do_many, *work, *_means(dtype, path), *rooms)


@compiled(parallel=True)
def _attend(
    q: Array,
    table: Array,
    n_kv_heads: int,
    scale: np.float32,
    window: int,
    like: Array,
    plain: Array | None,
    pairs: Array | None,
    context: Array,
    few: int,
    many: int,
) -> None:
    """Fill context (T, H, Dh), the pieces shared between threads, ``few`` and ``many`` from the like of `few_for`.

    Where the keys of a query are split between pieces, each fills a part of its own, and the parts are merged.
    """
    group = q.shape[1] // n_kv_heads
    tile = rows_of_tile(group)
    pieces, n_parts = _pieces(table, n_kv_heads, tile, window)
    rows = 0
    for i in range(len(table)):
        rows = max(rows, min(tile, table[i, _COUNT]))
    parts = np.empty((n_parts * rows, group, q.shape[2]), np.float32)
    peaks, totals = np.empty((n_parts, rows * group), np.float32), np.empty((n_parts, rows * group), np.float32)
    for i in prange(len(pieces)):
        work, rooms = (q, table, pieces[i], group, scale, window, like, plain), (parts, peaks, totals, context)
        if table[pieces[i, _SEQUENCE], _COUNT] > _FEW:
            call_at(many, (*work, pairs, *rooms))
        else:
            call_at(few, (*work, *rooms))
    _merge(table, pieces, group, parts, peaks, totals, context)


@compiled()
def _do_few(
    q: Array,
    table: Array,
    line: Array,
    group: int,
    scale: np.float32,
    window: int,
    like: Array,
    plain: Array | None,
    parts: Array,
    peaks: Array,
    totals: Array,
    context: Array,
) -> None:
    """Do the piece of one line of the table of pieces, of up to 16 rows: fill its part, or its share of the context.

    Where ``plain`` is an array, whichever, that is done in plain loops. Where it is None, vector registers are used by
    name, and no plain loops are compiled.
    """
    piece = _piece_of(table, line, group, window)
    out, row, head = _where_to(line, piece, parts, peaks, context)
    if plain is None:
        highest, total = attend_few(q, scale, piece, like, out, row, head)
    else:
        highest, total = attend_few_plainly(q, scale, piece, like, out, row, head)
    _note(line, piece, highest, total, peaks, totals)


@compiled()
def _do_many(
    q: Array,
    table: Array,
    line: Array,
    group: int,
    scale: np.float32,
    window: int,
    like: Array,
    plain: Array | None,
    pairs: Array | None,
    parts: Array,
    peaks: Array,
    totals: Array,
    context: Array,
) -> None:
    """Do the same of more rows; where ``pairs`` is an array, with instructions for pairs of bfloat16."""
    piece = _piece_of(table, line, group, window)
    out, row, head = _where_to(line, piece, parts, peaks, context)
    highest, total = attend_many(q, scale, piece, like, plain, pairs, out, row, head)
    _note(line, piece, highest, total, peaks, totals)


@subroutine(inline=True)
def _piece_of(table: Array, line: Array, group: int, window: int) -> Piece:
    """Return the piece of one line of the table of pieces."""
    sequence = table[line[_SEQUENCE]]
    offset = line[_HEAD] * sequence[_HEAD_STRIDE]
    return Piece(
        sequence[_ROW] + line[_FIRST],
        line[_END] - line[_FIRST],
        line[_HEAD] * group,
        group,
        sequence[_LENGTH] - sequence[_COUNT] + line[_FIRST],
        sequence[_KEYS] + offset,
        sequence[_VALUES] + offset,
        sequence[_STRIDE],
        line[_START],
        line[_STOP],
        window,
    )


@subroutine(inline=True, counted=True)
def _where_to(line: Array, piece: Piece, parts: Array, peaks: Array, context: Array) -> Any:
    """Return the array that a piece fills, parts or context, and from which row and head on."""
    if line[_SPANS] > 1:
        return parts, line[_PART] * (peaks.shape[1] // piece.group), 0
    return context, piece.row, piece.head


@subroutine(inline=True)
def _note(line: Array, piece: Piece, highest: Array, total: Array, peaks: Array, totals: Array) -> None:
    """Write down the peaks and totals of a part."""
    if line[_SPANS] > 1:
        for m in range(piece.rows * piece.group):
            peaks[line[_PART], m], totals[line[_PART], m] = highest[m], total[m]


@compiled()
def rows_of_tile(group: int) -> int:
    """Return how many rows go through a block of keys together, where ``group`` heads share a key/value head."""
    return max(_FEW, _TILE // group)


@subroutine(counted=True)
def _pieces(table: Array, n_kv_heads: int, tile: int, window: int) -> Any:
    """Divide the work: return a row for each piece, with the columns named above, and the number of parts.

    A piece is one tile of rows of one sequence and key/value head, over all keys that they see. Where a sequence has
    no more rows than a tile, and more keys than a span, there is a piece for each span instead, which fills a part.
    The division does not depend on the number of threads, and where spans begin and end not on the rows.

    Of many tiles the first are little work and the last much. They are taken from both ends in turn: equal runs of
    pieces are then equal work.
    """
    n_pieces = 0
    for i in range(len(table)):
        count, length = table[i, _COUNT], table[i, _LENGTH]
        n_tiles, begin = -(-count // tile), _first_block(length, count, window)
        n_pieces += n_kv_heads * (n_tiles if n_tiles > 1 else _count_spans(begin, length))
    pieces = np.empty((n_pieces, 8), np.int64)
    at = n_parts = 0
    for i in range(len(table)):
        count, length = table[i, _COUNT], table[i, _LENGTH]
        past, n_tiles, begin = length - count, -(-count // tile), _first_block(length, count, window)
        for head in range(n_kv_heads):
            if n_tiles > 1:
                for turn in range(n_tiles):
                    first = tile * (turn // 2 if turn % 2 == 0 else n_tiles - 1 - turn // 2)
                    end = min(first + tile, count)
                    _write(pieces[at], i, head, first, end, max(0, past + first - window + 1), past + end, 1, 0)
                    at += 1
            else:
                n_spans = _count_spans(begin, length)
                for end in range(begin // _SPAN * _SPAN + _SPAN, length + _SPAN, _SPAN):
                    start = max(begin, end - _SPAN)
                    _write(pieces[at], i, head, 0, count, start, min(end, length), n_spans, n_parts)
                    at += 1
                    n_parts += n_spans > 1
    return pieces, n_parts


@subroutine(inline=True)
def _first_block(length: int, count: int, window: int) -> int:
    """Return where the first block of keys begins that any of the last ``count`` of ``length`` positions sees."""
    return max(0, length - count - window + 1) // _BLOCK * _BLOCK


@subroutine(inline=True)
def _count_spans(begin: int, length: int) -> int:
    """Return in how many spans there are positions from ``begin`` to before ``length``."""
    return (length - 1) // _SPAN - begin // _SPAN + 1


@subroutine(inline=True)
def _write(
    line: Array, sequence: int, head: int, first: int, end: int, start: int, stop: int, spans: int, part: int
) -> None:
    """Fill a line of the table of pieces."""
    line[_SEQUENCE], line[_HEAD], line[_FIRST], line[_END] = sequence, head, first, end
    line[_START], line[_STOP], line[_SPANS], line[_PART] = start, stop, spans, part


@subroutine(counted=True)
def _merge(table: Array, pieces: Array, group: int, parts: Array, peaks: Array, totals: Array, context: Array) -> None:
    """Fill the rows of context (T, H, Dh) whose keys were split with the means of their parts.

    A part counts for its total, in units of its peak. A span of which a query sees no key is no part of its mean; where
    that leaves one, it is that one, bit by bit.
    """
    rows = peaks.shape[1] // group  # of a part
    gathered = np.empty(context.shape[2], np.float32)
    at = 0
    while at < len(pieces):
        line, sequence = pieces[at], table[pieces[at, _SEQUENCE]]
        at += line[_SPANS]
        begin, end = line[_PART], line[_PART] + line[_SPANS]
        for m in range(sequence[_COUNT] * group if line[_SPANS] > 1 else 0):
            peak, n_seen = peaks[begin, m], 0
            for part in range(begin, end):
                peak = max(peak, peaks[part, m])
                n_seen += totals[part, m] != 0
            gathered[:] = 0
            total = np.float32(0)
            for part in range(begin, end):
                if totals[part, m] == 0:  # its numbers are none
                    continue
                weight = totals[part, m] * exp2(peaks[part, m] - peak) if n_seen > 1 else np.float32(1)
                total += weight
                for d in range(len(gathered)):
                    gathered[d] += weight * parts[part * rows + m // group, m % group, d]
            for d in range(len(gathered)):
                context[sequence[_ROW] + m // group, line[_HEAD] * group + m % group, d] = gathered[d] / total


@compiled(parallel=True)
def _softmax(scores: Array) -> None:
    """Replace each row of scores (N, S) by its probabilities."""
    n_rows, n_all = scores.shape
    for row in prange(n_rows):
        highest = np.float32(-np.inf)
        for s in range(n_all):
            highest = max(highest, scores[row, s])
        total = np.float32(0)
        for s in range(n_all):
            scores[row, s] = exp(scores[row, s] - highest)
            total += scores[row, s]
        for s in range(n_all):
            scores[row, s] /= total
