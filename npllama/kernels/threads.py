"""The threads that kernels share their loops between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

import numba

#: What TBB's runtime is called on Linux since its version 2021; elsewhere Numba finds it by itself.
_TBB = "libtbb.so.12"
#: Numbers that keep a thread busy for longer than waking it takes.
_LEAST = 1 << 20


def use_threads(count: int) -> None:
    """Run kernels on ``count`` threads from now on."""
    find_tbb()
    settings: Any = numba.config
    numba.set_num_threads(min(count, settings.NUMBA_NUM_THREADS))


def share(count: int, work: Callable[[int, int], None], *, least: int = _LEAST) -> None:
    """Do ``work(start, stop)`` for parts that make up [0, count), each on a thread of its own.

    For compiled functions without a parallel loop of their own, which would take longer to compile. Handing a part to
    another thread takes up to 200 microseconds.

    Parameters
    ----------
    count : int
        Things to be worked on.
    work : callable
        A compiled function, or what calls one: it lets go of Python's lock.
    least : int
        The least that is worth a thread. Parts begin at multiples of it, so that loops over them, which run over whole
        vector registers first, treat each thing alike for any number of threads.
    """
    if count <= least:
        work(0, count)
        return
    units = -(-count // least)
    parts = max(1, min(numba.get_num_threads(), units))
    bounds = [min(count, least * (units * part // parts)) for part in range(parts + 1)]
    others = [_pool(parts - 1).submit(work, *bounds[i : i + 2]) for i in range(1, parts)]
    work(*bounds[:2])
    for other in others:
        other.result()


def rows_worth(x: Any) -> int:
    """Return how many rows of an array x (T, ...) are worth a thread."""
    return int(max(1, _LEAST * len(x) // max(1, x.size)))


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    """Return threads that wait for work. There are none until the first work comes."""
    return ThreadPoolExecutor(size, thread_name_prefix="npllama")


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
