"""The threads that kernels share their loops between."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

import numba

#: What TBB's runtime is called on Linux since its version 2021; elsewhere Numba finds it by itself.
_TBB = "libtbb.so.12"


def use_threads(count: int) -> None:
    """Run kernels on ``count`` threads from now on."""
    find_tbb()
    settings: Any = numba.config
    numba.set_num_threads(min(count, settings.NUMBA_NUM_THREADS))


@cache
def find_tbb() -> bool:
    """Load the TBB runtime that the package index brings, so that Numba can use it; tell whether that worked.

    A token passes through hundreds of short parallel loops. With OpenMP each of them waits for every thread to have its
    turn on a processor: beside one other busy program that costs a time slice a loop, and two threads were seen to be
    four times slower than one. TBB's threads take work from one another, so that whoever runs gets it done. pip
    installs the runtime where no loader looks for it; once it is in the process, Numba's own library is linked to it.
    """
    with suppress(metadata.PackageNotFoundError, OSError):
        for file in metadata.files("tbb") or ():
            if file.name == _TBB:
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
                return True
    return False
