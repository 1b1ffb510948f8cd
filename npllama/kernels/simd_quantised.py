"""Single processor instructions for weights that are small integers; see `npllama.kernels.simd` for how they are used.

Whoever takes fewer numbers than a register holds asks for no more of the memory: there may be none behind them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import (
    BYTE,
    BYTE_VECTOR,
    FLOAT_VECTOR,
    FLOATS,
    INT_VECTOR,
    INTS,
    WORD,
    Vector,
    address,
    call,
    first_shorts,
    intrinsic,
    loaded,
)

_HALF = ir.VectorType(BYTE, 32)
_BYTES = Vector(types.uint8)


def _lanes(count: int, numbers: Any) -> Any:
    """Return an LLVM vector of lane numbers."""
    return ir.Constant(ir.VectorType(WORD, count), [*numbers])


@intrinsic
def load_first_bfloat16(context: Any, array: Any, index: Any, count: Any) -> Any:
    """``load_first_bfloat16(array, index, count)``: ``count`` bit patterns, up to 16, as float32; zeros behind them.

    VMOVDQU16 with a mask or VPMASKMOVD, VPSLLD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = first_shorts(builder, address(context, builder, signature.args[0], *arguments[:2]), arguments[2])
        wide = builder.shl(builder.zext(half, INT_VECTOR), ir.Constant(INT_VECTOR, [16] * 16))
        return builder.bitcast(wide, FLOAT_VECTOR)

    return FLOATS(array, types.int64, types.int64), code


@intrinsic
def load_one_byte(context: Any, array: Any, index: Any) -> Any:
    """``load_one_byte(array, index)``: one byte as uint8. MOVZX."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return loaded(context, builder, signature, arguments, BYTE)

    return types.uint8(array, types.int64), code


@intrinsic
def load_integers(context: Any, array: Any, index: Any) -> Any:
    """``load_integers(array, index)``: 64 bytes as sixteen int32, whatever the array's dtype. VMOVDQU."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return loaded(context, builder, signature, arguments, INT_VECTOR)

    return INTS(array, types.int64), code


@intrinsic
def load_floats(context: Any, array: Any, index: Any) -> Any:
    """``load_floats(array, index)``: 64 bytes as sixteen float32, whatever the array's dtype. VMOVUPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return loaded(context, builder, signature, arguments, FLOAT_VECTOR)

    return FLOATS(array, types.int64), code


@intrinsic
def load_half(context: Any, array: Any, index: Any) -> Any:
    """``load_half(array, index)``: 32 bytes, and as many zeros behind them. VMOVDQU."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = loaded(context, builder, signature, arguments, _HALF)
        return builder.shuffle_vector(half, ir.Constant(_HALF, [0] * 32), _lanes(64, range(64)))

    return _BYTES(array, types.int64), code


@intrinsic
def low_nibbles(context: Any, vector: Any) -> Any:
    """``low_nibbles(vector)``: the low halves of 64 bytes. VPANDQ."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.and_(arguments[0], ir.Constant(BYTE_VECTOR, [15] * 64))

    return _BYTES(vector), code


@intrinsic
def high_nibbles(context: Any, vector: Any) -> Any:
    """``high_nibbles(vector)``: the high halves of 64 bytes, as small numbers. VGF2P8AFFINEQB, or VPSRLW and VPANDQ."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(arguments[0], ir.Constant(BYTE_VECTOR, [4] * 64))

    return _BYTES(vector), code


@intrinsic
def subtract(context: Any, a: Any, b: Any) -> Any:
    """``subtract(a, b)``: of two int32 vectors. VPSUBD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sub(*arguments)

    return INTS(INTS, INTS), code


@intrinsic
def magnitudes(context: Any, vector: Any) -> Any:
    """``magnitudes(vector)``: the bits of sixteen float32 without their signs, as int32. VPANDD.

    They have the order of the numbers, with NaN above all.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], INT_VECTOR)
        return builder.and_(bits, ir.Constant(INT_VECTOR, [0x7FFFFFFF] * 16))

    return INTS(FLOATS), code


@intrinsic
def to_integers(context: Any, vector: Any) -> Any:
    """``to_integers(vector)``: sixteen float32 as the nearest int32, ties to even. VRNDSCALEPS, VCVTTPS2DQ."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(call(builder, "llvm.rint.v16f32", FLOAT_VECTOR, *arguments), INT_VECTOR)

    return INTS(FLOATS), code


@intrinsic
def larger(context: Any, a: Any, b: Any) -> Any:
    """``larger(a, b)``: lane by lane, of two int32 vectors. VPMAXSD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.smax.v16i32", INT_VECTOR, *arguments)

    return INTS(INTS, INTS), code


@intrinsic
def largest_lane(context: Any, vector: Any) -> Any:
    """``largest_lane(vector)``: of sixteen int32, in pairs of halves. VPMAXSD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.vector.reduce.smax.v16i32", WORD, *arguments)

    return types.int32(INTS), code


@intrinsic
def sum_of_lanes(context: Any, vector: Any) -> Any:
    """``sum_of_lanes(vector)``: of sixteen int32, in pairs of halves. VPADDD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.vector.reduce.add.v16i32", WORD, *arguments)

    return types.int32(INTS), code


@intrinsic(prefer_literal=True)
def shift_right(context: Any, vector: Any, count: Any) -> Any:
    """``shift_right(vector, count)``: int32 lanes by a literal count, keeping their signs. VPSRAD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ashr(arguments[0], ir.Constant(INT_VECTOR, [count.literal_value] * 16))

    return INTS(vector, count), code


@intrinsic
def store_low_bytes(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """``store_low_bytes(array, index, vector)``: write the lowest byte of each int32 lane, 16 bytes. VPMOVDB."""
    few = ir.VectorType(BYTE, 16)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = address(context, builder, signature.args[0], *arguments[:2])
        builder.store(builder.trunc(arguments[2], few), builder.bitcast(pointer, few.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, INTS), code
