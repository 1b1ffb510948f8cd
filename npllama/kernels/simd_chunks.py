"""Products with **chunks** of keys and values: 64 numbers of a row, float32 or bfloat16, of which some may be hidden.

A chunk is four lines of 64 bytes, or two of bfloat16. What meets it is float32, and lies by lines as well: a line's
numbers for each query in turn, of bfloat16 those with even places before those with odd ones, as
`npllama.kernels.simd_sums.inner_lines` has it. Which numbers of a chunk are there is said by the bits of an int64, the
first by the lowest; memory behind the others is not touched, and they count as zeros. So a row may have any length.

Places in memory are addresses (int64). Nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import BYTE, FLOAT_VECTOR, FLOATS, INT_VECTOR, LONG, WIDE, WORD, call, intrinsic
from npllama.kernels.simd_sums import _add_floats, _at, _changed, _halves, _tuple, apart, load, load_splat

_LINE, _CHUNK_NUMBERS = 64, 64
#: Bits of a number -> the LLVM type of a line, and the name of what loads some of it.
_LINES: dict[int, tuple[Any, str]] = {
    32: (INT_VECTOR, "llvm.masked.load.v16i32.p0"),
    16: (ir.VectorType(ir.IntType(16), 32), "llvm.masked.load.v32i16.p0"),
}


def _vectors(builder: Any, bits: int, address: Any, seen: Any, ahead: Any, n_lines: int) -> list[list[Any]]:
    """Return lines of a chunk as float32 vectors, one each or two; fetch what is ``ahead`` bytes behind them."""
    kind, name = _LINES[bits]
    lines = []
    for start in range(0, n_lines * kind.count, kind.count):
        place = _at(builder, address, start * bits // 8, kind)
        line = _line(builder, kind, name, place, seen, start)
        lines.append(_halves(builder, builder.bitcast(line, INT_VECTOR)) if bits == 16 else [line])
        _fetch(builder, _at(builder, builder.add(address, ahead), start * bits // 8, BYTE))
    return lines


def _line(builder: Any, kind: Any, name: str, place: Any, seen: Any, start: int) -> Any:
    """Return a line of which only what is seen is touched.

    For narrow registers masks are made, of numbers of 32 bits alone: that is for a row's end, elsewhere they would take
    longer than the products.
    """

    def masked() -> Any:
        there = builder.trunc(builder.lshr(seen, LONG(start)), ir.IntType(kind.count))
        mask = builder.bitcast(there, ir.VectorType(ir.IntType(1), kind.count))
        return call(builder, name, kind, place, WORD(1), mask, ir.Constant(kind, [0] * kind.count))

    if WIDE:
        return masked()
    whole = builder.icmp_signed("==", seen, LONG(-1))
    with builder.if_else(whole) as (then, otherwise):
        with then:
            line, end = builder.load(place, align=1), builder.block
        with otherwise:
            part, other_end = masked(), builder.block
    found = builder.phi(kind)
    found.add_incoming(line, end)
    found.add_incoming(part, other_end)
    return found


def _fetch(builder: Any, pointer: Any) -> None:
    read, second_level, data = (ir.Constant(WORD, value) for value in (0, 2, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, read, second_level, data)


@intrinsic(prefer_literal=True)
def inner_chunk(
    context: Any, sums: Any, queries: Any, like: Any, rows: Any, row_bytes: Any, seen: Any, ahead: Any, x: Any
) -> Any:
    """``inner_chunk(sums, queries, like, rows, row_bytes, seen, ahead, x)``: add the products of a chunk to each sum.

    The sums of a row are those of each query in turn, literally so many; rows are ``row_bytes`` apart and of the dtype
    of the array ``like``. VMOVDQU, VPSLLD, VPANDD, VFMADD231PS, PREFETCHT1.
    """
    n_queries, bits = queries.literal_value, like.dtype.bitwidth

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, _, _, rows, row_bytes, seen, ahead, x = arguments
        changed = [builder.extract_value(tile, i) for i in range(sums.count)]
        chunks = [
            _vectors(builder, bits, apart(builder, rows, row_bytes, row), seen, ahead, _CHUNK_NUMBERS * bits // 512)
            for row in range(sums.count // n_queries)
        ]
        at = 0
        for line in range(len(chunks[0])):
            for query in range(n_queries):
                for part in range(len(chunks[0][0])):
                    numbers = load(builder, x, at, INT_VECTOR)
                    at += _LINE
                    for row, chunk in enumerate(chunks):
                        i = row * n_queries + query
                        changed[i] = _add_floats(builder, changed[i], chunk[line][part], numbers)
        return context.make_tuple(builder, sums, changed)

    return sums(sums, queries, like, *[types.int64] * 5), code


@intrinsic(prefer_literal=True)
def outer_chunk(context: Any, sums: Any, queries: Any, like: Any, row: Any, seen: Any, ahead: Any, weights: Any) -> Any:
    """``outer_chunk(sums, queries, like, row, seen, ahead, weights)``: add a chunk times a weight of each query.

    The sums lie like what `inner_chunk` calls x: by lines, queries, and even and odd places; they may be those of the
    first lines of a chunk only. There are literally so many queries; their weights are float32 at an address, one after
    the other. VBROADCASTSS, VFMADD231PS, PREFETCHT1.
    """
    n_queries, bits = queries.literal_value, like.dtype.bitwidth
    n_lines = sums.count // (n_queries * 32 // bits)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, _, _, row, seen, ahead, weights = arguments
        lines = _vectors(builder, bits, row, seen, ahead, n_lines)
        numbers = [load_splat(builder, weights, i, ir.FloatType()) for i in range(n_queries)]
        n_parts = len(lines[0])

        def change(i: int, total: Any) -> Any:
            line, rest = divmod(i, n_queries * n_parts)
            return _add_floats(builder, total, lines[line][rest % n_parts], numbers[rest // n_parts])

        return _changed(context, builder, sums, tile, change)

    return sums(sums, queries, like, *[types.int64] * 4), code


@intrinsic(prefer_literal=True)
def shrunk_sums_at(context: Any, like: Any, address: Any, count: Any, queries: Any, factors: Any) -> Any:
    """``shrunk_sums_at(like, address, count, queries, factors)``: what `outer_chunk` adds to, times one number a query.

    The vectors, literally so many, and the queries' numbers are float32 at addresses. VMULPS.
    """
    kind, n_queries, n_parts = _tuple(FLOATS, count.literal_value), queries.literal_value, 32 // like.dtype.bitwidth

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, address, _, _, factors = arguments
        numbers = [load_splat(builder, factors, i, ir.FloatType()) for i in range(n_queries)]
        vectors = [
            builder.fmul(load(builder, address, _LINE * i, FLOAT_VECTOR), numbers[i // n_parts % n_queries])
            for i in range(kind.count)
        ]
        return context.make_tuple(builder, kind, vectors)

    return kind(like, types.int64, count, queries, types.int64), code


@intrinsic(prefer_literal=True)
def exchanged(context: Any, vector: Any, distance: Any) -> Any:
    """``exchanged(vector, distance)``: lanes so far apart, literally 8 at most, change places. VSHUFPS."""
    lanes = [lane ^ distance.literal_value for lane in range(16)]

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.shuffle_vector(arguments[0], arguments[0], ir.Constant(INT_VECTOR, lanes))

    return vector(vector, distance), code


@intrinsic
def taken_apart(context: Any, first: Any, second: Any) -> Any:
    """``taken_apart(first, second)``: of 32 numbers those with even places, and those with odd ones. VPERMT2PS."""
    return _shuffled([*range(0, 32, 2)], [*range(1, 32, 2)])


@intrinsic
def put_together(context: Any, even: Any, odd: Any) -> Any:
    """``put_together(even, odd)``: the opposite of `taken_apart`. VPERMT2PS."""
    places = [lane // 2 + 16 * (lane % 2) for lane in range(32)]
    return _shuffled(places[:16], places[16:])


def _shuffled(*places: list[int]) -> Any:
    """Return the signature and code of two vectors whose lanes are some of two other ones'."""
    kind = _tuple(FLOATS, 2)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = [builder.shuffle_vector(*arguments, ir.Constant(INT_VECTOR, lanes)) for lanes in places]
        return context.make_tuple(builder, kind, vectors)

    return kind(FLOATS, FLOATS), code
