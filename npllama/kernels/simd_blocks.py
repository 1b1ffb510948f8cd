"""Sums whose lanes are sixteen rows of a matrix, a **block**; see `npllama.kernels.simd_sums` for how they are kept.

Each number of the input meets all rows of a block, a vector of weights. Of several blocks there are the sums of each
token for the first block, then for the next: what is loaded of a token meets all of them. Vectors of several blocks,
one of each, are a tuple, and its length says how many blocks there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import (
    BYTE_VECTOR,
    FLOAT_VECTOR,
    FLOATS,
    INT_VECTOR,
    WORD,
    call,
    dots_of_bytes,
    dots_of_nibbles,
    dots_of_shorts,
    intrinsic,
)
from npllama.kernels.simd_sums import _add_floats, _at, _changed, _pair_adder, _tuple, apart, load, load_splat

#: What sums of int32 begin with instead of nothing, where they are told to be **floating**: the bits of 1.5 · 2**23. An
#: integer below 2**22 that is added to them is added to that float32, too, from which it is taken by a subtraction.
#: Some processors do that beside multiplications, but not a conversion; and where a product follows, it costs nothing.
NOTHING = 0x4B400000
_NOTHING = 1.5 * 2**23

_LINE = 64
#: What is put in the place of the i-th total, of that and a vector: ``change(i, total, vector)``.
_Change: TypeAlias = Callable[[int, Any, Any], Any]


# --- beginning and end ------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def repeated(context: Any, sums: Any, count: Any) -> Any:
    """``repeated(sums, count)``: the same sums for each of literally so many blocks."""
    kind = _tuple(sums.dtype, sums.count * count.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = [builder.extract_value(arguments[0], i) for i in range(sums.count)]
        return context.make_tuple(builder, kind, vectors * count.literal_value)

    return kind(sums, count), code


@intrinsic(prefer_literal=True)
def vectors_at(context: Any, address: Any, pitch: Any, count: Any) -> Any:
    """``vectors_at(address, pitch, count)``: a vector of each of literally so many blocks. VMOVUPS.

    They are ``pitch`` bytes apart.
    """
    kind = _tuple(FLOATS, count.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, pitch, _ = arguments
        places = [apart(builder, address, pitch, block) for block in range(kind.count)]
        return context.make_tuple(builder, kind, [load(builder, place, 0, FLOAT_VECTOR) for place in places])

    return kind(types.int64, types.int64, count), code


def _change_memory(builder: Any, address: Any, pitch: Any, count: int, sums: list[Any], add: _Change) -> None:
    """Put ``add(i, total, sum)`` in the place of each total, those of ``count`` tokens in a row for each block."""
    for i, tile in enumerate(sums):
        block, token = divmod(i, count)
        place = _at(builder, apart(builder, address, pitch, block), _LINE * token, FLOAT_VECTOR)
        builder.store(add(i, builder.load(place, align=1), tile), place, align=1)


@intrinsic(prefer_literal=True)
def add_to_memory(context: Any, address: Any, pitch: Any, count: Any, sums: Any) -> Any:
    """``add_to_memory(address, pitch, count, sums)``: add float32 sums to as many vectors there. VADDPS.

    Those of literally so many tokens lie in a row, and those of blocks ``pitch`` bytes apart.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, pitch, _, tile = arguments

        def add(i: int, total: Any, more: Any) -> Any:
            return builder.fadd(total, more)

        tile = [builder.extract_value(tile, i) for i in range(sums.count)]
        _change_memory(builder, address, pitch, count.literal_value, tile, add)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, count, sums), code


@intrinsic
def add_scaled_to_memory(context: Any, address: Any, pitch: Any, sums: Any, scales: Any) -> Any:
    """``add_scaled_to_memory(address, pitch, sums, scales)``: add float32 sums times their block's vector. VFMADD231PS.

    To what, see `add_to_memory`.
    """
    count = sums.count // scales.count

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, pitch, tile, scales = arguments

        def add(i: int, total: Any, more: Any) -> Any:
            scale = builder.extract_value(scales, i // count)
            return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, more, scale, total)

        tile = [builder.extract_value(tile, i) for i in range(sums.count)]
        _change_memory(builder, address, pitch, count, tile, add)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, sums, scales), code


@intrinsic(prefer_literal=True)
def add_outer_to_memory(context: Any, address: Any, pitch: Any, count: Any, vectors: Any, numbers: Any) -> Any:
    """``add_outer_to_memory(address, pitch, count, vectors, numbers)``: add a block's vector times a number of a token.

    The numbers of literally so many tokens are float32 at an address. To what, see `add_to_memory`. VFMADD231PS.
    """
    n_tokens = count.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, pitch, _, by_block, numbers = arguments
        words = [load_splat(builder, numbers, i, ir.FloatType()) for i in range(n_tokens)]

        def add(i: int, total: Any, number: Any) -> Any:
            vector = builder.extract_value(by_block, i // n_tokens)
            return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, vector, number, total)

        _change_memory(builder, address, pitch, n_tokens, words * vectors.count, add)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, count, vectors, types.int64), code


