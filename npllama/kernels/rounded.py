"""Activations rounded to bfloat16, for products that are asked to be fast and not exact."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.jit import compiled


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


@compiled(inline=True)
def nearest(bits: Any) -> Any:
    """Return the bits of the float32 that a bfloat16 can hold which is nearest to one given by its bits (uint32).

    Half of what is cut off is added before, less one bit where the result would otherwise be odd. A NaN could become an
    infinity by that, so it only gets its quiet bit.
    """
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = np.uint32(0x400000) | bits if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else bits + half
    return np.uint32(kept) & np.uint32(0xFFFF0000)
