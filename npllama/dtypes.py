"""Logical number types on plain NumPy arrays.

NumPy has no bfloat16, so a bfloat16 array is kept as its bit patterns (``uint16``) beside the name of what the bits
mean. Everything that leaves this module for arithmetic is float32 or float64: nothing is ever summed in bfloat16
(a thousand bfloat16 ones add up to 256).

Matrices can also be stored as small integers. Along each row (the axis that a product sums over) every 64 of them are
a **group** that shares a scale, and in int4 a minimum, both in bfloat16::

    int8    number = scale · q             q = -127 .. 127                8.25 bits a number
    int4    number = scale · q + minimum   q = 0 .. 15, two in a byte     4.5 bits a number

A row whose length is no multiple of 64 is filled up with integers that count for nothing. Byte j of a group of int4
holds q of number j in its low half and of number j + 32 in its high half, so that one mask and one shift unpack 32
bytes into 64 numbers that lie in order. `npllama.checkpoint.quantize` chooses the integers.
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

#: Numbers that share a scale. Two steps of a bfloat16 matrix unit and one of an int8 unit multiply as many at a time.
GROUP = 64

#: Numbers beyond this count as infinite where integers are chosen for them: 15 steps of a group's scale must stay below
#: float32's largest number.
LARGEST = np.float32(2.0**126)

#: Logical dtype of scales and minima. Its range is float32's, where float16's scales of small weights would vanish.
SCALE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Packing:
    """How the integers of a quantised dtype are stored.

    Attributes
    ----------
    storage : str
        Logical dtype of the array that holds them.
    per_byte : int
        Integers in a byte.
    highest : int
        Largest integer. The smallest is minus that without minima, and 0 with them.
    has_minima : bool
        A group has a minimum beside its scale.
    """

    storage: str
    per_byte: int
    highest: int
    has_minima: bool

    @property
    def group_bytes(self) -> int:
        """Bytes of a group's integers."""
        return GROUP // self.per_byte

    def row_bytes(self, width: int) -> int:
        """Bytes of a row's integers, whole groups."""
        return n_groups(width) * self.group_bytes


#: Quantised logical dtype -> how it is stored.
PACKINGS = {
    "int8": Packing("int8", per_byte=1, highest=127, has_minima=False),
    "int4": Packing("uint8", per_byte=2, highest=15, has_minima=True),
}


def n_groups(width: int) -> int:
    """Return how many groups a row of ``width`` numbers takes."""
    return -(-width // GROUP)


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
            bits: Array = values.astype(bfloat16()).view(np.uint16)
            return bits
    raise UnsupportedError(f"weights cannot be stored as {dtype}", remedy="Choose bf16, f32, int8 or int4.")


def bfloat16() -> np.dtype[Any]:
    """Return bfloat16 as NumPy knows it from ml_dtypes, which is imported only where it is needed."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def cast(values: Array, source: str, target: str) -> Array:
    """Convert stored values of one logical dtype to another; equal dtypes keep their bits."""
    if source == target:
        return values
    return narrow(widen(values, source, np.float64 if source == "float64" else np.float32), target)


def unpack(data: Array, packing: Packing) -> Array:
    """Return the integers of packed rows.

    Parameters
    ----------
    data : ndarray of shape (..., row_bytes)
        Whole groups.
    packing : Packing

    Returns
    -------
    ndarray of shape (..., groups, 64)
        int8 or uint8.
    """
    groups = data.reshape(*data.shape[:-1], data.shape[-1] // packing.group_bytes, packing.group_bytes)
    if packing.per_byte == 1:
        return groups
    return np.concatenate([groups & 0x0F, groups >> 4], axis=-1)


def pack(integers: Array, packing: Packing) -> Array:
    """Undo `unpack`: integers of shape (..., groups, 64), in range, to rows of bytes."""
    stored = integers.astype(STORAGE[packing.storage])
    if packing.per_byte == 2:
        half = packing.group_bytes
        stored = stored[..., :half] | stored[..., half:] << 4
    return stored.reshape(*stored.shape[:-2], stored.shape[-2] * packing.group_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A weight as it lies in memory: plain arrays, and the logical dtype that says how to read them.

    Attributes
    ----------
    data : ndarray
        Usually a read-only memory map. float32 numbers, ``uint16`` bit patterns of bfloat16, int8, or pairs of int4.
    dtype : str
        "float32", "bfloat16", "int8" or "int4".
    scales : ndarray of shape (..., groups), uint16, or None
        bfloat16 bit patterns; of a quantised tensor only.
    minima : ndarray of shape (..., groups), uint16, or None
        bfloat16 bit patterns; where the dtype has them.
    width : int or None
        Numbers in a row of a quantised tensor: ``data`` holds whole groups.
    """

    data: Array
    dtype: str
    scales: Array | None = None
    minima: Array | None = None
    width: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor of numbers."""
        return self.data.shape if self.width is None else (*self.data.shape[:-1], self.width)

    @property
    def parts(self) -> tuple[Array, ...]:
        """The arrays that make it up: data, then scales and minima where there are any."""
        return tuple(part for part in (self.data, self.scales, self.minima) if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes that reading the whole tensor moves."""
        return sum(int(part.nbytes) for part in self.parts)

    def numbers(self, index: Any = ..., to: np.dtype[Any] | type = np.float32) -> Array:
        """Return the indexed part as float32 or float64 numbers.

        Parameters
        ----------
        index : any
            Along the first axes; the rows of a quantised tensor cannot be cut.
        to : numpy dtype
            A quantised number is computed in it: exactly in float64, and for int8 in float32, too.
        """
        if self.scales is None:
            return widen(self.data[index], self.dtype, to)
        scales = widen(self.scales[index], SCALE, to)[..., None]  # (..., groups, 1)
        grouped = unpack(self.data[index], PACKINGS[self.dtype]) * scales
        if self.minima is not None:
            grouped += widen(self.minima[index], SCALE, to)[..., None]
        rows = grouped.reshape(*grouped.shape[:-2], grouped.shape[-2] * GROUP)
        return np.ascontiguousarray(rows[..., : self.width])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the first axis as a tensor on the same memory."""
        scales, minima = (None if part is None else part[start:stop] for part in (self.scales, self.minima))
        return Tensor(self.data[start:stop], self.dtype, scales, minima, self.width)
