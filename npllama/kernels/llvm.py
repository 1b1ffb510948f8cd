"""What `npllama.kernels.simd` is made of: vectors as a type of Numba's, and code that is handed to LLVM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import register_model

from npllama.kernels.features import PATHS, host_features

#: Numba's own type would give each function the signature of its definition, the compiler's context first.
intrinsic: Callable[..., Callable[..., Any]] = numba_intrinsic

_declared: Any = get_or_insert_function

#: Whether a vector is one of 32 registers, of 64 bytes, and its bytes are multiplied by one instruction (`PATHS`). If
#: not, it counts as two of 16 registers, of which a quarter as many find room: a kernel says itself what that means.
WIDE = PATHS["avx512"] <= host_features()
#: The opposite. Behind ``if WIDE`` and ``if NARROW`` Numba compiles only what is ever reached.
NARROW = not WIDE
#: Whether one instruction adds the products of four bytes to a word, in registers of whatever width: VNNI, AVX-VNNI.
DOTS = WIDE or "avxvnni" in host_features()

_BYTES = 64

_LANE: dict[Any, Any] = {
    types.float32: ir.FloatType(),
    types.int32: ir.IntType(32),
    types.int8: ir.IntType(8),
    types.uint8: ir.IntType(8),
    types.uint16: ir.IntType(16),
}
_LANE_BYTES: dict[Any, int] = {types.float32: 4, types.int32: 4, types.int8: 1, types.uint8: 1, types.uint16: 2}
BYTE, WORD, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
POINTER = BYTE.as_pointer()


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type of a bfloat16, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"


class Vector(types.Type):
    """Numba's type of 64 bytes of one dtype in a vector register."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.llvm = ir.VectorType(_LANE[dtype], _BYTES // _LANE_BYTES[dtype])
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(PrimitiveModel):
    """A vector is to the compiler what LLVM calls one."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)  # type: ignore[no-untyped-call]


FLOAT_VECTOR, INT_VECTOR = ir.VectorType(ir.FloatType(), 16), ir.VectorType(WORD, 16)
BYTE_VECTOR = ir.VectorType(BYTE, 64)
SHORT_VECTOR, BFLOAT_VECTOR = ir.VectorType(ir.IntType(16), 32), ir.VectorType(_BFloat(), 32)
FLOATS, INTS = Vector(types.float32), Vector(types.int32)


def address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """Return a pointer to the element of an array at a flat index, or to the byte behind an address."""
    if isinstance(kind, types.Integer):
        return builder.inttoptr(builder.add(array, index), POINTER)
    data = builder.bitcast(context.make_array(kind)(context, builder, array).data, POINTER)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    return builder.gep(data, [builder.mul(index, ir.Constant(LONG, size))])


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call a function of LLVM's by its name."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(_declared(builder.module, kind, name), arguments)


def splat(builder: Any, value: Any, lanes: int = 16) -> Any:
    """Return a vector of one number over and over."""
    kind = ir.VectorType(value.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(WORD, lanes), [0] * lanes))


def lanes_added(builder: Any, vectors: Sequence[Any]) -> Any:
    """Return the sums of the sixteen lanes of 1, 2, 4, 8 or 16 vectors, float32 or int32, as the first lanes of one.

    A vector's lanes are added in pairs of halves. Two vectors, half of whose lanes count, become one: what belongs to
    the first stands in the lower halves of its segments.
    """
    add = builder.fadd if vectors[0].type == FLOAT_VECTOR else builder.add

    def pair(first: Any, second: Any, half: int) -> Any:
        segments = [*range(0, 16, 2 * half)]
        low = [lane for vector in (0, 16) for at in segments for lane in range(vector + at, vector + at + half)]
        parts = (ir.Constant(INT_VECTOR, [lane + shift for lane in low]) for shift in (0, half))
        return add(*(builder.shuffle_vector(first, second, lanes) for lanes in parts))

    for half in (8, 4, 2, 1):
        ones, others = vectors[::2], vectors[1::2] or vectors
        vectors = [pair(first, second, half) for first, second in zip(ones, others, strict=True)]
    return vectors[0]


def turned(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Return the four columns of sixteen rows of four words (32 bits).

    Rows 0, 4, 8 and 12 become one vector, rows 1, 5, 9 and 13 the next, and so on. The segments of four such vectors
    are squares of four words, which are turned. VINSERTI32X4, VPUNPCKLDQ, VPUNPCKHQDQ and their kin.
    """

    def joined(parts: Sequence[Any], size: int) -> Any:
        lanes = ir.Constant(ir.VectorType(WORD, 2 * size), [*range(2 * size)])
        halves = [builder.shuffle_vector(*pair, lanes) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return halves[0] if len(halves) == 1 else joined(halves, 2 * size)

    return _words_turned(builder, [joined(rows[first::4], 4) for first in range(4)])


def turned_whole(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Return the sixteen columns of sixteen rows of sixteen words, which are vectors.

    Sixteen squares of four by four words: each is turned by itself, then a square takes the place of the one across.
    VPUNPCKLDQ, VPUNPCKHQDQ, VSHUFI32X4 and their kin.
    """

    def segments(a: Any, b: Any, places: range) -> Any:
        lanes = [4 * place + word for place in places for word in range(4)]
        return builder.shuffle_vector(a, b, ir.Constant(INT_VECTOR, lanes))

    squares = [_words_turned(builder, rows[first : first + 4]) for first in range(0, 16, 4)]
    columns: list[list[Any]] = [[], [], [], []]  # those that are in the first segments, in the second ones, ...
    for a, b, c, d in zip(*squares, strict=True):
        for first in (0, 1):  # the even segments of all four, then the odd ones
            pair = segments(a, b, range(first, 8, 2)), segments(c, d, range(first, 8, 2))
            columns[first].append(segments(*pair, range(0, 8, 2)))
            columns[first + 2].append(segments(*pair, range(1, 8, 2)))
    return [column for part in columns for column in part]


def _words_turned(builder: Any, rows: Sequence[Any]) -> list[Any]:
    """Return four vectors, each segment of which (four words) has the same word of the four rows' segments there."""

    def mixed(a: Any, b: Any, places: list[int]) -> Any:
        """Take the same words of each segment of two vectors: 0 to 3 are the first one's, 4 to 7 the second one's."""
        lanes = [4 * segment + place % 4 + 16 * (place // 4) for segment in range(4) for place in places]
        return builder.shuffle_vector(a, b, ir.Constant(INT_VECTOR, lanes))

    a, b, c, d = rows
    columns = []
    for half in ([0, 4, 1, 5], [2, 6, 3, 7]):
        pairs = mixed(a, b, half), mixed(c, d, half)
        columns += [mixed(*pairs, [0, 1, 4, 5]), mixed(*pairs, [2, 3, 6, 7])]
    return columns


def upper_half(builder: Any, vector: Any) -> Any:
    """Return sixteen float32 as the nearest bfloat16 (16 bits each), ties to even; a NaN stays one.

    Half of what is cut off is added before, less one bit where the result would otherwise be odd.
    """

    def constant(value: int) -> Any:
        return ir.Constant(INT_VECTOR, [value] * 16)

    bits = builder.bitcast(vector, INT_VECTOR)
    half = builder.add(builder.and_(builder.lshr(bits, constant(16)), constant(1)), constant(0x7FFF))
    nan = builder.or_(bits, constant(0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", vector, vector), nan, builder.add(bits, half))
    return builder.trunc(builder.lshr(kept, constant(16)), ir.VectorType(ir.IntType(16), 16))


def loaded(context: Any, builder: Any, signature: Any, arguments: Any, kind: Any) -> Any:
    """Load an LLVM vector from the array and index that are the first two arguments."""
    pointer = address(context, builder, signature.args[0], *arguments[:2])
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


def first_shorts(builder: Any, place: Any, count: Any) -> Any:
    """Return sixteen numbers of 16 bits at a pointer to bytes: the first ``count`` (int64), and zeros behind them.

    No more of the memory is touched. VMOVDQU16 with a mask. Narrow registers have masks of 32 bits only: VPMASKMOVD
    loads pairs, and an odd number is loaded by itself.
    """
    size = 2 if WIDE else 4
    kind = ir.VectorType(ir.IntType(8 * size), 32 // size)
    lanes = ir.Constant(ir.VectorType(LONG, kind.count), [*range(kind.count)])
    n_there = builder.sdiv(count, LONG(size // 2))
    mask = builder.icmp_signed("<", lanes, splat(builder, n_there, kind.count))
    pointer, zeros = builder.bitcast(place, kind.as_pointer()), ir.Constant(kind, [0] * kind.count)
    found = call(builder, f"llvm.masked.load.v{kind.count}i{8 * size}.p0", kind, pointer, WORD(1), mask, zeros)
    if WIDE:
        return found
    is_odd = builder.and_(builder.icmp_unsigned("<", count, LONG(16)), builder.trunc(count, ir.IntType(1)))
    before = builder.block
    with builder.if_then(is_odd):
        last = builder.gep(place, [builder.mul(builder.sub(count, LONG(1)), LONG(2))])
        number = builder.load(builder.bitcast(last, ir.IntType(16).as_pointer()), align=1)
        is_last = builder.icmp_signed("==", lanes, splat(builder, n_there, kind.count))
        with_last = builder.select(is_last, splat(builder, builder.zext(number, WORD), kind.count), found)
        there = builder.block
    both = builder.phi(kind)
    both.add_incoming(found, before)
    both.add_incoming(with_last, there)
    return builder.bitcast(both, ir.VectorType(ir.IntType(16), 16))


def nibbles_of(builder: Any, pairs: Any) -> Any:
    """Return the low halves of 32 bytes, then the high ones. VPAND, VPSRLW, VINSERTI64X4."""
    low = builder.and_(pairs, ir.Constant(pairs.type, [15] * 32))
    high = builder.lshr(pairs, ir.Constant(pairs.type, [4] * 32))
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(WORD, 64), [*range(64)]))


def dots_of_bytes(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Return int32 lanes plus four products each, of uint8 and int8. VPDPBUSD, or VPMADDUBSW and VPMADDWD.

    The latter sum pairs of products in 16 bits first. They fit if the unsigned numbers have no more than seven; so the
    eighth is multiplied by itself.
    """
    if DOTS:
        name = f"llvm.x86.avx512.vpdpbusd.{512 if WIDE else 256}"
        operands = [(total, INT_VECTOR), (unsigned, BYTE_VECTOR), (signed, BYTE_VECTOR)]
        return _in_registers(builder, name, INT_VECTOR, operands)
    numbers = builder.bitcast(unsigned, BYTE_VECTOR)
    for mask in (127, 128):
        part = builder.and_(numbers, ir.Constant(BYTE_VECTOR, [mask] * 64))
        total = builder.add(total, pairs_added(builder, products_of_bytes(builder, part, signed)))
    return total


def dots_of_nibbles(builder: Any, total: Any, unsigned: Sequence[Any], signed: Sequence[Any]) -> Any:
    """Do `dots_of_bytes` to up to eight vectors whose unsigned numbers are below 16. VPMADDUBSW, VPADDW, VPMADDWD."""
    pairs = [products_of_bytes(builder, *factors) for factors in zip(unsigned, signed, strict=True)]
    return builder.add(total, pairs_added(builder, reduce(builder.add, pairs)))


def products_of_bytes(builder: Any, unsigned: Any, signed: Any) -> Any:
    """Return 32 int16, each the sum of two products of uint8 and int8, which must fit. VPMADDUBSW."""
    name = "llvm.x86.avx512.pmaddubs.w.512" if WIDE else "llvm.x86.avx2.pmadd.ub.sw"
    return _in_registers(builder, name, SHORT_VECTOR, [(unsigned, BYTE_VECTOR), (signed, BYTE_VECTOR)])


def products_of_shorts(builder: Any, a: Any, b: Any) -> Any:
    """Return sixteen int32, each the sum of two products of int16. VPMADDWD."""
    name = "llvm.x86.avx512.pmaddw.d.512" if WIDE else "llvm.x86.avx2.pmadd.wd"
    return _in_registers(builder, name, INT_VECTOR, [(a, SHORT_VECTOR), (b, SHORT_VECTOR)])


def dots_of_shorts(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Return int32 lanes plus two products each, of int16. VPMADDWD, VPADDD."""
    return builder.add(total, products_of_shorts(builder, a, b))


def pairs_added(builder: Any, shorts: Any) -> Any:
    """Return sixteen int32, the sums of pairs of int16. VPMADDWD."""
    return products_of_shorts(builder, shorts, ir.Constant(SHORT_VECTOR, [1] * 32))


def _in_registers(builder: Any, name: str, result: Any, operands: Sequence[tuple[Any, Any]]) -> Any:
    """Call what an instruction is named, for a whole vector or, with narrow registers, for either half."""
    vectors = [builder.bitcast(vector, kind) for vector, kind in operands]
    if WIDE:
        return call(builder, name, result, *vectors)
    halves = []
    for half in (0, 1):
        parts = []
        for vector in vectors:
            count = vector.type.count // 2
            lanes = ir.Constant(ir.VectorType(WORD, count), [*range(half * count, (half + 1) * count)])
            parts.append(builder.shuffle_vector(vector, vector, lanes))
        halves.append(call(builder, name, ir.VectorType(result.element, result.count // 2), *parts))
    both = ir.Constant(ir.VectorType(WORD, result.count), [*range(result.count)])
    return builder.shuffle_vector(*halves, both)
