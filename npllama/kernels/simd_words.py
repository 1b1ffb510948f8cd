"""Words of 32 bits that hold several stored numbers, taken apart for sixteen lanes at once.

See `npllama.kernels.simd` for vectors. Which number of a word is meant is a literal: 0 is the one in the lowest bits.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from npllama.kernels.llvm import FLOAT_VECTOR, FLOATS, INT_VECTOR, INTS, SHORT_VECTOR, WORD, intrinsic
from npllama.kernels.simd import bfloat16_bits


def _all(value: int) -> Any:
    """Return a vector of one int32 over and over."""
    return ir.Constant(INT_VECTOR, [value] * 16)


@intrinsic(prefer_literal=True)
def bfloat16_of(context: Any, words: Any, number: Any) -> Any:
    """``bfloat16_of(words, number)``: one of two bfloat16 as float32. VPSLLD or VPANDD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if number.literal_value == 0:
            return builder.bitcast(builder.shl(arguments[0], _all(16)), FLOAT_VECTOR)
        return builder.bitcast(builder.and_(arguments[0], _all(-65536)), FLOAT_VECTOR)

    return FLOATS(words, number), code


@intrinsic(prefer_literal=True)
def int8_of(context: Any, words: Any, number: Any) -> Any:
    """``int8_of(words, number)``: one of four int8 as float32. VPSLLD, VPSRAD, VCVTDQ2PS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        upper = builder.shl(arguments[0], _all(24 - 8 * number.literal_value))
        return builder.sitofp(builder.ashr(upper, _all(24)), FLOAT_VECTOR)

    return FLOATS(words, number), code


@intrinsic
def even_bytes(context: Any, words: Any) -> Any:
    """``even_bytes(words)``: of four int8 the first and the third, as words of two int16. VPSLLW, VPSRAW."""
    return _bytes_as_shorts(words, is_even=True)


@intrinsic
def odd_bytes(context: Any, words: Any) -> Any:
    """``odd_bytes(words)``: of four int8 the second and the fourth, as words of two int16. VPSRAW."""
    return _bytes_as_shorts(words, is_even=False)


def _bytes_as_shorts(words: Any, is_even: bool) -> Any:
    """Return the signature and code of the two above."""
    eight = ir.Constant(SHORT_VECTOR, [8] * 32)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shorts = builder.bitcast(arguments[0], SHORT_VECTOR)
        return builder.bitcast(builder.ashr(builder.shl(shorts, eight) if is_even else shorts, eight), INT_VECTOR)

    return INTS(words), code


@intrinsic(prefer_literal=True)
def nibble_of(context: Any, words: Any, number: Any) -> Any:
    """``nibble_of(words, number)``: one of eight halves of bytes as float32, less 8. VPSLLD, VPXORD, VPSRAD, VCVTDQ2PS.

    With its top bit turned over, an unsigned number of four bits is the signed one that is smaller by 8.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        upper = builder.xor(builder.shl(arguments[0], _all(28 - 4 * number.literal_value)), _all(-(1 << 31)))
        return builder.sitofp(builder.ashr(upper, _all(28)), FLOAT_VECTOR)

    return FLOATS(words, number), code


@intrinsic
def pair_of(context: Any, low: Any, high: Any) -> Any:
    """``pair_of(low, high)``: words of two bfloat16, from float32 whose lower halves are zeros. VPSRLD, VPORD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high = (builder.bitcast(vector, INT_VECTOR) for vector in arguments)
        return builder.or_(builder.lshr(low, _all(16)), high)

    return INTS(FLOATS, FLOATS), code


@intrinsic
def rounded_pair(context: Any, low: Any, high: Any) -> Any:
    """``rounded_pair(low, high)``: words of two bfloat16, the nearest to float32. VCVTNE2PS2BF16, VPERMW.

    See `npllama.kernels.simd.to_bfloat16`.
    """
    places = [lane // 2 + 16 * (lane % 2) for lane in range(32)]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = bfloat16_bits(builder, *arguments)
        mixed = builder.shuffle_vector(halves, halves, ir.Constant(ir.VectorType(WORD, 32), places))
        return builder.bitcast(mixed, INT_VECTOR)

    return INTS(FLOATS, FLOATS), code
