"""Many sums in vector registers at once, and the instructions that add products to all of them.

Sums are a tuple of vectors (see `npllama.kernels.simd`), as many as a literal says. A compiler keeps them in registers
as long as the processor has enough, 32 of 512 bits or 16 of 256; that is what lets a number that was loaded once be
multiplied several times. Places in memory are addresses (int64). Nothing is checked.

Of sixteen outputs of one token after another a **column** is a vector: its lanes are rows of a matrix, and each number
of the input meets all of them (`outer_floats` and its kin). Of rows times tokens whose lanes are parts of one sum, to
be added up at the end, each vector of the input meets some rows (`inner_lines`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.features import host_features
from npllama.kernels.llvm import (
    BFLOAT_VECTOR,
    BYTE_VECTOR,
    FLOAT_VECTOR,
    FLOATS,
    INT_VECTOR,
    INTS,
    LONG,
    WORD,
    call,
    dots_of_bytes,
    dots_of_nibbles,
    dots_of_shorts,
    intrinsic,
    lanes_added,
    splat,
)

_tuple: Any = types.UniTuple

_LINE = 64


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """Return the pointer to a value so many bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.Constant(LONG, offset)), kind.as_pointer())


def load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """Return the value that lies so many bytes behind an address."""
    return builder.load(_at(builder, address, offset, kind), align=1)


def load_splat(builder: Any, address: Any, number: int, kind: Any) -> Any:
    """Return number 0, 1, ... of the words (32 bits) at an address, in all lanes."""
    return splat(builder, load(builder, address, 4 * number, kind))


def _changed(context: Any, builder: Any, kind: Any, sums: Any, change: Callable[[int, Any], Any]) -> Any:
    """Return sums after ``change(i, sum)`` to each."""
    changed = [change(i, builder.extract_value(sums, i)) for i in range(kind.count)]
    return context.make_tuple(builder, kind, changed)


