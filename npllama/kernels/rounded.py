"""Twins of `npllama.rounding`: activations rounded, for products that are asked to be fast and not exact.

Integers are rounded bit by bit as NumPy does it. Kernels are compiled with fast floating point, which would turn a
division into a product with a reciprocal; `divided` and `multiplied` stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.llvm import intrinsic
from npllama.kernels.simd_quantised import (
    larger,
    largest_lane,
    load_floats,
    magnitudes,
    store_low_bytes,
    sum_of_lanes,
    to_integers,
)
from npllama.kernels.subroutines import subroutine

_HIGHEST = np.float32(127)
#: Bits of 2**-100, below which a group becomes zeros, and of infinity.
_TINY, _INFINITY = np.uint32(27 << 23), np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)


def rounded(x: Array) -> Array:
    """Return float32 numbers as the nearest bfloat16, ties to even, in float32. See `npllama.rounding.rounded`."""
    y = np.empty(x.shape, np.float32)
    round_bits(np.ascontiguousarray(x).reshape(-1).view(np.uint32), y.reshape(-1).view(np.uint32))
    return y


@compiled()
def round_bits(bits: Array, results: Array) -> None:
    """Do what `rounded` does to numbers that are given as their bits (uint32)."""
    for i in range(bits.shape[0]):
        results[i] = nearest(bits[i])


@subroutine(inline=True)
def nearest(bits: Any) -> Any:
    """Return the bits of the float32 that a bfloat16 can hold which is nearest to one given by its bits (uint32).

    Half of what is cut off is added before, less one bit where the result would otherwise be odd. A NaN could become an
    infinity by that, so it only gets its quiet bit.
    """
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = np.uint32(0x400000) | bits if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else bits + half
    return np.uint32(kept) & np.uint32(0xFFFF0000)


def rounded_to_int8(x: Array) -> Array:
    """Return float32 numbers as int8 times a step, in groups. See `npllama.rounding.rounded_to_int8`."""
    y = np.empty(x.shape, np.float32)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    round_groups(rows, y.reshape(rows.shape))
    return y


@compiled()
def round_groups(x: Array, y: Array) -> None:
    """Do what `rounded_to_int8` does to rows (T, N)."""
    group, integers = np.empty(GROUP, np.float32), np.empty(GROUP, np.int8)
    for i in range(x.shape[0]):
        for first in range(0, x.shape[1], GROUP):
            width = min(GROUP, x.shape[1] - first)
            group[:width], group[width:] = x[i, first : first + width], 0
            step, _ = int8_step(group, integers)
            for j in range(width):
                y[i, first + j] = multiplied(np.float32(integers[j]), step)


@compiled()
def int8_step(group: Array, integers: Array) -> Any:
    """Write what 64 numbers are rounded to as int8; return the step (float32), and the sum of the integers (int32).

    The step is 0 for a group that becomes zeros, and NaN for one that becomes NaN; the integers are zeros then.
    """
    bits, most = group.view(np.uint32), np.uint32(0)
    for j in range(GROUP):
        most = max(most, np.uint32(bits[j] & _MAGNITUDE))  # in this order a NaN is above all numbers
    if most < _TINY or most >= _INFINITY:
        integers[:GROUP] = 0
        return np.float32(0) if most < _TINY else np.float32(np.nan), np.int32(0)
    largest = np.uint32(most).view(np.float32)
    scale, total = divided(_HIGHEST, largest), np.int32(0)
    for j in range(GROUP):
        integer = np.int32(np.rint(multiplied(group[j], scale)))
        total += integer
        integers[j] = integer
    return divided(largest, _HIGHEST), total


@compiled()
def int8_lanes(numbers: int, integers: int) -> Any:
    """Do `int8_step` to 64 float32 at one address, with 64 bytes at another, in vector registers by name."""
    a, b, c, d = load_floats(numbers, 0), load_floats(numbers, 64), load_floats(numbers, 128), load_floats(numbers, 192)
    most = np.uint32(largest_lane(larger(larger(magnitudes(a), magnitudes(b)), larger(magnitudes(c), magnitudes(d)))))
    if most < _TINY or most >= _INFINITY:
        simd.store(integers, 0, simd.broadcast(np.int32(0)))
        return np.float32(0) if most < _TINY else np.float32(np.nan), np.int32(0)
    largest = np.uint32(most).view(np.float32)
    scale = simd.broadcast(divided(_HIGHEST, largest))
    i, j = to_integers(simd.multiply(a, scale)), to_integers(simd.multiply(b, scale))
    k, m = to_integers(simd.multiply(c, scale)), to_integers(simd.multiply(d, scale))
    store_low_bytes(integers, 0, i), store_low_bytes(integers, 16, j)
    store_low_bytes(integers, 32, k), store_low_bytes(integers, 48, m)
    return divided(largest, _HIGHEST), sum_of_lanes(simd.add(simd.add(i, j), simd.add(k, m)))


#: What the inputs of products can be rounded to -> how. See `npllama.rounding.ROUNDINGS`.
ROUNDINGS: dict[str, Callable[[Array], Array]] = {"bfloat16": rounded, "int8": rounded_to_int8}


# --- arithmetic that fast floating point leaves alone ------------------------------------------------------------


def _exactly(operation: str) -> Callable[[Any, Any], Any]:
    """Return an operation of two float32 as an intrinsic. An instruction with a flag of its own is given no others."""

    def typed(context: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, operation)(*arguments, flags=("contract",))

        return types.float32(types.float32, types.float32), code

    return intrinsic(typed)


#: ``divided(a, b)`` and ``multiplied(a, b)``: the float32 nearest to the quotient or product, for use inside kernels.
divided, multiplied = _exactly("fdiv"), _exactly("fmul")
