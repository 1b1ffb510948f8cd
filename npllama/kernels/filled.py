"""Matrices that are smaller than a product takes them, filled up with zeros."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npllama.dtypes import Array, Tensor


def are_large(weights: Sequence[Tensor], least: tuple[int, int]) -> bool:
    """Return whether all weights, which share N, have at least so large an M and N."""
    return weights[0].shape[1] >= least[1] and all(weight.shape[0] >= least[0] for weight in weights)


def multiply_filled_up(
    product: Callable[..., None],
    x: Array,
    weights: Sequence[Tensor],
    outputs: Sequence[Array],
    least: tuple[int, int],
    *how: Any,
) -> None:
    """Call ``product(x, weights, outputs, *how)``, with larger matrices if need be.

    Parameters
    ----------
    product : callable
        Fills each output (T, M) with x (T, N) · weight (M, N)ᵀ.
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
    outputs : sequence of ndarray of shape (T, M), float32
    least : tuple of int
        The least M and N that the product takes; the least N of int8 and int4 must be 0.
    *how
        Handed on.
    """
    rows, width = least
    if are_large(weights, least):
        product(x, weights, outputs, *how)
        return

    def filled_up(array: Array, rows: int) -> Array:
        zeros = np.zeros((max(rows, len(array)), max(width, array.shape[1])), array.dtype)
        zeros[: array.shape[0], : array.shape[1]] = array
        return zeros

    def larger(weight: Tensor) -> Tensor:
        scales, minima = (None if part is None else filled_up(part, rows) for part in (weight.scales, weight.minima))
        return Tensor(filled_up(weight.data, rows), weight.dtype, scales, minima, weight.width)

    matrices = [larger(weight) for weight in weights]
    results = [np.empty((len(x), len(matrix.data)), np.float32) for matrix in matrices]
    product(filled_up(x, 1), matrices, results, *how)
    for output, result in zip(outputs, results, strict=True):
        output[:] = result[:, : output.shape[1]]
