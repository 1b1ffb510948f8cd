"""Products in the matrix unit (Intel AMX): which kernel multiplies how many tokens by what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npllama.dtypes import Array, Tensor
from npllama.kernels import quantised_tiles, tile_blocks, tiles
from npllama.kernels.rounded import rounded

#: Tokens of a panel: up to so many, reading the weights from memory is all that takes time.
_FEW = tiles._TILE
#: The least M and N that the tiles take.
_ROWS, _NUMBERS = tiles._BLOCK, tiles._STEP


def multiply_bfloat16(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, as exact as in float32.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        bfloat16. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    if not _are_large(weights):
        _multiply_small(x, weights, outputs)
    elif len(x) <= _FEW:
        tiles.multiply(x, weights, outputs)
    else:
        tile_blocks.multiply(x, weights, outputs, parts=3)


def multiply_rounded(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with x rounded to bfloat16, and any weights but float32.

    Many tokens take a third of the time then. Integer weights that are multiplied by more than 16 tokens are rounded
    to bfloat16, too.
    """
    if len(x) > _FEW and _are_large(weights):
        tile_blocks.multiply(x, weights, outputs, parts=1)
    elif weights[0].dtype == "bfloat16":
        multiply_bfloat16(rounded(x), weights, outputs)
    else:
        quantised_tiles.multiply(rounded(x), weights, outputs)


def _are_large(weights: Sequence[Tensor]) -> bool:
    return weights[0].shape[1] >= _NUMBERS and min(weight.shape[0] for weight in weights) >= _ROWS


def _multiply_small(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Multiply by matrices that are too small for tiles, filled up with zeros."""
    width = max(x.shape[1], _NUMBERS)

    def filled_up(matrix: Array, rows: int) -> Array:
        larger = np.zeros((max(rows, len(matrix)), width), matrix.dtype)
        larger[: matrix.shape[0], : matrix.shape[1]] = matrix
        return larger

    matrices = [Tensor(filled_up(weight.data, _ROWS), weight.dtype) for weight in weights]
    results = [np.empty((len(x), matrix.shape[0]), np.float32) for matrix in matrices]
    multiply_bfloat16(filled_up(x, 1), matrices, results)
    for output, result in zip(outputs, results, strict=True):
        output[:] = result[:, : output.shape[1]]
