"""What `npllama.kernels.simd_bytes` does with narrow registers: integer weights become float32, like their tokens.

A line's sum is two registers of eight lanes, its **halves**; as many halves are worked on at a time as registers have
room for, so that what weights become meets several tokens. A step is 1 there (`npllama.kernels.byte_tokens`): all
tokens share the factors of the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from llvmlite import ir

from npllama.kernels.byte_tokens import LINES_OF_INT4, LINES_OF_INT8, NIBBLES
from npllama.kernels.llvm import BYTE, WORD, call, splat
from npllama.kernels.simd_halves import half_of, joined
from npllama.kernels.simd_sums import apart, load

_LANES = 8
_HALF, _INTEGERS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(WORD, _LANES)
_LINE, _HALF_LINE = 64, 32
#: Halves of sums that are worked on at a time: a processor begins with one while it waits for others.
_AT_ONCE = 8


class Format(NamedTuple):
    """How a line of weights is multiplied.

    Attributes
    ----------
    weights_at : callable
        ``weights_at(builder, place, number, half)``: eight weights of a line at an address, as float32, that meet a
        half of the token's line of that number.
    n_parts, n_lines : int
        Lines of a token's numbers, and of all that a token is to a line. If there is one more, sums begin with it.
    n_factors : int
        1, or 2 where the halves are groups of their own.
    """

    weights_at: Callable[[Any, Any, int, int], Any]
    n_parts: int
    n_lines: int
    n_factors: int


def added(context: Any, builder: Any, kind: Any, n_rows: int, arguments: Any, how: Format) -> Any:
    """Return sums with the products of a line of each row, times its factors. VFMADD231PS."""
    tile, _, weights, row_bytes, x, factors, pitch = arguments
    n_tokens = kind.count // n_rows
    cells = [(row, half, token) for row in range(n_rows) for half in range(2) for token in range(n_tokens)]
    sums = {}
    for first in range(0, len(cells), _AT_ONCE):
        some = cells[first : first + _AT_ONCE]
        totals = _products(builder, some, [apart(builder, weights, row_bytes, row) for row in range(n_rows)], x, how)
        for (row, half, token), total in zip(some, totals, strict=True):
            place = apart(builder, factors, pitch, row * n_tokens)
            factor = splat(builder, load(builder, place, 4 * (half % how.n_factors), ir.FloatType()), _LANES)
            so_far = half_of(builder, builder.extract_value(tile, row * n_tokens + token), half)
            sums[row, half, token] = call(builder, "llvm.fma.v8f32", _HALF, total, factor, so_far)
    changed = [
        joined(builder, sums[row, 0, token], sums[row, 1, token]) for row in range(n_rows) for token in range(n_tokens)
    ]
    return context.make_tuple(builder, kind, changed)


def _products(builder: Any, cells: Iterable[Any], places: list[Any], x: Any, how: Format) -> list[Any]:
    """Return the products of lines at places with tokens, for some rows, halves and tokens."""

    def number(token: int, part: int, half: int) -> Any:
        return load(builder, x, _LINE * (how.n_lines * token + part) + _HALF_LINE * half, _HALF)

    begins = how.n_lines > how.n_parts
    nothing = ir.Constant(_HALF, [0.0] * _LANES)
    totals = {cell: number(cell[2], how.n_parts, cell[1]) if begins else nothing for cell in cells}
    for part in range(how.n_parts):
        parts = dict.fromkeys((row, half) for row, half, _ in totals)
        found = {key: how.weights_at(builder, places[key[0]], part, key[1]) for key in parts}
        for (row, half, token), total in totals.items():
            factors = found[row, half], number(token, part, half)
            totals[row, half, token] = call(builder, "llvm.fma.v8f32", _HALF, *factors, total)
    return [*totals.values()]


def _int8_at(builder: Any, place: Any, number: int, half: int) -> Any:
    """Return half of sixteen int8, the first, the second, ... of a line. VPMOVSXBD, VCVTDQ2PS."""
    numbers = load(builder, place, 16 * number + _LANES * half, ir.VectorType(BYTE, _LANES))
    return builder.sitofp(builder.sext(numbers, _INTEGERS), _HALF)


def _int4_at(builder: Any, place: Any, number: int, half: int) -> Any:
    """Return an int4 of each word of half a line, from the lowest on: number k but the last times 16**k.

    VPAND or VPSRLD, VCVTDQ2PS.
    """
    words = load(builder, place, _HALF_LINE * half, _INTEGERS)
    if number == NIBBLES - 1:
        return builder.sitofp(builder.lshr(words, ir.Constant(_INTEGERS, [4 * number] * _LANES)), _HALF)
    return builder.sitofp(builder.and_(words, ir.Constant(_INTEGERS, [15 << 4 * number] * _LANES)), _HALF)


#: A group of int8, and two groups of int4.
INT8 = Format(_int8_at, LINES_OF_INT8, LINES_OF_INT8, 1)
INT4 = Format(_int4_at, NIBBLES, LINES_OF_INT4, 2)
