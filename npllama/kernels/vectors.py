"""Products in vector registers of 512 bits (Intel AVX-512): which kernel multiplies how many tokens by what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npllama.dtypes import PACKINGS, Array, Tensor
from npllama.kernels import byte_rows, quantised_dots, vector_blocks, vector_rows
from npllama.kernels.rounded import rounded
from npllama.kernels.vector_squares import BYTES, FLOATS, PAIRS


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, as exact as in float32.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        All of one storage type. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    if len(x) > _few(weights):
        vector_blocks.multiply(x, weights, outputs, FLOATS)
    elif weights[0].dtype in PACKINGS:
        quantised_dots.multiply(x, weights, outputs)
    else:
        kind = vector_rows.FLOATS if weights[0].dtype == "float32" else vector_rows.HALVES
        _multiply_rows(x, weights, outputs, kind)


def multiply_rounded(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with x rounded to bfloat16, and any weights but float32: many tokens take half of the time then."""
    if len(x) > _few(weights):
        vector_blocks.multiply(x, weights, outputs, PAIRS)
    elif weights[0].dtype in PACKINGS:
        multiply(rounded(x), weights, outputs)
    else:
        _multiply_rows(x, weights, outputs, vector_rows.PAIRS)


def multiply_bytes(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with x rounded to int8, and weights of int8 or int4: many tokens take a quarter of the time then."""
    if len(x) > byte_rows.FEW:
        vector_blocks.multiply(x, weights, outputs, BYTES)
    else:
        byte_rows.multiply(x, weights, outputs)


def _few(weights: Sequence[Tensor]) -> int:
    """Return up to how many tokens meet weights row by row."""
    return quantised_dots.FEW if weights[0].dtype in PACKINGS else vector_rows.FEW


def _multiply_rows(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array], kind: int) -> None:
    """Multiply row by row; matrices of fewer rows than a block are filled up with zeros."""
    if min(weight.shape[0] for weight in weights) >= vector_rows.BLOCK:
        vector_rows.multiply(x, weights, outputs, kind)
        return

    def filled_up(weight: Tensor) -> Tensor:
        data = np.zeros((max(vector_rows.BLOCK, weight.shape[0]), weight.shape[1]), weight.data.dtype)
        data[: weight.shape[0]] = weight.data
        return Tensor(data, weight.dtype)

    matrices = [filled_up(weight) for weight in weights]
    results = [np.empty((len(x), matrix.shape[0]), np.float32) for matrix in matrices]
    vector_rows.multiply(x, matrices, results, kind)
    for output, result in zip(outputs, results, strict=True):
        output[:] = result[:, : output.shape[1]]
