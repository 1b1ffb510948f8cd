"""One piece of attention: some queries, and the keys and values of a range of positions.

Keys are taken in blocks, so that nothing as large as queries times keys is ever stored, and the softmax is done along
the way: a **peak** stands beside each sum, and what was summed before is scaled down whenever a larger one comes (Dao
et al., FlashAttention, https://arxiv.org/abs/2205.14135). With scores in units of ln 2, a weight is
``2**(score - peak)``. A peak is a whole number, up to 1 above the largest score so far: to scale down is then to change
exponents, which rounds nothing, and a weight has the same digits whatever the peak.

There are two ways through a piece. A few queries, as in decoding, are dot products with keys that stream by from
memory (`npllama.kernels.attend_few`). Many stand side by side in panels of lanes (`npllama.kernels.attend_many`).

Where keys and values are bfloat16, queries and weights are rounded to it; see `npllama.rounding`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np import arrayobj

from npllama.kernels.jit import compiled
from npllama.kernels.simd import broadcast, maximum, multiply, nearest, power_of_two
from npllama.kernels.simd import fused_multiply_add as fma
from npllama.kernels.subroutines import subroutine

_BLOCK = 64  # keys at a time: they, their values, a panel and its scores fit into a first-level cache
_LOWEST = np.float32(-3e38)  # below every score, but finite: the difference of two is no NaN
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)

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


@subroutine(inline=True)
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


@subroutine(inline=True)
def _seen(piece: Piece, m: int, start: int) -> Any:
    """Return which of a block's keys [first, end) query m of a piece sees."""
    position = piece.position + m // piece.group
    first = min(max(position - piece.window + 1 - start, 0), _BLOCK)
    end = min(max(min(position + 1, piece.stop) - start, 0), _BLOCK)
    return first, end
