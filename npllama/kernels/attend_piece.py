"""One piece of attention: some queries, and the keys and values of a range of positions.

Keys are taken in blocks, so that nothing as large as queries times keys is ever stored, and the softmax is done along
the way: the largest score so far stands beside each sum, and what was summed before is scaled down whenever a larger
one comes (Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135). Scores are kept in units of ln 2, so that a
weight is ``2**(score - largest)``.

There are two ways through a piece. A few queries, as in decoding, are dot products with keys that stream by from
memory (`npllama.kernels.attend_few`). Many stand side by side in **panels** of 32 lanes (`attend_many`): each number of
a key or value meets all lanes at once, sums stay in registers, and everything that the softmax does is done to whole
vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

from npllama.dtypes import Array
from npllama.kernels.jit import compiled, widened
from npllama.kernels.memory import aligned
from npllama.kernels.simd import add, broadcast, load, maximum, multiply, nearest, power_of_two, store, transpose
from npllama.kernels.simd import fused_multiply_add as fma

_BLOCK = 64  # keys at a time: they, their values, a panel and its scores fit into a first-level cache
_LANES = 32  # queries of a panel, two vectors
_LOWEST = np.float32(-3e38)  # below every score, but finite: the difference of two is no NaN
_ZERO, _ONE = np.float32(0), np.float32(1)

# 2**r for r from -1/2 to 1/2 as a Taylor polynomial, sum of (r ln 2)**n / n!, right to 6e-9.
_C1, _C2, _C3 = np.float32(0.6931471805599453), np.float32(0.2402265069591007), np.float32(0.05550410866482158)
_C4, _C5, _C6 = np.float32(0.009618129107628477), np.float32(0.0013333558146428443), np.float32(0.00015403530393381608)
_C7 = np.float32(1.5252733804059841e-05)
_SMALLEST = np.float32(-127)  # 2**-127 and less count as 0


class Piece(NamedTuple):
    """Which queries see which keys.

    Attributes
    ----------
    row, rows : int
        The queries: rows [row, row + rows) of q (T, H, Dh) ...
    head, group : int
        ... and in each the heads [head, head + group), which share a key/value head.
    position : int
        Where the first row stands in its sequence.
    keys, values : int
        Addresses of the key/value head's first position.
    stride : int
        Bytes from one position to the next.
    start, stop : int
        The keys: positions [start, stop), as far as a query may see them.
    window : int
        How many positions a query sees, its own included.
    """

    row: int
    rows: int
    head: int
    group: int
    position: int
    keys: int
    values: int
    stride: int
    start: int
    stop: int
    window: int


def _matrix(context: Any, address: Any, like: Any, rows: Any, columns: Any) -> Any:
    """Say how to turn an address into a C-contiguous array of the dtype of ``like``."""
    result = types.Array(like.dtype, 2, "C")

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, _, rows, columns = arguments
        number = context.get_data_type(like.dtype)
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(number))
        array = context.make_array(result)(context, builder)
        arrayobj.populate_array(  # type: ignore[no-untyped-call]
            array,
            data=builder.inttoptr(address, number.as_pointer()),
            shape=[rows, columns],
            strides=[builder.mul(columns, itemsize), itemsize],
            itemsize=itemsize,
            meminfo=None,
        )
        return array._getvalue()

    return result(types.int64, like, types.int64, types.int64), code


#: ``_matrix_at(address, like, rows, columns)``, for use inside kernels. Whoever calls keeps the memory alive.
_matrix_at: Any = intrinsic(_matrix)


@compiled()
def exp2(x: Any) -> Any:
    """Two to the power of a float32 that is not above 0; a NaN stays one."""
    x = _SMALLEST if x < _SMALLEST else x
    n = np.rint(x)
    r = x - n
    p = _C7 * r + _C6
    p = p * r + _C5
    p = p * r + _C4
    p = p * r + _C3
    p = p * r + _C2
    p = p * r + _C1
    p = p * r + _ONE
    return p * np.uint32((np.int32(n) + 127) << 23).view(np.float32)  # 2**n, by its exponent bits


@compiled(inline=True)
def _exp2_lanes(x: Any) -> Any:
    """Do `exp2` to a vector."""
    x = maximum(broadcast(_SMALLEST), x)
    n = nearest(x)
    r = fma(n, broadcast(-_ONE), x)
    p = fma(broadcast(_C7), r, broadcast(_C6))
    p = fma(p, r, broadcast(_C5))
    p = fma(p, r, broadcast(_C4))
    p = fma(p, r, broadcast(_C3))
    p = fma(p, r, broadcast(_C2))
    p = fma(p, r, broadcast(_C1))
    p = fma(p, r, broadcast(_ONE))
    return multiply(p, power_of_two(n))


@compiled(inline=True)
def _seen(piece: Piece, m: int, start: int) -> Any:
    """Return which of a block's keys [first, end) query m of a piece sees."""
    position = piece.position + m // piece.group
    first = min(max(position - piece.window + 1 - start, 0), _BLOCK)
    end = min(max(min(position + 1, piece.stop) - start, 0), _BLOCK)
    return first, end


