"""Memory as kernels like it: arrays that begin where a cache line does, and no new pages for every array."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.jit import compiled

_LINE = 64
#: Names of glibc's settings (malloc.h), and their values: bytes of free memory at the end of the heap that are kept,
#: and of arrays that get pages of their own, which are given back at once; more than 32 MB is not accepted.
_TRIM_THRESHOLD, _KEPT = -1, 1 << 28
_MMAP_THRESHOLD, _OWN_PAGES = -3, 1 << 25


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed for the next array, in this process, from now on.

    By default it gives large arrays back to the system, which fills their pages with zeros before it hands them out
    again. A prompt's pass through a layer makes some 100 MB of arrays: of its time, a quarter went into that.
    """
    with suppress(OSError, AttributeError, TypeError):  # a C library of another make
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_TRIM_THRESHOLD, _KEPT)
        allocator.mallopt(_MMAP_THRESHOLD, _OWN_PAGES)


@compiled()
def address(array: Array) -> Any:
    """Return where an array's data begins, as an integer; several times faster than asking NumPy."""
    return array.ctypes.data


@compiled()
def aligned(count: int, like: Array) -> Array:
    """Return an uninitialised array of ``count`` numbers of the dtype of ``like`` that begins with a cache line."""
    spare = _LINE // like.itemsize
    array = np.empty(count + spare, like.dtype)
    start = -array.ctypes.data % _LINE // like.itemsize
    return array[start : start + count]
