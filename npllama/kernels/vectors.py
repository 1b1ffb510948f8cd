"""Products in vector registers of 512 bits (Intel AVX-512): which kernel multiplies how many tokens by what."""

from __future__ import annotations

from collections.abc import Sequence

from npllama.dtypes import PACKINGS, Array, Tensor
from npllama.kernels import byte_columns, byte_rows, vector_blocks, vector_rows
from npllama.kernels.filled import multiply_filled_up
from npllama.kernels.rounded import rounded
from npllama.kernels.vector_squares import BYTES, DIGITS, FLOATS, PAIRS

#: Tokens up to which matrices are multiplied row by row, and the least M and N that this takes.
FEW = vector_rows.FEW
_LEAST = vector_rows.BLOCK, 0


def multiply(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, as exact as in float32.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    weights : sequence of Tensor of shape (M, N)
        All of one storage type. M may differ.
    outputs : sequence of ndarray of shape (T, M), float32
    """
    if len(x) > FEW:
        vector_blocks.multiply(x, weights, outputs, DIGITS if weights[0].dtype in PACKINGS else FLOATS)
    elif weights[0].dtype in PACKINGS:
        multiply_filled_up(byte_rows.multiply, x, weights, outputs, _LEAST)
    else:
        kind = vector_rows.FLOATS if weights[0].dtype == "float32" else vector_rows.HALVES
        multiply_filled_up(vector_rows.multiply, x, weights, outputs, _LEAST, kind)


def multiply_rounded(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with x rounded to bfloat16, and any weights but float32: many tokens take half of the time then."""
    if len(x) > FEW:
        vector_blocks.multiply(x, weights, outputs, PAIRS)
    elif weights[0].dtype in PACKINGS:
        multiply(rounded(x), weights, outputs)
    else:
        multiply_filled_up(vector_rows.multiply, x, weights, outputs, _LEAST, vector_rows.PAIRS)


def multiply_bytes(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    """Do the same with x rounded to int8, and weights of int8 or int4: many tokens take a quarter of the time then.

    A token's numbers are the same, bit by bit, however many there are.
    """
    if len(x) > FEW:
        vector_blocks.multiply(x, weights, outputs, BYTES)
    else:
        multiply_filled_up(byte_columns.multiply, x, weights, outputs, _LEAST)


def multiply_gated(x: Array, gate: Tensor, up: Tensor, output: Array, activation: int) -> None:
    """Fill an output (T, M) with ``activation(x · gateᵀ) * (x · upᵀ)``, both as `multiply` computes them.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
        T is more than `FEW`.
    gate, up : Tensor of shape (M, N)
        Of one storage type.
    output : ndarray of shape (T, M), float32
    activation : int
        Its number in `npllama.kernels.activation`.
    """
    vector_blocks.multiply(x, (gate, up), (output,), DIGITS if gate.dtype in PACKINGS else FLOATS, activation)


def multiply_gated_rounded(x: Array, gate: Tensor, up: Tensor, output: Array, activation: int) -> None:
    """Do the same with what `multiply_rounded` computes."""
    vector_blocks.multiply(x, (gate, up), (output,), PAIRS, activation)


def multiply_gated_bytes(x: Array, gate: Tensor, up: Tensor, output: Array, activation: int) -> None:
    """Do the same with what `multiply_bytes` computes."""
    vector_blocks.multiply(x, (gate, up), (output,), BYTES, activation)
