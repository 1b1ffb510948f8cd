"""Memory in pages that the system hands out one by one, as they are first written."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np

from npllama.dtypes import Array

#: Bytes up to which all memory may be taken at once.
_SMALL = 1 << 26


def untouched_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return zeros that take memory as they are written: more than 64 MB of them a small page at a time.

    Parameters
    ----------
    shape : tuple of int
        Of one number at least.
    dtype : numpy dtype

    Returns
    -------
    ndarray
        Lies where a page begins. A process that is forked off has a copy.

    Raises
    ------
    MemoryError
        The system has no such room.

    Notes
    -----
    `numpy.zeros` asks Linux for huge pages, 2 MB each. Where a few rows are written in each of many places, as in a
    `KVCache` with room for a long text, it takes all of its memory at once then, and the time to clear it. Of little
    room that is the faster way: 16 MB are written in 2 ms, and in 8 to 12 page by page.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        pages = mmap.mmap(-1, size, **private)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {size} bytes") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a system that has no huge pages
            pages.madvise(mmap.MADV_HUGEPAGE if size <= _SMALL else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)
