"""Instructions that multiply groups of one row, small integers, with those of one token that is rounded to int8.

A group of 64 numbers is 64 bytes of int8 weights, or 32 of int4, and groups of a row follow one another. Those of the
token are 64 int8 each, ``pitch`` bytes apart. A group has a sum of its own, int32; its parts are the lanes of a vector,
which `npllama.kernels.simd_sums.store_totals` adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import BYTE, BYTE_VECTOR, INT_VECTOR, INTS, dots_of_bytes, intrinsic, nibbles_of
from npllama.kernels.simd_sums import apart, load

_tuple: Any = types.UniTuple

_GROUP = 64


def _products(weights_at: Callable[[Any, Any, int], Any]) -> Any:
    """Return an intrinsic that multiplies groups, given how to load the weights of one as uint8."""

    def typed(context: Any, count: Any, weights: Any, x: Any, pitch: Any) -> Any:
        kind = _tuple(INTS, count.literal_value)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, weights, x, pitch = arguments
            nothing, sums = ir.Constant(INT_VECTOR, [0] * 16), []
            for group in range(kind.count):
                token = load(builder, apart(builder, x, pitch, group), 0, BYTE_VECTOR)
                sums.append(dots_of_bytes(builder, nothing, weights_at(builder, weights, group), token))
            return context.make_tuple(builder, kind, sums)

        return kind(count, *[types.int64] * 3), code

    return intrinsic(prefer_literal=True)(typed)


def _bytes_at(builder: Any, weights: Any, group: int) -> Any:
    """Return int8 weights, 128 larger than they are. VPXORD."""
    return builder.xor(load(builder, weights, _GROUP * group, BYTE_VECTOR), ir.Constant(BYTE_VECTOR, [128] * _GROUP))


def _nibbles_at(builder: Any, weights: Any, group: int) -> Any:
    """Return int4 weights: the low halves of 32 bytes, then the high ones. VPAND, VPSRLW, VINSERTI64X4."""
    return nibbles_of(builder, load(builder, weights, _GROUP // 2 * group, ir.VectorType(BYTE, _GROUP // 2)))


#: ``products_of_bytes(count, weights, x, pitch)``: of literally so many groups of int8 weights, 128 larger than they
#: are. VPXORD, VPDPBUSD.
products_of_bytes = _products(_bytes_at)
#: ``products_of_nibbles(count, weights, x, pitch)``: of int4 weights as they are stored. VPAND, VPSRLW, VPDPBUSD.
products_of_nibbles = _products(_nibbles_at)
