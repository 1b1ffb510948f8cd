"""Products with **panels**: two vectors side by side, 32 lanes, that numbers of some rows meet.

Sums are a tuple of vectors, the two of each row in turn; see `npllama.kernels.simd_sums`. Places in memory are
addresses (int64). Nothing is checked.
"""

from __future__ import annotations

from typing import Any

from numba import types

from npllama.kernels.llvm import FLOAT_VECTOR, FLOATS, INT_VECTOR, WORD, intrinsic, splat
from npllama.kernels.simd_sums import _add_floats, _changed, _pair_adder, _tuple, apart, load

_LINE = 64


@intrinsic
def outer_rows(context: Any, sums: Any, pairs: Any, lanes: Any, numbers: Any, pitch: Any) -> Any:
    """``outer_rows(sums, pairs, lanes, numbers, pitch)``: add a panel's line times a word of each row to its two sums.

    The rows' words (32 bits) are ``pitch`` bytes apart. They are float32 if ``pairs`` is None, and else, whatever it
    is, pairs of bfloat16, and so are the lanes. VFMADD231PS; VDPBF16PS.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, _, lanes, numbers, pitch = arguments
        add = _add_floats if pairs == types.none else _pair_adder()
        line = [load(builder, lanes, _LINE * i, INT_VECTOR) for i in (0, 1)]
        words = [
            splat(builder, load(builder, apart(builder, numbers, pitch, row), 0, WORD))
            for row in range(sums.count // 2)
        ]
        return _changed(context, builder, sums, tile, lambda i, total: add(builder, total, line[i % 2], words[i // 2]))

    return sums(sums, pairs, *[types.int64] * 3), code


@intrinsic(prefer_literal=True)
def shrunk_rows(context: Any, sums: Any, count: Any, factors: Any) -> Any:
    """``shrunk_rows(sums, count, factors)``: two vectors of each row at one address, times the two at the other.

    There are literally ``count`` vectors. VMULPS.
    """
    kind = _tuple(FLOATS, count.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, _, factors = arguments
        line = [load(builder, factors, _LINE * i, FLOAT_VECTOR) for i in (0, 1)]
        vectors = [builder.fmul(load(builder, place, _LINE * i, FLOAT_VECTOR), line[i % 2]) for i in range(kind.count)]
        return context.make_tuple(builder, kind, vectors)

    return kind(types.int64, count, types.int64), code
