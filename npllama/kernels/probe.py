"""What the processor and its memory can do: the limits that a model's speed is held against.

Everything is measured on the threads that the kernels use, see `npllama.kernels.threads.use_threads`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from npllama.dtypes import Array, Tensor
from npllama.kernels.jit import compiled
from npllama.kernels.matmul import linear
from npllama.kernels.simd import add, add_lanes, broadcast, fused_multiply_add

_Clock = Callable[[], float]

_LANES = 16
_CHAINS = 8  # a multiply-add takes 4 cycles and two units start one in each: so many are under way at once
_ROUNDS = 1 << 20  # some milliseconds


def read_rate(numbers: NDArray[np.float32], clock: _Clock = time.perf_counter) -> float:
    """Bytes per second that all threads together read, each streaming one contiguous part of ``numbers`` (N,)."""
    sums = np.empty(numba.get_num_threads(), np.float32)
    begin = clock()
    _stream(numbers, sums)
    return numbers.nbytes / (clock() - begin)


def multiply_add_rate(clock: _Clock = time.perf_counter) -> float:
    """Operations per second of float32 multiply-adds (two operations each) in registers, all threads together."""
    sums = np.empty(numba.get_num_threads(), np.float32)
    begin = clock()
    _multiply_add(np.float32(0.5), np.float32(1), _ROUNDS, sums)
    return 2 * _LANES * _CHAINS * _ROUNDS * len(sums) / (clock() - begin)


def product_rate(x: Array, weight: Tensor, clock: _Clock = time.perf_counter) -> float:
    """Operations per second that the kernel of matrix products reaches on x (T, N) · weight (M, N)ᵀ."""
    begin = clock()
    linear(x, weight)
    seconds = clock() - begin
    return 2 * len(x) * weight.shape[0] * weight.shape[1] / seconds


@compiled(parallel=True)
def _stream(numbers: Array, sums: Array) -> None:
    """Fill sums, one for each thread, with the sums of as many equal parts of ``numbers`` (N,)."""
    part = numbers.shape[0] // sums.shape[0]
    for i in prange(sums.shape[0]):
        total = np.float32(0)
        for j in range(i * part, (i + 1) * part):
            total += numbers[j]
        sums[i] = total


@compiled(parallel=True)
def _multiply_add(factor: Any, summand: Any, rounds: int, sums: Array) -> None:
    """Fill sums, one for each thread, with what `_chains` comes to."""
    for i in prange(sums.shape[0]):
        sums[i] = _chains(factor, summand, rounds)


@compiled()
def _chains(factor: Any, summand: Any, rounds: int) -> Any:
    """Take ``c = c * factor + summand`` so often, in eight vectors of sixteen lanes that begin with 0 to 7; sum all.

    Vectors by name, because a loop over an array would measure its loads, too, and what the compiler makes of loops
    leaves half of the widest registers empty. A processor with narrower ones takes each in parts.
    """
    a, b = broadcast(factor), broadcast(summand)
    c0, c1 = broadcast(np.float32(0)), broadcast(np.float32(1))
    c2, c3 = broadcast(np.float32(2)), broadcast(np.float32(3))
    c4, c5 = broadcast(np.float32(4)), broadcast(np.float32(5))
    c6, c7 = broadcast(np.float32(6)), broadcast(np.float32(7))
    for _ in range(rounds):
        c0, c1 = fused_multiply_add(c0, a, b), fused_multiply_add(c1, a, b)
        c2, c3 = fused_multiply_add(c2, a, b), fused_multiply_add(c3, a, b)
        c4, c5 = fused_multiply_add(c4, a, b), fused_multiply_add(c5, a, b)
        c6, c7 = fused_multiply_add(c6, a, b), fused_multiply_add(c7, a, b)
    return add_lanes(add(add(add(c0, c1), add(c2, c3)), add(add(c4, c5), add(c6, c7))))
