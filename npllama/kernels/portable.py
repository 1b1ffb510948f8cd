"""Products with float32 and bfloat16 weights on any processor: plain loops that the compiler vectorises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor
from npllama.kernels.jit import compiled, widened
from npllama.kernels.subroutines import subroutine

#: Multiplications below which waking the other threads costs more than it saves.
_SMALL = 1 << 18
#: Bytes of input that are multiplied in one pass over the weights: they are read again for every row, from the cache.
_PASS_BYTES = 1 << 20


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        float32 or bfloat16.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    for weight, y in zip(weights, outputs, strict=True):
        n_new, (m, n) = x.shape[0], weight.shape
        product = _alone if n_new * m * n < _SMALL else _shared
        rows = max(4, _PASS_BYTES // (4 * n) // 4 * 4)  # whole tiles
        for start in range(0, n_new, rows):
            product(x[start : start + rows], weight.data, y[start : start + rows])


# Two functions, not one compiled twice: Numba's disk cache knows a kernel by its name, not by how it was compiled.


@compiled(parallel=True)
def _shared(x: Array, weight: Array, y: Array) -> None:
    """Fill y (T, M) with x (T, N) · weight (M, N)ᵀ, the rows of the weight shared between threads.

    Bands of four weight rows are dealt out in contiguous runs, so each thread streams its own part of the matrix once.
    An output is always one thread's sum in one order: the numbers do not depend on how many threads there are.
    """
    for band in prange((y.shape[1] + 3) // 4):
        _band(x, weight, y, 4 * band)


@compiled()
def _alone(x: Array, weight: Array, y: Array) -> None:
    """Fill y like `_shared`, on the calling thread."""
    for band in range((y.shape[1] + 3) // 4):
        _band(x, weight, y, 4 * band)


@subroutine(inline=True)
def _band(x: Array, weight: Array, y: Array, first: int) -> None:
    """Fill the columns of y from ``first`` on that belong to four weight rows, or to as many as are left.

    Tiles of four rows by four tokens use every number that is loaded four times; what does not fill a tile is done one
    dot product at a time.
    """
    n_new, m = y.shape
    rows = min(4, m - first)
    done = n_new - n_new % 4 if rows == 4 else 0
    for t in range(0, done, 4):
        dot_tile(x[t : t + 4], weight[first : first + 4], y[t : t + 4, first : first + 4])
    for t in range(done, n_new):
        for i in range(first, first + rows):
            y[t, i] = _dot(x[t], weight[i])


@subroutine(inline=True)
def _dot(x: Array, w: Array) -> Any:
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += widened(w[j]) * x[j]
    return total


@subroutine(inline=True)
def dot_tile(x: Array, w: Array, y: Array) -> None:
    """Fill y (4, 4) with x (4, N) · w (4, N)ᵀ: sixteen sums that the compiler keeps in vector registers."""
    a0 = a1 = a2 = a3 = np.float32(0)
    b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = np.float32(0)
    d0 = d1 = d2 = d3 = np.float32(0)
    for j in range(x.shape[1]):
        w0, w1, w2, w3 = widened(w[0, j]), widened(w[1, j]), widened(w[2, j]), widened(w[3, j])
        a, b, c, d = x[0, j], x[1, j], x[2, j], x[3, j]
        a0, a1, a2, a3 = a0 + a * w0, a1 + a * w1, a2 + a * w2, a3 + a * w3
        b0, b1, b2, b3 = b0 + b * w0, b1 + b * w1, b2 + b * w2, b3 + b * w3
        c0, c1, c2, c3 = c0 + c * w0, c1 + c * w1, c2 + c * w2, c3 + c * w3
        d0, d1, d2, d3 = d0 + d * w0, d1 + d * w1, d2 + d * w2, d3 + d * w3
    y[0, 0], y[0, 1], y[0, 2], y[0, 3] = a0, a1, a2, a3
    y[1, 0], y[1, 1], y[1, 2], y[1, 3] = b0, b1, b2, b3
    y[2, 0], y[2, 1], y[2, 2], y[2, 3] = c0, c1, c2, c3
    y[3, 0], y[3, 1], y[3, 2], y[3, 3] = d0, d1, d2, d3
