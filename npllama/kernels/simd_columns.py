"""Instructions that turn bytes of sixteen rows into columns, and add their products with some tokens to sums.

A **column** is the same four bytes of sixteen rows; it meets four bytes of each token, which are the same for all
lanes. So a sum's lanes are rows, and nothing is left to add up at the end. See `npllama.kernels.simd_sums` for sums.

Where an instruction multiplies bytes, rows are turned 16 bytes at a time, just before these are multiplied: the
processor turns the next ones meanwhile. Elsewhere columns of int4 go to memory first, and meet as many tokens at a time
as registers have room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import (
    BYTE_VECTOR,
    INTS,
    POINTER,
    SHORT_VECTOR,
    WIDE,
    WORD,
    dots_of_bytes,
    first_shorts,
    intrinsic,
    pairs_added,
    products_of_bytes,
    turned,
)
from npllama.kernels.simd_sums import apart, load, load_splat

_tuple: Any = types.UniTuple

#: Words of 32 bits that a token has for a group of 64 numbers, and those that are turned together.
_WORDS, _QUARTER = 16, 4
#: Tokens whose sums registers hold at a time.
_AT_ONCE = 8 if WIDE else 4


@intrinsic
def columns_at(context: Any, address: Any, pitch: Any) -> Any:
    """``columns_at(address, pitch)``: of 16 bytes of sixteen rows, ``pitch`` bytes apart, the four columns."""
    four: Any = _tuple(INTS, _QUARTER)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, pitch = arguments
        return context.make_tuple(builder, four, _quarter(builder, address, pitch, 0))

    return four(types.int64, types.int64), code


@intrinsic
def copy_first(context: Any, target: Any, source: Any, count: Any) -> Any:
    """``copy_first(target, source, count)``: copy ``count`` numbers of 16 bits, up to 16, and zeros behind them.

    VMOVDQU16 with a mask or VPMASKMOVD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, count = arguments
        found = first_shorts(builder, builder.inttoptr(source, POINTER), count)
        builder.store(found, builder.inttoptr(target, found.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), code


def _quarter(builder: Any, address: Any, pitch: Any, word: int) -> list[Any]:
    """Return the columns of four words of sixteen rows."""
    kind = ir.VectorType(WORD, _QUARTER)
    return turned(builder, [load(builder, apart(builder, address, pitch, row), 4 * word, kind) for row in range(16)])


def _columns(builder: Any, address: Any, pitch: Any, words: range) -> Iterator[tuple[int, Any]]:
    """Yield which word of sixteen rows, ``pitch`` bytes apart, and the column of it, 64 bytes."""
    for first in words[::_QUARTER]:
        for i, column in enumerate(_quarter(builder, address, pitch, first)):
            yield first + i, builder.bitcast(column, BYTE_VECTOR)


def _adding(grown: Callable[[Any, list[Any], Any, Any, Any], list[Any]]) -> Any:
    """Return an intrinsic that adds products to sums, one for each token, given how the list of these grows."""

    def typed(context: Any, sums: Any, address: Any, pitch: Any, x: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            tile, address, pitch, x = arguments
            totals = [builder.extract_value(tile, t) for t in range(sums.count)]
            return context.make_tuple(builder, sums, grown(builder, totals, address, pitch, x))

        return sums(sums, *[types.int64] * 3), code

    return intrinsic(typed)


def _all(number: int) -> Any:
    return ir.Constant(BYTE_VECTOR, [number] * 64)


def _added(
    builder: Any, totals: list[Any], parts: list[tuple[Any, int]], x: Any, n_words: int, add: Callable[..., Any]
) -> list[Any]:
    """Return sums with what ``add`` makes of columns and a word of each token, which has so many.

    As many tokens at a time as registers have room for.
    """
    totals = [*totals]
    for first in range(0, len(totals), _AT_ONCE):
        for part, word in parts:
            for t in range(first, min(first + _AT_ONCE, len(totals))):
                totals[t] = add(builder, totals[t], part, load_splat(builder, x, n_words * t + word, WORD))
    return totals


def _with_bytes(builder: Any, totals: list[Any], address: Any, pitch: Any, x: Any) -> list[Any]:
    for first in range(0, _WORDS, _QUARTER):
        columns = _columns(builder, address, pitch, range(first, first + _QUARTER))
        parts = [(builder.xor(column, _all(128)), word) for word, column in columns]
        totals = _added(builder, totals, parts, x, _WORDS, dots_of_bytes)
    return totals


#: ``add_bytes(sums, address, pitch, x)``: add the products of a group of int8 weights, 128 larger than they are. The
#: sums are int32, one for each token; 64 bytes of sixteen rows begin ``pitch`` bytes apart, 64 int8 of each token
#: follow one another. VPXORD, VPDPBUSD.
add_bytes = _adding(_with_bytes)


def _with_nibbles(builder: Any, totals: list[Any], address: Any, pitch: Any, x: Any) -> list[Any]:
    half = _WORDS // 2
    for first in range(0, half, _QUARTER):
        parts = []
        for word, column in _columns(builder, address, pitch, range(first, first + _QUARTER)):
            parts += [(part, word + half * i) for i, part in enumerate(_nibbles(builder, column))]
        totals = _added(builder, totals, parts, x, _WORDS, dots_of_bytes)
    return totals


def _nibbles(builder: Any, column: Any) -> tuple[Any, Any]:
    return builder.and_(column, _all(15)), builder.lshr(column, _all(4))


#: ``add_nibbles(sums, address, pitch, x)``: what `add_bytes` does, with a group of int4 weights, 32 bytes, as they are
#: stored. The low halves of bytes meet the first half of a token's numbers, the high ones the other. VPANDD,
#: VGF2P8AFFINEQB, VPDPBUSD.
add_nibbles = _adding(_with_nibbles)


@intrinsic
def add_turned_nibbles(context: Any, sums: Any, columns: Any, x: Any) -> Any:
    """``add_turned_nibbles(sums, columns, x)``: do what `add_nibbles` does to four columns, one after the other.

    The words of a token that meet low halves of bytes are at ``x``, those that meet high ones half a line behind, and
    the next token's a line. VPANDD, VPSRLW, VPMADDUBSW, VPADDW, VPMADDWD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, columns, x = arguments
        # Sixteen products of numbers below 16 with int8 fit into 16 bits. Column by column, not token by token as in
        # `dots_of_nibbles`: registers would have to hold the halves of all columns, and that takes 1.16 times as long.
        shorts = [ir.Constant(SHORT_VECTOR, [0] * 32)] * sums.count
        for word in range(_QUARTER):
            for i, part in enumerate(_nibbles(builder, load(builder, columns, 64 * word, BYTE_VECTOR))):
                for t, so_far in enumerate(shorts):
                    number = load_splat(builder, x, _WORDS * t + _WORDS // 2 * i + word, WORD)
                    shorts[t] = builder.add(so_far, products_of_bytes(builder, part, number))
        totals = [
            builder.add(builder.extract_value(tile, t), pairs_added(builder, shorts[t])) for t in range(sums.count)
        ]
        return context.make_tuple(builder, sums, totals)

    return sums(sums, types.int64, types.int64), code
