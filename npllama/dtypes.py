"""Logical number types on plain NumPy arrays.

NumPy has no bfloat16, so a bfloat16 array is kept as its bit patterns (``uint16``) beside the name of what the bits
mean. Everything that leaves this module for arithmetic is float32 or float64: nothing is ever summed in bfloat16
(a thousand bfloat16 ones add up to 256).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npllama.errors import UnsupportedError

Array: TypeAlias = NDArray[Any]

#: Logical dtype -> the little-endian NumPy dtype that holds it.
STORAGE: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

#: Logical dtypes that a weight can be converted from.
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


def widen(values: Array, dtype: str, to: np.dtype[Any] | type = np.float32) -> Array:
    """Turn stored values into numbers for arithmetic, exactly.

    Parameters
    ----------
    values : ndarray
        Stored values, any shape; ``uint16`` bit patterns when ``dtype`` is bfloat16.
    dtype : str
        Logical dtype of ``values``.
    to : numpy dtype
        float32 (the default) or float64.

    Returns
    -------
    ndarray
        Same shape, dtype ``to``. ``values`` itself when nothing had to change.

    Notes
    -----
    A bfloat16 is the upper half of a float32, so widening shifts the bits up by 16.
    """
    if dtype == "bfloat16":
        wide = values.astype(np.uint32)
        wide <<= np.uint32(16)
        values = wide.view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN is data here, and may pass
        return values.astype(to, copy=False)


def narrow(values: Array, dtype: str) -> Array:
    """Round float32 or float64 values to a storage dtype.

    Parameters
    ----------
    values : ndarray
        Floating-point numbers, any shape.
    dtype : str
        "float32" or "bfloat16".

    Returns
    -------
    ndarray
        float32, or ``uint16`` bit patterns. Rounded to the nearest, ties to even (float64 to bfloat16 in two such
        steps, by way of float32); a NaN stays a NaN (the usual bit trick turns some into zero or infinity) and what is
        too large becomes infinity, as IEEE 754 asks.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "float32":
            return values.astype(np.float32, copy=False)
        if dtype == "bfloat16":
            import ml_dtypes

            bits: Array = values.astype(ml_dtypes.bfloat16).view(np.uint16)
            return bits
    raise UnsupportedError(f"weights cannot be stored as {dtype}", remedy="Choose bf16 or f32.")


def cast(values: Array, source: str, target: str) -> Array:
    """Convert stored values of one logical dtype to another; equal dtypes keep their bits."""
    if source == target:
        return values
    return narrow(widen(values, source, np.float64 if source == "float64" else np.float32), target)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A weight as it lies in memory: plain arrays, and the logical dtype that says how to read them.

    Attributes
    ----------
    data : ndarray
        Usually a read-only memory map. float32 numbers, or ``uint16`` bit patterns of bfloat16.
    dtype : str
        "float32" or "bfloat16".
    """

    data: Array
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of numbers."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes that reading the whole tensor moves."""
        return int(self.data.nbytes)

    def numbers(self, index: Any = ..., to: np.dtype[Any] | type = np.float32) -> Array:
        """Return the indexed part (any index along the first axes) as float32 or float64 numbers."""
        return widen(self.data[index], self.dtype, to)
