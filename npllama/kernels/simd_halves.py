"""Sums of half a line at a time, for narrow registers (see `npllama.kernels.simd_sums` for whole ones).

Eight sums of sixteen lanes are all sixteen registers that a processor with AVX2 has, and leave none for what is
multiplied. But lanes do not meet before the end. So a line's first half is added to eight registers, line after line,
and then, in another pass, the other half to eight others: the same sums, to the last bit.

The **halves** of sums are eight lanes of each. A vector is those of two sums, one behind the other.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import FLOAT_VECTOR, FLOATS, WORD, call, intrinsic
from npllama.kernels.simd_sums import _at, _halves, _tuple, apart, load

_LINE, _LANES = 64, 8
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(WORD, _LANES)


@intrinsic(prefer_literal=True)
def halves_at(context: Any, address: Any, count: Any) -> Any:
    """``halves_at(address, count)``: of literally so many sums, one after the other, the halves that begin there."""
    kind = _tuple(FLOATS, count.literal_value // 2)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = [load(builder, arguments[0], _LINE * i, _FLOATS) for i in range(2 * kind.count)]
        return _packed(context, builder, kind, halves)

    return kind(types.int64, count), code


@intrinsic
def store_halves(context: Any, address: Any, halves: Any) -> Any:
    """``store_halves(address, halves)``: write them back. VMOVUPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for i, half in enumerate(_unpacked(builder, halves, arguments[1])):
            builder.store(half, _at(builder, arguments[0], _LINE * i, _FLOATS), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, halves), code


@intrinsic(prefer_literal=True)
def inner_halves(context: Any, halves: Any, rows: Any, kind: Any, weights: Any, row_bytes: Any, x: Any) -> Any:
    """``inner_halves(halves, rows, kind, weights, row_bytes, x)``: do `inner_lines` to halves of sums.

    The weights and the tokens' numbers are where the halves of their lines begin. VPSLLD, VPANDD, VFMADD231PS.
    """
    n_rows, kind_of = rows.literal_value, kind.literal_value
    n_tokens = 2 * halves.count // n_rows

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, _, _, weights, row_bytes, x = arguments

        def words(address: Any, line: int) -> Any:
            return load(builder, address, _LINE * line, _INTS)

        lines = [words(apart(builder, weights, row_bytes, row), 0) for row in range(n_rows)]
        totals = []
        for i, total in enumerate(_unpacked(builder, halves, tile)):
            row, token = divmod(i, n_tokens)
            if kind_of == 0:
                pairs = [(lines[row], words(x, token))]
            elif kind_of == 1:
                numbers = words(x, 2 * token), words(x, 2 * token + 1)
                pairs = [*zip(_halves(builder, lines[row]), numbers, strict=True)]
            else:
                both = _halves(builder, lines[row]), _halves(builder, words(x, token))
                pairs = [*zip(*both, strict=True)][::-1]
            for pair in pairs:
                factors = (builder.bitcast(vector, _FLOATS) for vector in pair)
                total = call(builder, f"llvm.fma.v{_LANES}f32", _FLOATS, *factors, total)
            totals.append(total)
        return _packed(context, builder, halves, totals)

    return halves(halves, rows, kind, *[types.int64] * 3), code


def half_of(builder: Any, vector: Any, half: int) -> Any:
    """Return eight lanes of a vector of float32, the first or the last ones."""
    lanes = ir.Constant(_INTS, [*range(_LANES * half, _LANES * (half + 1))])
    return builder.shuffle_vector(vector, ir.Constant(FLOAT_VECTOR, ir.Undefined), lanes)


def joined(builder: Any, first: Any, last: Any) -> Any:
    """Return the vector of two halves."""
    return builder.shuffle_vector(first, last, ir.Constant(ir.VectorType(WORD, 2 * _LANES), [*range(2 * _LANES)]))


def _packed(context: Any, builder: Any, kind: Any, halves: list[Any]) -> Any:
    vectors = [joined(builder, *halves[i : i + 2]) for i in range(0, len(halves), 2)]
    return context.make_tuple(builder, kind, vectors)


def _unpacked(builder: Any, kind: Any, tile: Any) -> list[Any]:
    vectors = [builder.extract_value(tile, i) for i in range(kind.count)]
    return [half_of(builder, vector, half) for vector in vectors for half in range(2)]