# --- many queries -----------------------------------------------------------------------------------------------


@compiled()
def attend_many(
    q: Array, scale: np.float32, piece: Piece, like: Array, plain: Array | None, context: Array, row: int, head: int
) -> Any:
    """Do a piece in panels of lanes; see `attend_few`.

    Where ``plain`` is an array, whichever, the compiler makes what it can of plain loops. Where it is None, vector
    registers are used by name; what is not used is not compiled.
    """
    head_dim = q.shape[2]
    width = (head_dim + 15) // 16 * 16
    n_queries = piece.rows * piece.group
    n_panels = (n_queries + _LANES - 1) // _LANES
    lying = aligned(n_panels * _LANES * width, q).reshape(n_panels, _LANES, width)
    queries = aligned(n_panels * width * _LANES, q).reshape(n_panels, width, _LANES)
    sums = aligned(n_panels * width * _LANES, q).reshape(n_panels, width, _LANES)
    lying[:], sums[:] = _ZERO, _ZERO
    for m in range(n_queries):
        for d in range(head_dim):
            lying[m // _LANES, m % _LANES, d] = q[piece.row + m // piece.group, piece.head + m % piece.group, d] * scale
    _turn(lying, queries)
    peaks = np.full((n_panels, _LANES), _LOWEST, np.float32)
    totals = np.zeros((n_panels, _LANES), np.float32)
    keys, values = np.zeros((_BLOCK, width), np.float32), np.zeros((_BLOCK, width), np.float32)
    scores = aligned(_BLOCK * _LANES, q).reshape(_BLOCK, _LANES)
    for start in range(piece.start, piece.stop, _BLOCK):
        n_keys = min(_BLOCK, piece.stop - start)
        _widen(piece.keys + start * piece.stride, piece.stride, like, n_keys, head_dim, keys)
        _widen(piece.values + start * piece.stride, piece.stride, like, n_keys, head_dim, values)
        for panel in range(n_panels):
            first = piece.position + panel * _LANES // piece.group
            last = piece.position + min(panel * _LANES + _LANES - 1, n_queries - 1) // piece.group
            if start > last or start + n_keys <= first - piece.window + 1:
                continue
            height = min(_BLOCK, (last - start) // 8 * 8 + 8)  # keys, in eights, that any lane sees
            scores[:] = _ZERO
            if plain is None:
                _add_product(keys, queries[panel], height, width, scores)
            else:
                _add_product_plainly(keys, queries[panel], height, width, scores)
            if start + _BLOCK > first + 1 or start <= last - piece.window:
                _hide(scores, piece, panel * _LANES, start)
            if plain is None:
                _weigh(scores, peaks[panel], totals[panel], sums[panel])
                _add_product(values.T, scores, width, height, sums[panel])
            else:
                _weigh_plainly(scores, peaks[panel], totals[panel], sums[panel])
                _add_product_plainly(values.T, scores, width, height, sums[panel])
    _turn(sums, lying)
    for m in range(n_queries):
        panel, lane = m // _LANES, m % _LANES
        for d in range(head_dim):
            context[row + m // piece.group, head + m % piece.group, d] = lying[panel, lane, d] / totals[panel, lane]
    return peaks.reshape(-1), totals.reshape(-1)


@compiled()
def _turn(source: Array, target: Array) -> None:
    """Fill target (n, B, A) with the transposes of source (n, A, B), in squares of 16."""
    n, height, width = source.shape
    for i in range(n):
        for a in range(0, height, 16):
            for b in range(0, width, 16):
                at, to = (i * height + a) * width + b, (i * width + b) * height + a
                transpose(source, at, 4 * width, target, to, 4 * height)


@compiled()
def _widen(address: int, stride: int, like: Array, count: int, width: int, block: Array) -> None:
    """Copy the first ``width`` numbers of ``count`` positions into a block of float32."""
    stored = _matrix_at(address, like, count, stride // like.itemsize)
    for s in range(count):
        for d in range(width):
            block[s, d] = widened(stored[s, d])


@compiled()
def _hide(scores: Array, piece: Piece, first_query: int, start: int) -> None:
    """Set the scores (block, lanes) of keys that a lane's query does not see to -inf."""
    for lane in range(_LANES):
        first, end = _seen(piece, first_query + lane, start)
        for s in range(first):
            scores[s, lane] = -np.inf
        for s in range(end, _BLOCK):
            scores[s, lane] = -np.inf


@compiled()
def _add_product(a: Array, b: Array, height: int, depth: int, c: Array) -> None:
    """Add a (P, N) · b (N, lanes) to c (P, lanes) in as many rows, and over as much of N, as the numbers say.

    Rows come in eights: their sums stay in 16 registers.
    """
    for p in range(0, height, 8):
        at = p * _LANES
        c00, c01, c10, c11 = load(c, at), load(c, at + 16), load(c, at + 32), load(c, at + 48)
        c20, c21, c30, c31 = load(c, at + 64), load(c, at + 80), load(c, at + 96), load(c, at + 112)
        c40, c41, c50, c51 = load(c, at + 128), load(c, at + 144), load(c, at + 160), load(c, at + 176)
        c60, c61, c70, c71 = load(c, at + 192), load(c, at + 208), load(c, at + 224), load(c, at + 240)
        for n in range(depth):
            b0, b1 = load(b, n * _LANES), load(b, n * _LANES + 16)
            a0, a1, a2, a3 = broadcast(a[p, n]), broadcast(a[p + 1, n]), broadcast(a[p + 2, n]), broadcast(a[p + 3, n])
            c00, c01, c10, c11 = fma(a0, b0, c00), fma(a0, b1, c01), fma(a1, b0, c10), fma(a1, b1, c11)
            c20, c21, c30, c31 = fma(a2, b0, c20), fma(a2, b1, c21), fma(a3, b0, c30), fma(a3, b1, c31)
            a4, a5, a6, a7 = (
                broadcast(a[p + 4, n]),
                broadcast(a[p + 5, n]),
                broadcast(a[p + 6, n]),
                broadcast(a[p + 7, n]),
            )
            c40, c41, c50, c51 = fma(a4, b0, c40), fma(a4, b1, c41), fma(a5, b0, c50), fma(a5, b1, c51)
            c60, c61, c70, c71 = fma(a6, b0, c60), fma(a6, b1, c61), fma(a7, b0, c70), fma(a7, b1, c71)
        store(c, at, c00), store(c, at + 16, c01), store(c, at + 32, c10), store(c, at + 48, c11)
        store(c, at + 64, c20), store(c, at + 80, c21), store(c, at + 96, c30), store(c, at + 112, c31)
        store(c, at + 128, c40), store(c, at + 144, c41), store(c, at + 160, c50), store(c, at + 176, c51)
        store(c, at + 192, c60), store(c, at + 208, c61), store(c, at + 224, c70), store(c, at + 240, c71)


@compiled()
def _weigh(scores: Array, peaks: Array, totals: Array, sums: Array) -> None:
    """Turn scores (block, lanes) into weights, and bring peaks, totals (lanes,) and sums (Dh, lanes) up to date."""
    for lane in range(0, _LANES, 16):
        before = load(peaks, lane)
        peak = before
        for s in range(_BLOCK):
            peak = maximum(load(scores, s * _LANES + lane), peak)
        minus_peak = multiply(peak, broadcast(-_ONE))
        shrunk = _exp2_lanes(add(before, minus_peak))
        total = multiply(load(totals, lane), shrunk)
        for s in range(_BLOCK):
            weight = _exp2_lanes(add(load(scores, s * _LANES + lane), minus_peak))
            store(scores, s * _LANES + lane, weight)
            total = add(total, weight)
        for d in range(sums.shape[0]):
            store(sums, d * _LANES + lane, multiply(load(sums, d * _LANES + lane), shrunk))
        store(peaks, lane, peak)
        store(totals, lane, total)


@compiled()
def _add_product_plainly(a: Array, b: Array, height: int, depth: int, c: Array) -> None:
    """Do `_add_product` in plain loops, rows and depth in fours.

    Sixteen numbers of ``a`` at a time, which the compiler keeps in registers beside vectors along the rows of c. Those
    of b may be longer, and bfloat16.
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


@compiled()
def _weigh_plainly(scores: Array, peaks: Array, totals: Array, sums: Array) -> None:
    """Do `_weigh` in plain loops."""
    before = peaks.copy()
    for s in range(_BLOCK):
        for lane in range(_LANES):
            peaks[lane] = max(peaks[lane], scores[s, lane])
    for lane in range(_LANES):
        before[lane] = exp2(before[lane] - peaks[lane])
        totals[lane] *= before[lane]
    for d in range(sums.shape[0]):
        for lane in range(_LANES):
            sums[d, lane] *= before[lane]
    for s in range(_BLOCK):
        for lane in range(_LANES):
            scores[s, lane] = exp2(scores[s, lane] - peaks[lane])
            totals[lane] += scores[s, lane]
