"""Products with int8 and int4 weights, in plain loops: the path for any processor.

Rows of the weight are widened to float32 in the first-level cache, four at a time, and multiplied from there. See
`npllama.dtypes` for how they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor
from npllama.kernels.jit import compiled, widened
from npllama.kernels.subroutines import subroutine


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, for several weights that share N.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        int8 or int4.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    for weight, y in zip(weights, outputs, strict=True):
        _multiply(x, weight.data, weight.scales, weight.minima, y)


@compiled(parallel=True)
def _multiply(x: Array, data: Array, scales: Any, minima: Any, y: Array) -> None:
    """Fill y (T, M); bands of four weight rows are dealt out in contiguous runs.

    A number of the output is one sum in one order, whatever the threads.
    """
    n_new, m = y.shape
    for band in prange((m + 3) // 4):
        first = 4 * band
        count = min(4, m - first)
        rows = np.zeros((4, 64 * scales.shape[1]), np.float32)
        for i in range(count):
            if minima is None:
                _widen_int8(data[first + i], scales[first + i], rows[i])
            else:
                _widen_int4(data[first + i], scales[first + i], minima[first + i], rows[i])
        for t in range(n_new):
            a, b, c, d = _dots(x[t], rows)
            for i, total in enumerate((a, b, c, d)):
                if i < count:
                    y[t, first + i] = total


@subroutine(inline=True)
def _widen_int8(data: Array, scales: Array, row: Array) -> None:
    """Fill row with ``scale · q``."""
    for g in range(scales.shape[0]):
        scale = widened(scales[g])
        for j in range(64 * g, 64 * g + 64):
            row[j] = np.float32(data[j]) * scale


@subroutine(inline=True)
def _widen_int4(data: Array, scales: Array, minima: Array, row: Array) -> None:
    """Fill row with ``scale · q + minimum``: the low halves of a group's 32 bytes, then the high ones."""
    for g in range(scales.shape[0]):
        scale, minimum = widened(scales[g]), widened(minima[g])
        for j in range(32):
            pair = data[32 * g + j]
            row[64 * g + j] = np.float32(pair & np.uint8(15)) * scale + minimum
            row[64 * g + 32 + j] = np.float32(pair >> np.uint8(4)) * scale + minimum


@subroutine(inline=True)
def _dots(x: Array, rows: Array) -> Any:
    """Return the products of x (N,) with each of four rows (4, N or more)."""
    a = b = c = d = np.float32(0)
    for j in range(x.shape[0]):
        a += x[j] * rows[0, j]
        b += x[j] * rows[1, j]
        c += x[j] * rows[2, j]
        d += x[j] * rows[3, j]
    return a, b, c, d
