"""The header of a .npy file, spelled by npllama itself.

NumPy accepts many headers for the same array and writes other padding from version to version. A store knows what each
of its headers must be, byte for byte, so reading one is a comparison and never an interpretation.
"""

from __future__ import annotations

import struct
from math import prod

from npllama.dtypes import STORAGE

_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNMENT = 64  # a cache line, and the width of the widest vector register


def header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the first bytes of a .npy file, format version 1.0; the data follow at a multiple of 64.

    Parameters
    ----------
    dtype : str
        Logical dtype; bfloat16 is described as ``<u2``, since NumPy would read its own bfloat16 back as ``|V2``.
    shape : tuple of int
        Shape of the array, in C order.

    Notes
    -----
    The format is NumPy's: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    text = f"{{'descr': '{STORAGE[dtype].str}', 'fortran_order': False, 'shape': {shape!r}, }}"
    prefix = len(_MAGIC) + struct.calcsize("<H")
    total = -(-(prefix + len(text) + 1) // _ALIGNMENT) * _ALIGNMENT
    padded = text.ljust(total - prefix - 1) + "\n"
    return _MAGIC + struct.pack("<H", len(padded)) + padded.encode("ascii")


def data_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of the array behind the header."""
    return prod(shape) * STORAGE[dtype].itemsize
