"""Products in the matrix unit (Intel AMX): which kernel multiplies how many tokens by what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from npllama.dtypes import Array, Tensor
from npllama.kernels import byte_rows, quantised_tiles, tile_blocks, tiles
from npllama.kernels.filled import are_large, multiply_filled_up
from npllama.kernels.rounded import rounded

#: Tokens of a panel: up to so many, reading the weights from memory is all that takes time.
_FEW = tiles._TILE
#: The least M and N that the tiles take.
_LEAST = tiles._BLOCK, tiles._STEP


def multiply_bfloat16(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, as exact as in float32.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        bfloat16. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    product = tiles.multiply if len(x) <= _FEW else partial(tile_blocks.multiply, parts=3)
    multiply_filled_up(product, x, weights, outputs, _LEAST)


def multiply_quantised(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with weights of int8 or int4. A single token is left to vectors."""
    if len(x) == 1:
        multiply_filled_up(byte_rows.multiply, x, weights, outputs, (byte_rows.BLOCK, 0))
    else:
        multiply_filled_up(quantised_tiles.multiply, x, weights, outputs, (_LEAST[0], 0))


def multiply_rounded(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with x rounded to bfloat16, and any weights but float32.

    Many tokens take a third of the time then. Integer weights that are multiplied by more than 16 tokens are rounded
    to bfloat16, too.
    """
    if len(x) > _FEW and are_large(weights, _LEAST):
        tile_blocks.multiply(x, weights, outputs, parts=1)
    elif weights[0].dtype == "bfloat16":
        multiply_bfloat16(rounded(x), weights, outputs)
    else:
        multiply_quantised(rounded(x), weights, outputs)
