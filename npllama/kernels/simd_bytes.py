"""Instructions that add products of bytes to many sums at once; see `npllama.kernels.simd_sums`.

A sum belongs to a row of a matrix and a token; the sums of a row are those of each token in turn. Of literally so many
rows, ``row_bytes`` apart, a line of 64 bytes meets what each token is to it (`npllama.kernels.byte_tokens`): three
digits, and behind them int32, with which the products' sums begin; or, with narrow registers, float32. What comes of it
is multiplied by a factor, float32, at ``factors``; those of a sum are ``pitch`` bytes from those of the sum before.
With narrow registers all tokens of a row share the factors of the first one (`npllama.kernels.simd_narrow`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels import simd_narrow
from npllama.kernels.byte_tokens import LINES_OF_INT4, LINES_OF_INT8
from npllama.kernels.llvm import BYTE_VECTOR, FLOAT_VECTOR, INT_VECTOR, WIDE, call, dots_of_bytes, intrinsic
from npllama.kernels.simd_sums import apart, load, load_splat

_LINE = 64
_DIGITS = 3

#: Sums that are worked on at a time: a processor begins with one while it waits for others.
_AT_ONCE = 4


def _dots(builder: Any, totals: list[Any], unsigned: list[Any], signed: list[Any]) -> list[Any]:
    """Add four products of bytes to each int32 lane of some vectors. VPDPBUSD."""
    return [dots_of_bytes(builder, *each) for each in zip(totals, unsigned, signed, strict=True)]


def _at_next_place(builder: Any, totals: list[Any]) -> list[Any]:
    """Multiply int32 vectors by 256. VPSLLD."""
    return [builder.shl(total, _all(8, INT_VECTOR)) for total in totals]


def _all(number: float, vector: Any) -> Any:
    return ir.Constant(vector, [number] * vector.count)


def _added(
    context: Any,
    builder: Any,
    kind: Any,
    n_rows: int,
    arguments: Any,
    products: Callable[[list[Any], list[list[Any]]], list[Any]],
    n_lines: int,
    factor: Callable[[Any], Any],
) -> Any:
    """Return sums with what ``products`` makes of lines of weights, at addresses, and of ``n_lines`` of a token.

    That is multiplied by factors.
    """
    tile, _, weights, row_bytes, x, factors, pitch = arguments
    n_tokens = kind.count // n_rows
    places = [apart(builder, weights, row_bytes, row) for row in range(n_rows)]
    sums = [builder.extract_value(tile, i) for i in range(kind.count)]
    together = max(1, _AT_ONCE // n_rows)
    for first in range(0, n_tokens, together):
        tokens = range(first, min(first + together, n_tokens))
        parts = [
            [load(builder, x, _LINE * (n_lines * token + i), BYTE_VECTOR) for token in tokens for _ in range(n_rows)]
            for i in range(n_lines)
        ]
        cells = [row * n_tokens + token for token in tokens for row in range(n_rows)]
        for i, product in zip(cells, products(places * len(tokens), parts), strict=True):
            number = factor(apart(builder, factors, pitch, i))
            sums[i] = call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, product, number, sums[i])
    return context.make_tuple(builder, kind, sums)


@intrinsic(prefer_literal=True)
def inner_bytes(
    context: Any, sums: Any, rows: Any, weights: Any, row_bytes: Any, x: Any, factors: Any, pitch: Any
) -> Any:
    """``inner_bytes(sums, rows, weights, row_bytes, x, factors, pitch)``: int8 weights, a group.

    The weights are taken 128 larger for the highest digit, as uint8; the others are uint8 themselves. Four products of
    8 and 16 bits fit into 32 bits, of 8 and 24 they do not: the lowest of three digits has sums of its own.
    VPXORD, VPDPBUSD, VPSLLD, VCVTDQ2PS, VFMADD231PS. With narrow registers, weights become float32, like their tokens'
    numbers: VPMOVSXBD, VCVTDQ2PS, VFMADD231PS.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def products(places: list[Any], token: list[list[Any]]) -> list[Any]:
            weights = [load(builder, place, 0, BYTE_VECTOR) for place in places]
            raised = [builder.xor(line, _all(128, BYTE_VECTOR)) for line in weights]
            nothing = [_all(0, INT_VECTOR)] * len(weights)
            high, middle, low, begins = token
            upper = _dots(builder, [builder.bitcast(begin, INT_VECTOR) for begin in begins], raised, high)
            upper = _dots(builder, _at_next_place(builder, upper), middle, weights)
            lower = _dots(builder, nothing, low, weights)
            return [
                call(
                    builder, "llvm.fma.v16f32", FLOAT_VECTOR,
                    builder.sitofp(first, FLOAT_VECTOR), _all(256.0, FLOAT_VECTOR), builder.sitofp(last, FLOAT_VECTOR),
                )
                for first, last in zip(upper, lower, strict=True)
            ]  # fmt: skip

        def factor(place: Any) -> Any:
            return load_splat(builder, place, 0, ir.FloatType())

        if not WIDE:
            return simd_narrow.added(context, builder, sums, rows.literal_value, arguments, simd_narrow.INT8)
        return _added(context, builder, sums, rows.literal_value, arguments, products, LINES_OF_INT8, factor)

    return sums(sums, rows, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def inner_nibbles(
    context: Any, sums: Any, rows: Any, weights: Any, row_bytes: Any, x: Any, factors: Any, pitch: Any
) -> Any:
    """``inner_nibbles(sums, rows, weights, row_bytes, x, factors, pitch)``: int4 weights, two groups.

    The low halves of bytes meet a digit's first line, the first halves of both groups, the high ones its second line.
    A sum has two factors, one for each group. VPANDD, VGF2P8AFFINEQB, VPDPBUSD, VPSLLD, VPADDD, VCVTDQ2PS, VPERMPS,
    VFMADD231PS.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def products(places: list[Any], token: list[list[Any]]) -> list[Any]:
            weights = [load(builder, place, 0, BYTE_VECTOR) for place in places]
            low = [builder.and_(line, _all(15, BYTE_VECTOR)) for line in weights]
            high = [builder.lshr(line, _all(4, BYTE_VECTOR)) for line in weights]
            totals = [_all(0, INT_VECTOR)] * len(weights)
            for digit in range(_DIGITS):
                totals = _at_next_place(builder, totals) if digit > 0 else totals
                if digit == _DIGITS - 1:
                    first = (builder.bitcast(begin, INT_VECTOR) for begin in token[-1])
                    totals = [builder.add(*each) for each in zip(totals, first, strict=True)]
                totals = _dots(builder, totals, low, token[2 * digit])
                totals = _dots(builder, totals, high, token[2 * digit + 1])
            return [builder.sitofp(total, FLOAT_VECTOR) for total in totals]

        def factor(place: Any) -> Any:
            both = load(builder, place, 0, ir.VectorType(ir.FloatType(), 2))
            return builder.shuffle_vector(both, both, ir.Constant(INT_VECTOR, [0] * 8 + [1] * 8))

        if not WIDE:
            return simd_narrow.added(context, builder, sums, rows.literal_value, arguments, simd_narrow.INT4)
        return _added(context, builder, sums, rows.literal_value, arguments, products, LINES_OF_INT4, factor)

    return sums(sums, rows, *[types.int64] * 5), code
