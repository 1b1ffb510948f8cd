"""The instructions on vectors, for `sitecustomize`: functions that LLVM puts where they are called.

What they do is written from Intel's manual. Numbers below 2**-126 count as zero in those with bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

SHORT, WORD, FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()
SIGN, EXPONENT = -(1 << 31), 0x7F800000


# --- what they are made of ---------------------------------------------------------------------------------------


def every(builder: Any, vector: Any, first: int, step: int) -> Any:
    """Return each ``step``-th lane of a vector from the first on."""
    lanes = [*range(first, vector.type.count, step)]
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(WORD, len(lanes)), lanes))


def widened(builder: Any, extend: Callable[..., Any], vector: Any, lane: Any) -> Any:
    """Return integers as larger ones."""
    return extend(vector, ir.VectorType(lane, vector.type.count))


def constant(vector: Any, number: int) -> Any:
    """Return a vector of one number, of the type of another one."""
    return ir.Constant(vector.type, [number] * vector.type.count)


def as_words(builder: Any, vector: Any) -> Any:
    """Return 64 bytes as sixteen int32."""
    return builder.bitcast(vector, ir.VectorType(WORD, 16))


def flushed(builder: Any, words: Any) -> Any:
    """Return the bits of float32 numbers as these, zeros for those that are too small to be normal."""
    exponent = builder.and_(words, constant(words, EXPONENT))
    is_small = builder.icmp_unsigned("==", exponent, constant(words, 0))
    kept = builder.select(is_small, builder.and_(words, constant(words, SIGN)), words)
    return builder.bitcast(kept, ir.VectorType(FLOAT, 16))


# --- the instructions --------------------------------------------------------------------------------------------


def vpdpbusd(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Add to each int32 four products of uint8 and int8."""
    products = builder.mul(widened(builder, builder.zext, unsigned, WORD), widened(builder, builder.sext, signed, WORD))
    for place in range(4):
        total = builder.add(total, every(builder, products, place, 4))
    return total


def vpmaddubsw(builder: Any, unsigned: Any, signed: Any) -> Any:
    """Return the sums of two products of uint8 and int8 in 16 bits, or the number next to one that does not fit."""
    products = builder.mul(
        widened(builder, builder.zext, unsigned, SHORT), widened(builder, builder.sext, signed, SHORT)
    )
    pairs = [every(builder, products, place, 2) for place in (0, 1)]
    kind = ir.FunctionType(pairs[0].type, [pairs[0].type] * 2)
    return builder.call(get_or_insert_function(builder.module, kind, "llvm.sadd.sat.v32i16"), pairs)


def vpmaddwd(builder: Any, a: Any, b: Any) -> Any:
    """Return the sums of two products of int16."""
    products = builder.mul(widened(builder, builder.sext, a, WORD), widened(builder, builder.sext, b, WORD))
    return builder.add(every(builder, products, 0, 2), every(builder, products, 1, 2))


def vdpbf16ps(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Add to each float32 two products of bfloat16, the upper one first."""
    a, b = as_words(builder, a), as_words(builder, b)
    kind = ir.FunctionType(total.type, [total.type] * 3)
    fused = get_or_insert_function(builder.module, kind, "llvm.fma.v16f32")
    upper = [builder.and_(words, constant(words, -65536)) for words in (a, b)]
    lower = [builder.shl(words, constant(words, 16)) for words in (a, b)]
    total = flushed(builder, as_words(builder, total))
    for pair in (upper, lower):
        total = builder.call(fused, [*(flushed(builder, words) for words in pair), total])
        total = flushed(builder, as_words(builder, total))
    return total


def vcvtne2ps2bf16(builder: Any, high: Any, low: Any) -> Any:
    """Return 32 float32 as the nearest bfloat16, ties to even."""
    halves = []
    for vector in (low, high):
        numbers = flushed(builder, as_words(builder, vector))
        words = as_words(builder, numbers)
        is_odd = builder.and_(builder.lshr(words, constant(words, 16)), constant(words, 1))
        nearest = builder.add(words, builder.add(is_odd, constant(words, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", numbers, numbers)
        kept = builder.select(is_nan, builder.or_(words, constant(words, 0x400000)), nearest)
        halves.append(builder.trunc(builder.lshr(kept, constant(words, 16)), ir.VectorType(SHORT, 16)))
    both = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(WORD, 32), [*range(32)]))
    return builder.bitcast(both, builder.function.function_type.return_type)


#: By the names of LLVM's.
INSTRUCTIONS = {
    "llvm.x86.avx512.vpdpbusd.256": vpdpbusd,
    "llvm.x86.avx512.vpdpbusd.512": vpdpbusd,
    "llvm.x86.avx512.pmaddubs.w.512": vpmaddubsw,
    "llvm.x86.avx512.pmaddw.d.512": vpmaddwd,
    "llvm.x86.avx512bf16.dpbf16ps.512": vdpbf16ps,
    "llvm.x86.avx512bf16.cvtne2ps2bf16.512": vcvtne2ps2bf16,
}


def defined(function: Any, name: str) -> Any:
    """Return a function of a module with the code of an instruction, which it may have already."""
    if not function.blocks:
        function.linkage = "internal"
        builder = ir.IRBuilder(function.append_basic_block())
        builder.ret(INSTRUCTIONS[name](builder, *function.args))
    return function