@intrinsic
def add_stepped(context: Any, totals: Any, sums: Any, scales: Any, steps: Any) -> Any:
    """``add_stepped(totals, sums, scales, steps)``: ``total + scale · sum · step`` of float32 totals and int32 sums.

    The sums are floating, see `NOTHING`. The scale is a vector of each block, a bfloat16 below 2**103 in each lane; the
    step is one float32 of each token, at an address. VMULPS, VFMADD231PS.
    """
    n_tokens = totals.count // scales.count

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        so_far, tile, by_block, steps = arguments
        by_block = [builder.extract_value(by_block, block) for block in range(scales.count)]
        # 1.5 · 2**23 times a number of so few bits is exact: (sum + 1.5 · 2**23) · scale less that is sum · scale.
        excess = [builder.fmul(scale, ir.Constant(FLOAT_VECTOR, [-_NOTHING] * 16)) for scale in by_block]

        def change(i: int, total: Any) -> Any:
            block, token = divmod(i, n_tokens)
            floating = builder.bitcast(builder.extract_value(tile, i), FLOAT_VECTOR)
            scaled = call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, floating, by_block[block], excess[block])
            step = load_splat(builder, steps, token, ir.FloatType())
            return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, scaled, step, total)

        return _changed(context, builder, totals, so_far, change)

    return totals(totals, sums, scales, types.int64), code


@intrinsic
def at_next_place(context: Any, sums: Any, more: Any) -> Any:
    """``at_next_place(sums, more)``: ``256 · sum + number`` of int32, each number a vector. VPSLLD, VPADDD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, numbers = arguments

        def change(i: int, total: Any) -> Any:
            shifted = builder.shl(total, ir.Constant(INT_VECTOR, [8] * 16))
            return builder.add(shifted, builder.extract_value(numbers, i))

        return _changed(context, builder, sums, tile, change)

    return sums(sums, more), code


@intrinsic
def add_digits(context: Any, totals: Any, high: Any, lower: Any, scales: Any, steps: Any) -> Any:
    """``add_digits(totals, high, lower, scales, steps)``: `add_stepped` with ``65536 · high + lower`` for the sum.

    The higher ones are floating, see `NOTHING`. VSUBPS, VCVTDQ2PS, VFMADD231PS, VMULPS.
    """
    n_tokens = totals.count // scales.count

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        so_far, high, lower, by_block, steps = arguments
        place, nothing = (ir.Constant(FLOAT_VECTOR, [number] * 16) for number in (65536.0, _NOTHING))

        def change(i: int, total: Any) -> Any:
            block, token = divmod(i, n_tokens)
            upper = builder.fsub(builder.bitcast(builder.extract_value(high, i), FLOAT_VECTOR), nothing)
            rest = builder.sitofp(builder.extract_value(lower, i), FLOAT_VECTOR)
            whole = call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, upper, place, rest)
            scaled = builder.fmul(whole, builder.extract_value(by_block, block))
            step = load_splat(builder, steps, token, ir.FloatType())
            return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, scaled, step, total)

        return _changed(context, builder, totals, so_far, change)

    return totals(totals, high, lower, scales, types.int64), code


# --- outer products: a vector of weights, a number of each token ------------------------------------------------


def _outer(kind: Any, blocks: Any, add: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """Return the signature and code of ``sum + weights of the block · word of the token``, as ``add`` says."""
    n_tokens = kind.count // blocks.count

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, weights, x = arguments
        vectors = [builder.bitcast(builder.extract_value(weights, i), INT_VECTOR) for i in range(blocks.count)]

        def change(i: int, total: Any) -> Any:
            block, token = divmod(i, n_tokens)
            return add(builder, total, vectors[block], load_splat(builder, x, token, WORD))

        return _changed(context, builder, kind, sums, change)

    return kind(kind, blocks, types.int64), code


@intrinsic
def outer_floats(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_floats(sums, weights, x)``: add a vector of each block times each token's number at an address.

    VFMADD231PS.
    """
    return _outer(sums, weights, _add_floats)


@intrinsic
def outer_pairs(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_pairs(sums, weights, x)``: the same with pairs of bfloat16 for numbers. VDPBF16PS.

    The products of a pair are added to the sum one after the other, the upper one first, each rounded to float32.
    Numbers below 2**-126 may count as zero: a processor without the instruction keeps them.
    """
    return _outer(sums, weights, _pair_adder())


@intrinsic
def outer_bytes(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_bytes(sums, weights, x)``: the same with four uint8 weights and int8 for a number. VPDPBUSD."""
    return _outer(sums, weights, dots_of_bytes)


@intrinsic
def outer_words(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_words(sums, weights, x)``: the same with pairs of int16 for numbers. VPMADDWD, VPADDD."""
    return _outer(sums, weights, dots_of_shorts)


@intrinsic
def outer_nibbles(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_nibbles(sums, weights, x)``: what `outer_bytes` does to eight lines, with weights of 4 bits.

    They are those of one block, at an address. Sums of sixteen products fit into 16 bits. VPMADDUBSW, VPADDW, VPMADDWD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, weights, x = arguments
        lines = [load(builder, weights, _LINE * i, BYTE_VECTOR) for i in range(8)]

        def change(i: int, total: Any) -> Any:
            words = [load_splat(builder, x, 16 * line + i, WORD) for line in range(8)]
            return dots_of_nibbles(builder, total, lines, words)

        return _changed(context, builder, sums, tile, change)

    return sums(sums, *[types.int64] * 2), code
