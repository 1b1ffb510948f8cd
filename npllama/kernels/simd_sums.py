"""Many sums in vector registers at once, and the instructions that add products to all of them.

Sums are a tuple of vectors (see `npllama.kernels.simd`), as many as a literal says. A compiler keeps them in registers
as long as the processor has enough, 32 of 512 bits or 16 of 256; that is what lets a number that was loaded once be
multiplied several times. Places in memory are addresses (int64). Nothing is checked.

What lanes are is up to who adds. Here each vector of the input meets some rows, and lanes are parts of one sum, to be
added up at the end (`inner_lines`). In `npllama.kernels.simd_blocks` they are rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.features import host_features
from npllama.kernels.llvm import (
    BFLOAT_VECTOR,
    FLOAT_VECTOR,
    FLOATS,
    INT_VECTOR,
    INTS,
    LONG,
    WORD,
    call,
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


# --- what products are added by ---------------------------------------------------------------------------------


def _add_floats(builder: Any, total: Any, weights: Any, numbers: Any) -> Any:
    factors = (builder.bitcast(vector, FLOAT_VECTOR) for vector in (weights, numbers))
    return call(builder, "llvm.fma.v16f32", FLOAT_VECTOR, *factors, total)


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
