"""Products in vector registers: which kernel multiplies how many tokens by what, and how.

With registers of 512 bits (Intel AVX-512) integer weights are multiplied as bytes, by one instruction for a sum of four
products. With those of 256 bits (AVX2) that takes several: int8 weights are then int16 where the input is rounded to
int8, and where it is not, all weights are float32 by the time they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from npllama.dtypes import PACKINGS, Array, Tensor
from npllama.kernels import byte_columns, byte_rows, vector_blocks, vector_rows
from npllama.kernels.filled import multiply_filled_up
from npllama.kernels.llvm import WIDE
from npllama.kernels.rounded import rounded
from npllama.kernels.vector_squares import BYTES, DIGITS, FLOATS, INT8_KIND, PAIRS

#: Tokens up to which matrices are multiplied row by row, and the least M and N that this takes.
FEW = vector_rows.FEW
_LEAST = vector_rows.BLOCK, 0


@dataclass(frozen=True, slots=True)
class Vectors:
    """A way to multiply any number of tokens.

    Attributes
    ----------
    few : callable
        What does it to `FEW` tokens at most.
    kinds : mapping of str to int
        Storage type of the weights -> how more tokens are multiplied, see `npllama.kernels.vector_squares`.
    enter : callable, optional
        What is done to tokens before.
    """

    few: Callable[[Array, Sequence[Tensor], Sequence[Array]], None]
    kinds: Mapping[str, int]
    enter: Callable[[Array], Array] | None = None

    def __call__(self, x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
        """Fill each output (T, M) with x (T, N) · weight (M, N)ᵀ.

        Parameters
        ----------
        x : ndarray of shape (T, N), float32
        weights : sequence of Tensor of shape (M, N)
            All of one storage type. M may differ.
        outputs : sequence of ndarray of shape (T, M), float32
        """
        x = x if self.enter is None else self.enter(x)
        if len(x) > FEW:
            vector_blocks.multiply(x, weights, outputs, self.kinds[weights[0].dtype])
        else:
            self.few(x, weights, outputs)

    def gated(self, x: Array, gate: Tensor, up: Tensor, output: Array, activation: int) -> None:
        """Fill an output (T, M) with ``activation(x · gateᵀ) * (x · upᵀ)``, with the bits of a call for both.

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
        x = x if self.enter is None else self.enter(x)
        vector_blocks.multiply(x, (gate, up), (output,), self.kinds[gate.dtype], activation)


def _exactly(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    if weights[0].dtype in PACKINGS:
        multiply_filled_up(byte_rows.multiply, x, weights, outputs, _LEAST)
    else:
        kind = vector_rows.FLOATS if weights[0].dtype == "float32" else vector_rows.HALVES
        multiply_filled_up(vector_rows.multiply, x, weights, outputs, _LEAST, kind)


def _in_pairs(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    if weights[0].dtype in PACKINGS:
        _exactly(rounded(x), weights, outputs)
    else:
        multiply_filled_up(vector_rows.multiply, x, weights, outputs, _LEAST, vector_rows.PAIRS)


def _in_bytes(x: Array, weights: Sequence[Tensor], outputs: Sequence[Array]) -> None:
    multiply_filled_up(byte_columns.multiply, x, weights, outputs, _LEAST)


_INTEGERS = DIGITS if WIDE else FLOATS
#: As exact as in float32.
EXACT = Vectors(_exactly, {"float32": FLOATS, "bfloat16": FLOATS, "int8": _INTEGERS, "int4": _INTEGERS})
#: With x rounded to bfloat16: many tokens take half of the time then.
ROUNDED = Vectors(_in_pairs, dict.fromkeys(("bfloat16", "int8", "int4"), PAIRS))
#: With x rounded to int8: many tokens take a quarter or half of the time then. A token's numbers are the same, bit by
#: bit, however many there are.
IN_BYTES = Vectors(_in_bytes, {"int8": INT8_KIND, "int4": BYTES})