# --- beginning and end ------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def no_sums(context: Any, count: Any) -> Any:
    """``no_sums(count)``: so many vectors of float32 zeros. VPXORD."""
    kind = _tuple(FLOATS, count.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.make_tuple(builder, kind, [ir.Constant(FLOAT_VECTOR, [0.0] * 16)] * kind.count)

    return kind(count), code


@intrinsic(prefer_literal=True)
def first_sums(context: Any, address: Any, count: Any) -> Any:
    """``first_sums(address, count)``: vectors of int32, each one number of memory in all lanes. VPBROADCASTD."""
    kind = _tuple(INTS, count.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = [load_splat(builder, arguments[0], i, WORD) for i in range(kind.count)]
        return context.make_tuple(builder, kind, vectors)

    return kind(types.int64, count), code


@intrinsic(prefer_literal=True)
def sums_at(context: Any, address: Any, count: Any) -> Any:
    """``sums_at(address, count)``: so many vectors of float32, one after the other. VMOVUPS."""
    kind = _tuple(FLOATS, count.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = [load(builder, arguments[0], _LINE * i, FLOAT_VECTOR) for i in range(kind.count)]
        return context.make_tuple(builder, kind, vectors)

    return kind(types.int64, count), code


@intrinsic
def store_sums(context: Any, address: Any, sums: Any) -> Any:
    """``store_sums(address, sums)``: write the vectors, one after the other. VMOVUPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for i in range(sums.count):
            place = _at(builder, arguments[0], _LINE * i, sums.dtype.llvm)
            builder.store(builder.extract_value(arguments[1], i), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, sums), code


@intrinsic
def stream(context: Any, address: Any, vector: Any) -> Any:
    """``stream(address, vector)``: write a whole cache line, past the caches. VMOVNTPS.

    A line that is written as usual is read before: half of what memory then does. The address is a multiple of 64.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        written = builder.store(arguments[1], _at(builder, arguments[0], 0, vector.llvm), align=_LINE)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(WORD, 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, vector), code


@intrinsic
def add_to_memory(context: Any, address: Any, sums: Any) -> Any:
    """``add_to_memory(address, sums)``: add float32 sums to as many vectors there. VADDPS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, tile = arguments
        for i in range(sums.count):
            place = _at(builder, address, _LINE * i, FLOAT_VECTOR)
            total = builder.fadd(builder.load(place, align=1), builder.extract_value(tile, i))
            builder.store(total, place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, sums), code


@intrinsic
def add_scaled_to_memory(context: Any, address: Any, sums: Any, scale: Any) -> Any:
    """``add_scaled_to_memory(address, sums, scale)``: add float32 sums times a vector. VFMADD231PS."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, tile, scale = arguments
        for i in range(sums.count):
            place = _at(builder, address, _LINE * i, FLOAT_VECTOR)
            total = builder.load(place, align=1)
            total = call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, builder.extract_value(tile, i), scale, total)
            builder.store(total, place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, sums, FLOATS), code


@intrinsic
def add_stepped(context: Any, totals: Any, sums: Any, scale: Any, steps: Any) -> Any:
    """``add_stepped(totals, sums, scale, steps)``: ``total + scale · sum · step`` of float32 totals and int32 sums.

    The scale is a vector, the step one float32 for each sum, at an address. VCVTDQ2PS, VMULPS, VFMADD231PS.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        so_far, tile, scale, steps = arguments

        def change(i: int, total: Any) -> Any:
            scaled = builder.fmul(builder.sitofp(builder.extract_value(tile, i), FLOAT_VECTOR), scale)
            return call(
                builder, "llvm.fma.v16f32", FLOAT_VECTOR, scaled, load_splat(builder, steps, i, ir.FloatType()), total
            )

        return _changed(context, builder, totals, so_far, change)

    return totals(totals, sums, FLOATS, types.int64), code


@intrinsic
def at_next_place(context: Any, sums: Any, numbers: Any) -> Any:
    """``at_next_place(sums, numbers)``: ``256 · sum + number`` of int32, the numbers at an address. VPSLLD, VPADDD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, numbers = arguments

        def change(i: int, total: Any) -> Any:
            shifted = builder.shl(total, ir.Constant(INT_VECTOR, [8] * 16))
            return builder.add(shifted, load_splat(builder, numbers, i, WORD))

        return _changed(context, builder, sums, tile, change)

    return sums(sums, types.int64), code


@intrinsic
def add_digits(context: Any, totals: Any, high: Any, lower: Any, scale: Any, steps: Any) -> Any:
    """``add_digits(totals, high, lower, scale, steps)``: `add_stepped` with ``65536 · high + lower`` for the sum.

    VCVTDQ2PS, VFMADD231PS, VMULPS.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        so_far, high, lower, scale, steps = arguments
        place = ir.Constant(FLOAT_VECTOR, [65536.0] * 16)

        def change(i: int, total: Any) -> Any:
            upper, rest = (builder.sitofp(builder.extract_value(tile, i), FLOAT_VECTOR) for tile in (high, lower))
            scaled = builder.fmul(call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, upper, place, rest), scale)
            step = load_splat(builder, steps, i, ir.FloatType())
            return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, scaled, step, total)

        return _changed(context, builder, totals, so_far, change)

    return totals(totals, high, lower, FLOATS, types.int64), code


@intrinsic
def add_outer_to_memory(context: Any, address: Any, vector: Any, numbers: Any) -> Any:
    """``add_outer_to_memory(address, vector, numbers)``: add a vector times each of 16 numbers to 16 vectors there.

    The numbers are float32 at an address. VFMADD231PS.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, vector, numbers = arguments
        for i in range(16):
            place = _at(builder, address, _LINE * i, FLOAT_VECTOR)
            number, total = load_splat(builder, numbers, i, ir.FloatType()), builder.load(place, align=1)
            builder.store(call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, vector, number, total), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, FLOATS, types.int64), code


@intrinsic
def store_totals(context: Any, address: Any, sums: Any) -> Any:
    """``store_totals(address, sums)``: write the sum of each vector's lanes, of 1, 2, 4, 8 or 16 float32 or int32.

    VPERMT2PS, VADDPS, VPADDD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, tile = arguments
        totals = lanes_added(builder, [builder.extract_value(tile, i) for i in range(sums.count)])
        few = ir.Constant(ir.VectorType(WORD, sums.count), [*range(sums.count)])
        place = _at(builder, address, 0, ir.VectorType(totals.type.element, sums.count))
        builder.store(builder.shuffle_vector(totals, totals, few), place, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, sums), code


# --- outer products: a vector of weights, a number of each token ------------------------------------------------


def _outer(kind: Any, add: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """Return the signature and code of ``sums[i] + weights · word i of the input``, as ``add`` says."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, weights, x = arguments
        vector = load(builder, weights, 0, INT_VECTOR)

        def change(i: int, total: Any) -> Any:
            return add(builder, total, vector, load_splat(builder, x, i, WORD))

        return _changed(context, builder, kind, sums, change)

    return kind(kind, types.int64, types.int64), code


@intrinsic
def outer_floats(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_floats(sums, weights, x)``: add sixteen float32 at one address times each number at the other.

    VFMADD231PS.
    """
    return _outer(sums, _add_floats)


def _add_floats(builder: Any, total: Any, weights: Any, numbers: Any) -> Any:
    factors = (builder.bitcast(vector, FLOAT_VECTOR) for vector in (weights, numbers))
    return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, *factors, total)


@intrinsic
def outer_pairs(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_pairs(sums, weights, x)``: the same with pairs of bfloat16 for numbers. VDPBF16PS.

    The products of a pair are added to the sum one after the other, the upper one first, each rounded to float32.
    Numbers below 2**-126 may count as zero: a processor without the instruction keeps them.
    """
    return _outer(sums, _pair_adder())


def _pair_adder() -> Callable[[Any, Any, Any, Any], Any]:
    return _add_pair if "avx512bf16" in host_features() else _add_pair_in_two


def _add_pair(builder: Any, total: Any, weights: Any, pair: Any) -> Any:
    factors = (builder.bitcast(vector, BFLOAT_VECTOR) for vector in (weights, pair))
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOAT_VECTOR, total, *factors)


def _add_pair_in_two(builder: Any, total: Any, weights: Any, pair: Any) -> Any:
    """Do `_add_pair` with float32: a bfloat16 is the upper half of one."""
    for part in reversed([*zip(_halves(builder, weights), _halves(builder, pair), strict=True)]):
        factors = (builder.bitcast(vector, FLOAT_VECTOR) for vector in part)
        total = call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, *factors, total)
    return total


