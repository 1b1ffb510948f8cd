"""Instructions that multiply groups of one row, small integers, with those of tokens that are rounded to int8.

A group of 64 numbers is 64 bytes of int8 weights, or 32 of int4, and groups of a row follow one another. A group has a
sum of its own, int32, exactly.

With one token, several groups are multiplied at once. Those of the token are 64 int8 each, ``pitch`` bytes apart. The
parts of each sum are the lanes of a vector, which `npllama.kernels.simd_sums.store_totals` adds up.

With four or eight tokens, one group is. The tokens' are 64 int16 each, one behind the other. Sums are added up while
the next ones are computed, and become the lanes of a vector, one for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import (
    BYTE,
    BYTE_VECTOR,
    INT_VECTOR,
    INTS,
    WORD,
    call,
    dots_of_bytes,
    intrinsic,
    nibbles_of,
    splat,
)
from npllama.kernels.simd_sums import apart, load

_tuple: Any = types.UniTuple

_GROUP, _LANES = 64, 16
#: A register of 32 bytes, of which a token's group takes four, as they are multiplied: WIDE ones are not for this.
_SHORTS, _WORDS = ir.VectorType(ir.IntType(16), 16), ir.VectorType(WORD, 8)
_REGISTERS = 4


# --- one token --------------------------------------------------------------------------------------------------


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


# --- several tokens ---------------------------------------------------------------------------------------------


@intrinsic
def widen_bytes(context: Any, address: Any) -> Any:
    """``widen_bytes(address)``: write 64 int8 as int16, there and in the next 64 bytes. VPMOVSXBW."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.sext(load(builder, arguments[0], 0, BYTE_VECTOR), ir.VectorType(ir.IntType(16), _GROUP))
        builder.store(wide, builder.inttoptr(arguments[0], wide.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic(prefer_literal=True)
def add_row(context: Any, count: Any, totals: Any, row: Any, x: Any, scale: Any, steps: Any) -> Any:
    """``add_row(count, totals, row, x, scale, steps)``: ``total + scale · sum · step`` of a group of int8 weights.

    The first lanes of the float32 totals are those of literally so many tokens, 4 or 8. The scale is one float32 at an
    address, the steps one for each token. VPMOVSXBW, VPMADDWD, VPADDD, VCVTDQ2PS, VMULPS, VFMADD231PS.
    """
    n_tokens = count.literal_value
    floats = ir.VectorType(ir.FloatType(), n_tokens)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, totals, row, x, scale, steps = arguments
        exact = _sums_of_tokens(builder, n_tokens, row, x)
        factor = splat(builder, load(builder, scale, 0, ir.FloatType()), n_tokens)
        scaled = builder.fmul(builder.sitofp(exact, floats), factor)
        so_far = _shuffled(builder, totals, totals, range(n_tokens))
        added = call(builder, f"llvm.fma.v{n_tokens}f32", floats, scaled, load(builder, steps, 0, floats), so_far)
        return _shuffled(builder, added, added, (lane % n_tokens for lane in range(_LANES)))

    return totals(count, totals, *[types.int64] * 4), code


@intrinsic(prefer_literal=True)
def add_first_to_memory(context: Any, count: Any, address: Any, totals: Any) -> Any:
    """``add_first_to_memory(count, address, totals)``: add literally so many lanes to as many float32 there. VADDPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, totals = arguments
        first = _shuffled(builder, totals, totals, range(count.literal_value))
        place = builder.inttoptr(address, first.type.as_pointer())
        builder.store(builder.fadd(builder.load(place, align=1), first), place, align=1)
        return context.get_dummy_value()

    return types.void(count, types.int64, totals), code


def _sums_of_tokens(builder: Any, n_tokens: int, row: Any, x: Any) -> Any:
    """Return the sums of four or eight tokens with a group of a row, as so many lanes.

    Of eight vectors a, b, c, ..., whose lanes are parts of a sum each, pairs become ``[a a a a b b b b]``, pairs of
    these ``[a a c c b b d d]``, and these two ``[a c e g b d f h]``: lanes do not leave their halves again. So the
    tokens come in that order, and sums are added as soon as there are two: few wait in registers.
    """
    weights = [builder.sext(load(builder, row, 16 * i, ir.VectorType(BYTE, 16)), _SHORTS) for i in range(_REGISTERS)]

    def parts(token: int) -> Any:
        """Return the products of a token, in eight parts."""
        numbers = (load(builder, x, 2 * _GROUP * token + 32 * i, _SHORTS) for i in range(_REGISTERS))
        pairs = zip(weights, numbers, strict=True)
        a, b, c, d = (call(builder, "llvm.x86.avx2.pmadd.wd", _WORDS, *pair) for pair in pairs)
        return builder.add(builder.add(a, b), builder.add(c, d))

    def added(first: Any, second: Any, lanes: list[int], others: list[int]) -> Any:
        return builder.add(_shuffled(builder, first, second, lanes), _shuffled(builder, first, second, others))

    def four(a: int, b: int, c: int, d: int) -> Any:
        pairs = [
            added(parts(first), parts(second), [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
            for first, second in ((a, b), (c, d))
        ]
        return added(pairs[0], pairs[1], [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])

    if n_tokens == 4:
        all_four = four(0, 2, 1, 3)
        return added(all_four, all_four, [0, 2, 4, 6], [1, 3, 5, 7])
    return added(four(0, 4, 1, 5), four(2, 6, 3, 7), [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])


def _shuffled(builder: Any, first: Any, second: Any, lanes: Iterable[int]) -> Any:
    """Return some lanes of two vectors, those of the second behind those of the first."""
    lanes = [*lanes]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(WORD, len(lanes)), lanes))
