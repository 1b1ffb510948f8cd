"""Groups of int8 and int4 weights as float32 numbers in vector registers; `npllama.dtypes` says how they are stored."""

from __future__ import annotations

from typing import Any

from npllama.kernels import simd
from npllama.kernels.jit import compiled


@compiled(inline=True)
def dequantised_int8(data: int, scale: Any) -> Any:
    """Return the 64 numbers of a group: ``scale · q``."""
    return (
        simd.multiply(simd.load_int8(data, 0), scale),
        simd.multiply(simd.load_int8(data, 16), scale),
        simd.multiply(simd.load_int8(data, 32), scale),
        simd.multiply(simd.load_int8(data, 48), scale),
    )


@compiled(inline=True)
def dequantised_int4(data: int, scale: Any, minimum: Any) -> Any:
    """Return the 64 numbers of a group: ``scale · q + minimum``."""
    return (
        simd.fused_multiply_add(simd.load_low_nibbles(data, 0), scale, minimum),
        simd.fused_multiply_add(simd.load_low_nibbles(data, 16), scale, minimum),
        simd.fused_multiply_add(simd.load_high_nibbles(data, 0), scale, minimum),
        simd.fused_multiply_add(simd.load_high_nibbles(data, 16), scale, minimum),
    )