def _halves(builder: Any, words: Any) -> list[Any]:
    """Return the lower and the upper bfloat16 of words, as the bits of float32."""
    lower = builder.shl(words, ir.Constant(words.type, [16] * words.type.count))
    return [lower, builder.and_(words, ir.Constant(words.type, [-65536] * words.type.count))]


@intrinsic
def outer_bytes(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_bytes(sums, weights, x)``: the same with four uint8 weights and int8 for a number. VPDPBUSD."""
    return _outer(sums, dots_of_bytes)


@intrinsic
def outer_words(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_words(sums, weights, x)``: the same with pairs of int16 for numbers. VPMADDWD, VPADDD."""
    return _outer(sums, dots_of_shorts)


@intrinsic
def outer_nibbles(context: Any, sums: Any, weights: Any, x: Any) -> Any:
    """``outer_nibbles(sums, weights, x)``: what `outer_bytes` does to eight lines, with weights of 4 bits.

    Sums of sixteen products fit into 16 bits. VPMADDUBSW, VPADDW, VPMADDWD.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, weights, x = arguments
        lines = [load(builder, weights, _LINE * i, BYTE_VECTOR) for i in range(8)]

        def change(i: int, total: Any) -> Any:
            words = [load_splat(builder, x, 16 * line + i, WORD) for line in range(8)]
            return dots_of_nibbles(builder, total, lines, words)

        return _changed(context, builder, sums, tile, change)

    return sums(sums, *[types.int64] * 2), code


# --- inner products: a vector of some rows, a vector of each token ----------------------------------------------


@intrinsic(prefer_literal=True)
def inner_lines(context: Any, sums: Any, rows: Any, kind: Any, weights: Any, row_bytes: Any, x: Any) -> Any:
    """``inner_lines(sums, rows, kind, weights, row_bytes, x)``: add the products of a line to each sum.

    The sums of a row are those of each token in turn. Of literally so many rows, ``row_bytes`` apart, 64 bytes are
    multiplied with as many numbers of each token, one token behind the other. The kind is a literal: 0 for float32
    rows; 1 for bfloat16 times float32, those with even places, and their tokens' numbers, first; 2 for pairs of
    bfloat16, as in `outer_pairs`. VPSLLD, VPANDD, VFMADD231PS; VDPBF16PS.
    """
    n_rows, kind_of = rows.literal_value, kind.literal_value
    n_tokens, parts = sums.count // n_rows, 2 if kind_of == 1 else 1

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, _, _, weights, row_bytes, x = arguments
        add = _pair_adder() if kind_of == 2 else _add_floats

        def line(row: int) -> list[Any]:
            words = load(builder, apart(builder, weights, row_bytes, row), 0, INT_VECTOR)
            return _halves(builder, words) if kind_of == 1 else [words]

        lines = [line(row) for row in range(n_rows)]
        tokens = [load(builder, x, _LINE * i, INT_VECTOR) for i in range(parts * n_tokens)]

        def change(i: int, total: Any) -> Any:
            row, token = divmod(i, n_tokens)
            for part in range(parts):
                total = add(builder, total, lines[row][part], tokens[parts * token + part])
            return total

        return _changed(context, builder, sums, tile, change)

    return sums(sums, rows, kind, *[types.int64] * 3), code


# --- a vector for each token ------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def add_products_at(context: Any, sums: Any, rows: Any, weights: Any, x: Any, pitch: Any) -> Any:
    """``add_products_at(sums, rows, weights, x, pitch)``: add a vector of each row times one of each token.

    Those of literally so many rows lie one after the other, those of tokens ``pitch`` bytes apart. The sums of a row
    are those of each token in turn. VFMADD231PS.
    """
    n_tokens = sums.count // rows.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, _, weights, x, pitch = arguments
        tokens = [load(builder, apart(builder, x, pitch, t), 0, FLOAT_VECTOR) for t in range(n_tokens)]

        def change(i: int, total: Any) -> Any:
            row, token = divmod(i, n_tokens)
            weight = load(builder, weights, _LINE * row, FLOAT_VECTOR)
            return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, weight, tokens[token], total)

        return _changed(context, builder, sums, tile, change)

    return sums(sums, rows, *[types.int64] * 3), code


def apart(builder: Any, address: Any, pitch: Any, number: int) -> Any:
    """Return the address of the number-th of things that lie so many bytes apart."""
    return builder.add(address, builder.mul(pitch, ir.Constant(LONG, number)))
