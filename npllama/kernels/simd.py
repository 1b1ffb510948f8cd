"""Single processor instructions, as functions for use inside kernels: vectors of 64 bytes, and matrix tiles.

Each function is one instruction (or one idiom that the compiler turns into one or two); the name in capitals in its
comment is Intel's. They are chosen by `npllama.kernels.features`: a kernel that calls one which the processor lacks
does not compile there. Arrays are C-contiguous, and positions in them are flat: elements from the first. An address
(int64) stands for an array of bytes, where no new value is read. Nothing is checked; whoever calls keeps within the
array.

Vectors
-------
A vector is 64 bytes of one dtype: sixteen float32 or int32, or 64 bytes. It lives in a variable of a kernel, never in
an array, and never outside of compiled code. With AVX-512, for which instructions are named here, it is one register;
with AVX2 it is two, and an instruction becomes two or a few (`npllama.kernels.llvm`).

Tiles
-----
A tile is one of eight registers, 0 to 7, of up to 16 rows of up to 64 bytes (Intel AMX). Their number is part of the
instruction, so it must be a literal. A thread gives them their shapes with `tile_configure` before it uses them, and
ends with `tile_release`; the process must have asked for them (`npllama.kernels.features`). Reference: Intel 64 and
IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, https://intel.com/sdm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.features import host_features
from npllama.kernels.llvm import (
    BFLOAT_VECTOR,
    BYTE,
    FLOAT_VECTOR,
    FLOATS,
    INT_VECTOR,
    INTS,
    LONG,
    SHORT_VECTOR,
    WORD,
    Vector,
    address,
    call,
    dots_of_bytes,
    intrinsic,
    lanes_added,
    loaded,
    nibbles_of,
    splat,
    turned_whole,
    upper_half,
)

# --- vectors: memory --------------------------------------------------------------------------------------------


@intrinsic
def load(context: Any, array: Any, index: Any) -> Any:
    """``load(array, index)``: 64 bytes as a vector of the array's dtype. VMOVUPS, VMOVDQU."""
    vector = Vector(array.dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return loaded(context, builder, signature, arguments, vector.llvm)

    return vector(array, types.int64), code


@intrinsic
def store(context: Any, array: Any, index: Any, vector: Any) -> Any:
    """``store(array, index, vector)``: write 64 bytes. VMOVUPS, VMOVDQU."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(pointer, vector.llvm.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), code


@intrinsic
def load_bfloat16(context: Any, array: Any, index: Any) -> Any:
    """``load_bfloat16(array, index)``: sixteen bfloat16 bit patterns (uint16) as float32. VPMOVZXWD, VPSLLD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = loaded(context, builder, signature, arguments, ir.VectorType(ir.IntType(16), 16))
        return builder.bitcast(
            builder.shl(builder.zext(half, INT_VECTOR), ir.Constant(INT_VECTOR, [16] * 16)), FLOAT_VECTOR
        )

    return FLOATS(array, types.int64), code


@intrinsic
def store_one(context: Any, array: Any, index: Any, number: Any) -> Any:
    """``store_one(array, index, number)``: write one number. MOVSS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = address(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], builder.bitcast(pointer, arguments[2].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, number), code


@intrinsic
def load_bytes(context: Any, array: Any, index: Any) -> Any:
    """``load_bytes(array, index)``: 64 bytes as they are, as a vector of uint8. VMOVDQU."""
    vector = Vector(types.uint8)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return loaded(context, builder, signature, arguments, vector.llvm)

    return vector(array, types.int64), code


@intrinsic
def load_nibbles(context: Any, array: Any, index: Any) -> Any:
    """``load_nibbles(array, index)``: the low halves of 32 bytes, then the high ones. VPAND, VPSRLW, VINSERTI64X4."""
    vector = Vector(types.uint8)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return nibbles_of(builder, loaded(context, builder, signature, arguments, ir.VectorType(BYTE, 32)))

    return vector(array, types.int64), code


@intrinsic
def load_int8(context: Any, array: Any, index: Any) -> Any:
    """``load_int8(array, index)``: sixteen int8 as float32. VPMOVSXBD, VCVTDQ2PS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = loaded(context, builder, signature, arguments, ir.VectorType(BYTE, 16))
        return builder.sitofp(builder.sext(numbers, INT_VECTOR), FLOAT_VECTOR)

    return FLOATS(array, types.int64), code


@intrinsic
def load_low_nibbles(context: Any, array: Any, index: Any) -> Any:
    """``load_low_nibbles(array, index)``: the low halves of sixteen bytes as float32. VPMOVZXBD, VPANDD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pairs = loaded(context, builder, signature, arguments, ir.VectorType(BYTE, 16))
        low = builder.and_(pairs, ir.Constant(ir.VectorType(BYTE, 16), [15] * 16))
        return builder.sitofp(builder.zext(low, INT_VECTOR), FLOAT_VECTOR)

    return FLOATS(array, types.int64), code


@intrinsic
def load_high_nibbles(context: Any, array: Any, index: Any) -> Any:
    """``load_high_nibbles(array, index)``: the high halves of sixteen bytes as float32. VPMOVZXBD, VPSRLD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pairs = builder.zext(loaded(context, builder, signature, arguments, ir.VectorType(BYTE, 16)), INT_VECTOR)
        return builder.sitofp(builder.lshr(pairs, ir.Constant(INT_VECTOR, [4] * 16)), FLOAT_VECTOR)

    return FLOATS(array, types.int64), code


@intrinsic
def load_one_bfloat16(context: Any, array: Any, index: Any) -> Any:
    """``load_one_bfloat16(array, index)``: one bit pattern as a float32. MOVZX, SHL."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = loaded(context, builder, signature, arguments, ir.IntType(16))
        return builder.bitcast(builder.shl(builder.zext(bits, WORD), WORD(16)), ir.FloatType())

    return types.float32(array, types.int64), code


@intrinsic
def prefetch(context: Any, array: Any, index: Any) -> Any:
    """``prefetch(array, index)``: ask for the cache line of an element; it may lie outside the array. PREFETCHT1."""
    return _prefetching(array, 2)


@intrinsic
def prefetch_near(context: Any, array: Any, index: Any) -> Any:
    """``prefetch_near(array, index)``: the same, right into the first-level cache, which is small. PREFETCHT0."""
    return _prefetching(array, 3)


def _prefetching(array: Any, locality: int) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = address(context, builder, signature.args[0], *arguments)
        read, where, data = (ir.Constant(WORD, value) for value in (0, locality, 1))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, where, data)
        return context.get_dummy_value()

    return types.void(array, types.int64), code


# --- vectors: arithmetic ----------------------------------------------------------------------------------------


@intrinsic
def broadcast(context: Any, value: Any) -> Any:
    """``broadcast(value)``: one float32 or int32 in all sixteen lanes. VBROADCASTSS, VPBROADCASTD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat(builder, arguments[0])

    return Vector(value)(value), code


@intrinsic
def fused_multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """``fused_multiply_add(a, b, c)``: ``a * b + c`` of float32 vectors, rounded once. VFMADD231PS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, *arguments)

    return FLOATS(FLOATS, FLOATS, FLOATS), code


@intrinsic
def add(context: Any, a: Any, b: Any) -> Any:
    """``add(a, b)``: of two vectors of float32, or of integers. VADDPS, VPADDD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return (builder.fadd if a == FLOATS else builder.add)(*arguments)

    return a(a, a), code


@intrinsic
def multiply(context: Any, a: Any, b: Any) -> Any:
    """``multiply(a, b)``: of two float32 vectors. VMULPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return FLOATS(FLOATS, FLOATS), code


@intrinsic
def maximum(context: Any, a: Any, b: Any) -> Any:
    """``maximum(a, b)``: ``a if a > b else b`` of two float32 vectors; b where either is NaN. VMAXPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return FLOATS(FLOATS, FLOATS), code


@intrinsic
def nearest(context: Any, vector: Any) -> Any:
    """``nearest(vector)``: float32 lanes rounded to whole numbers, ties to even. VRNDSCALEPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return call(builder, "llvm.rint.v16f32", FLOAT_VECTOR, *arguments)

    return FLOATS(FLOATS), code


@intrinsic
def power_of_two(context: Any, vector: Any) -> Any:
    """``power_of_two(vector)``: ``2**n`` of whole float32 lanes from -127, which gives 0, to 127. VPSLLD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        exponent = builder.add(builder.fptosi(arguments[0], INT_VECTOR), ir.Constant(INT_VECTOR, [127] * 16))
        return builder.bitcast(builder.shl(exponent, ir.Constant(INT_VECTOR, [23] * 16)), FLOAT_VECTOR)

    return FLOATS(FLOATS), code


@intrinsic
def to_bfloat16(context: Any, low: Any, high: Any) -> Any:
    """``to_bfloat16(low, high)``: 32 float32 as the nearest bfloat16 (uint16), ties to even. VCVTNE2PS2BF16.

    Numbers below 2**-126 may count as zero: a processor without the instruction keeps them.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return bfloat16_bits(builder, *arguments)

    return Vector(types.uint16)(FLOATS, FLOATS), code


def bfloat16_bits(builder: Any, low: Any, high: Any) -> Any:
    """Return 32 float32 as the bits of bfloat16, for `to_bfloat16` and its kin."""
    if "avx512bf16" in host_features():
        rounded = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BFLOAT_VECTOR, high, low)
        return builder.bitcast(rounded, SHORT_VECTOR)
    halves = (upper_half(builder, vector) for vector in (low, high))
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(WORD, 32), [*range(32)]))


@intrinsic(prefer_literal=True)
def shift_left(context: Any, vector: Any, count: Any) -> Any:
    """``shift_left(vector, count)``: int32 lanes by a literal count. VPSLLD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shl(arguments[0], ir.Constant(vector.llvm, [count.literal_value] * vector.llvm.count))

    return vector(vector, count), code


@intrinsic
def to_float(context: Any, vector: Any) -> Any:
    """``to_float(vector)``: sixteen int32 as float32. VCVTDQ2PS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], FLOAT_VECTOR)

    return FLOATS(INTS), code


@intrinsic
def add_lanes(context: Any, vector: Any) -> Any:
    """``add_lanes(vector)``: sum of sixteen float32, in pairs of halves."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(lanes_added(builder, arguments), ir.Constant(WORD, 0))

    return types.float32(FLOATS), code


def _transpose(flip: int) -> Any:
    """Return an intrinsic that turns a square of words, of each of which some bits are turned over."""

    def typed(context: Any, source: Any, at: Any, stride: Any, target: Any, to: Any, step: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, at, stride, target, to, step = arguments
            start = address(context, builder, signature.args[0], source, at)
            end = address(context, builder, signature.args[3], target, to)

            def place(first: Any, distance: Any, row: int) -> Any:
                offset = builder.mul(distance, ir.Constant(LONG, row))
                return builder.bitcast(builder.gep(first, [offset]), INT_VECTOR.as_pointer())

            rows = [builder.load(place(start, stride, row), align=1) for row in range(16)]
            if flip != 0:
                rows = [builder.xor(row, ir.Constant(INT_VECTOR, [flip] * 16)) for row in rows]
            for row, column in enumerate(turned_whole(builder, rows)):
                builder.store(column, place(end, step, row), align=1)
            return context.get_dummy_value()

        return types.void(source, types.int64, types.int64, target, types.int64, types.int64), code

    return intrinsic(typed)


#: ``transpose(source, at, stride, target, to, step)``: turn 16 rows of 16 words (32 bits) into columns. The rows of the
#: source begin at an element and are ``stride`` bytes apart, those of the target ``step`` bytes. They are written in
#: order, 64 bytes each, after all were read; see `npllama.kernels.llvm.turned_whole`.
transpose = _transpose(0)
#: ``transpose_flipped``: the same with the top bit of each byte turned over, which makes int8 uint8, 128 larger.
transpose_flipped = _transpose(-0x7F7F7F80)


@intrinsic
def dot_bytes(context: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """``dot_bytes(total, unsigned, signed)``: add to each int32 lane four products of uint8 and int8. VPDPBUSD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return dots_of_bytes(builder, *arguments)

    return INTS(INTS, unsigned, signed), code


# --- tiles ------------------------------------------------------------------------------------------------------


def _on_tiles(name: str, numbers: tuple[Any, ...], codes: Callable[..., Any] | None = None) -> Any:
    """Return the code of an instruction on tiles with literal numbers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tiles = [ir.Constant(BYTE, number.literal_value) for number in numbers]
        rest = codes(context, builder, signature, arguments[len(numbers) :]) if codes else []
        call(builder, f"llvm.x86.{name}", ir.VoidType(), *tiles, *rest)
        return context.get_dummy_value()

    return code


@intrinsic
def tile_configure(context: Any, shapes: Any) -> Any:
    """``tile_configure(shapes)``: give this thread's tiles their shapes, from 64 bytes (uint8). LDTILECFG.

    Byte 0 is 1; from byte 16 on a uint16 for each tile, its bytes a row; from byte 48 on a uint8 each, its rows.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = address(context, builder, signature.args[0], arguments[0], ir.Constant(LONG, 0))
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), pointer)
        return context.get_dummy_value()

    return types.void(shapes), code


@intrinsic
def tile_release(context: Any) -> Any:
    """``tile_release()``: this thread is done with its tiles. TILERELEASE."""
    return types.void(), _on_tiles("tilerelease", ())


@intrinsic(prefer_literal=True)
def tile_zero(context: Any, tile: Any) -> Any:
    """``tile_zero(tile)``: fill with zeros. TILEZERO."""
    return types.void(tile), _on_tiles("tilezero", (tile,))


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    array, index, stride = arguments
    return address(context, builder, signature.args[1], array, index), stride


@intrinsic(prefer_literal=True)
def tile_load(context: Any, tile: Any, array: Any, index: Any, stride: Any) -> Any:
    """``tile_load(tile, array, index, stride)``: rows from an element on, ``stride`` bytes apart. TILELOADD."""
    return types.void(tile, array, types.int64, types.int64), _on_tiles("tileloadd64", (tile,), _place)


@intrinsic(prefer_literal=True)
def tile_store(context: Any, tile: Any, array: Any, index: Any, stride: Any) -> Any:
    """``tile_store(tile, array, index, stride)``: write rows to an element on, ``stride`` bytes apart. TILESTORED."""
    return types.void(tile, array, types.int64, types.int64), _on_tiles("tilestored64", (tile,), _place)


@intrinsic(prefer_literal=True)
def tile_dot_bfloat16(context: Any, total: Any, a: Any, b: Any) -> Any:
    """``tile_dot_bfloat16(total, a, b)``: add a matrix product of bfloat16 to float32 sums. TDPBF16PS.

    ``total[m, n] += sum_k a[m, k] * b[k, n]``, where b holds two k in a row: ``b[k // 2, 2 n + k % 2]``. The products
    of even and of odd k are summed apart, from zero, then added to each other and to the total, each step rounded to
    float32; numbers below the smallest normal one count as zero.
    """
    return types.void(total, a, b), _on_tiles("tdpbf16ps", (total, a, b))


@intrinsic(prefer_literal=True)
def tile_dot_int8(context: Any, total: Any, a: Any, b: Any) -> Any:
    """``tile_dot_int8(total, a, b)``: like `tile_dot_bfloat16`, with int8, four k in a row, and int32 sums. TDPBSSD."""
    return types.void(total, a, b), _on_tiles("tdpbssd", (total, a, b))
