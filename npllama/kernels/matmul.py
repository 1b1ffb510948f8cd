"""Twins of `npllama.ops.linear` and `linears`: rows times a weight matrix, widened in registers or small blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import prange

from npllama.dtypes import Array, Tensor
from npllama.kernels.jit import compiled, widened

#: Up to this many rows, one pass over the weights that stays in registers beats widening them for BLAS.
_FEW_ROWS = 4
_BLOCK_BYTES = 2 << 20


def linear(x: Array, weight: Tensor) -> Array:
    """Multiply rows by a weight matrix: ``y = x · weightᵀ``. See `npllama.ops.linear`."""
    n_new, (m, n) = x.shape[0], weight.shape
    y = np.empty((n_new, m), np.float32)
    if n_new <= _FEW_ROWS:
        _rows_dot(x, weight.data, y)
    elif weight.dtype == "float32":
        np.matmul(x, weight.data.T, out=y)
    else:
        rows = max(1, _BLOCK_BYTES // (4 * n))
        wide = np.empty((min(rows, m), n), np.float32)
        for start in range(0, m, rows):
            stop = min(start + rows, m)
            _widen(weight.data[start:stop], wide)
            np.matmul(x, wide[: stop - start].T, out=y[:, start:stop])
    return y


def linears(x: Array, weights: Sequence[Tensor]) -> tuple[Array, ...]:
    """Multiply the same rows by several weight matrices. See `npllama.ops.linears`."""
    return tuple(linear(x, weight) for weight in weights)


@compiled(parallel=True)
def _rows_dot(x: Array, weight: Array, y: Array) -> None:
    """Fill y (T, M) with x (T, N) · weight (M, N)ᵀ for few rows.

    Each thread streams one contiguous part of the weights. An output is one thread's sum in one order, so the numbers
    do not depend on how many threads there are.
    """
    n_new, n = x.shape
    for i in prange(weight.shape[0]):
        for t in range(n_new):
            total = np.float32(0)
            for j in range(n):
                total += widened(weight[i, j]) * x[t, j]
            y[t, i] = total


@compiled(parallel=True)
def _widen(weight: Array, wide: Array) -> None:
    """Copy bfloat16 rows to the first rows of a float32 block."""
    for i in prange(weight.shape[0]):
        for j in range(weight.shape[1]):
            wide[i, j] = widened(weight[i, j])
