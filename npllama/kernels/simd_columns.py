"""Instructions that turn bytes of sixteen rows into columns, and add their products with some tokens to sums.

A **column** is the same four bytes of sixteen rows; it meets four bytes of each token, which are the same for all
lanes. So a sum's lanes are rows, and nothing is left to add up at the end. See `npllama.kernels.simd_sums` for sums.

Rows are turned 16 bytes at a time, just before these are multiplied: the processor turns the next ones meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import BYTE_VECTOR, INT_VECTOR, INTS, WORD, call, dots_of_bytes, intrinsic, splat, turned
from npllama.kernels.simd_sums import apart, load, load_splat

_tuple: Any = types.UniTuple

#: Words of 32 bits that a token has for a group of 64 numbers, and those that are turned together.
_WORDS, _QUARTER = 16, 4


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

    VMOVDQU16 with a mask.
    """
    bits = ir.VectorType(ir.IntType(16), 16)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source, count = arguments
        places = ir.Constant(INT_VECTOR, [*range(16)])
        mask = builder.icmp_signed("<", places, splat(builder, builder.trunc(count, WORD)))
        pointers = [builder.inttoptr(place, bits.as_pointer()) for place in (source, target)]
        zeros, alignment = ir.Constant(bits, [0] * 16), ir.Constant(WORD, 2)
        found = call(builder, "llvm.masked.load.v16i16.p0", bits, pointers[0], alignment, mask, zeros)
        builder.store(found, pointers[1], align=1)
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


class _Sums:
    """Sums of int32 that grow, one for each token.

    That of a single token is two in turns, or each instruction would wait for the one before.
    """

    def __init__(self, builder: Any, kind: Any, tile: Any) -> None:
        self._builder, self._kind = builder, kind
        self._turns = [[builder.extract_value(tile, t) for t in range(kind.count)]]
        if kind.count == 1:
            self._turns.append([ir.Constant(INT_VECTOR, [0] * 16)])

    def add(self, column: Any, x: Any, word: int) -> None:
        """Add the products of a column, unsigned, and a word of each token, signed. VPDPBUSD."""
        totals = self._turns.pop(0)
        for t, total in enumerate(totals):
            totals[t] = dots_of_bytes(
                self._builder, total, column, load_splat(self._builder, x, _WORDS * t + word, WORD)
            )
        self._turns.append(totals)

    def tile(self, context: Any) -> Any:
        """Return the sums as a tuple."""
        totals, *others = self._turns
        for other in others:
            totals = [self._builder.add(*pair) for pair in zip(totals, other, strict=True)]
        return context.make_tuple(self._builder, self._kind, totals)


def _all(number: int) -> Any:
    return ir.Constant(BYTE_VECTOR, [number] * 64)


@intrinsic
def add_bytes(context: Any, sums: Any, address: Any, pitch: Any, x: Any) -> Any:
    """``add_bytes(sums, address, pitch, x)``: add the products of a group of int8 weights, 128 larger than they are.

    The sums are int32, one for each token; 64 bytes of sixteen rows begin ``pitch`` bytes apart, 64 int8 of each token
    follow one another. VPXORD, VPDPBUSD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, address, pitch, x = arguments
        growing = _Sums(builder, sums, tile)
        for word, column in _columns(builder, address, pitch, range(_WORDS)):
            growing.add(builder.xor(column, _all(128)), x, word)
        return growing.tile(context)

    return sums(sums, *[types.int64] * 3), code


@intrinsic
def add_nibbles(context: Any, sums: Any, address: Any, pitch: Any, x: Any) -> Any:
    """``add_nibbles(sums, address, pitch, x)``: the same with a group of int4 weights, 32 bytes, as they are stored.

    The low halves of bytes meet the first half of a token's numbers, the high ones the other. VPANDD, VGF2P8AFFINEQB,
    VPDPBUSD.
    """
    half = _WORDS // 2

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, address, pitch, x = arguments
        growing = _Sums(builder, sums, tile)
        for word, column in _columns(builder, address, pitch, range(half)):
            growing.add(builder.and_(column, _all(15)), x, word)
            growing.add(builder.lshr(column, _all(4)), x, half + word)
        return growing.tile(context)

    return sums(sums, *[types.int64] * 3), code
