"""Twins of `npllama.ops.linear`, `linears` and `gated_linears`: which kernel multiplies what is a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest
from typing import TypeAlias

from npllama.dtypes import Array, Tensor
from npllama.kernels import amx, portable, quantised, vectors
from npllama.kernels.activation import KINDS
from npllama.kernels.features import choose, host_features, ladder
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import ROUNDINGS

#: ``product(x, weights, outputs)``: fill each output (T, M) with x (T, N) · weight (M, N)ᵀ, all of one storage type.
Product: TypeAlias = Callable[[Array, Sequence[Tensor], Sequence[Array]], None]

_QUANTISED: dict[str, Product] = {
    "amx": amx.multiply_quantised,
    "avx2": vectors.EXACT,
    "portable": quantised.multiply,
}
#: Storage type of the weights -> path of `npllama.kernels.features` -> product.
PRODUCTS: dict[str, dict[str, Product]] = {
    "float32": {"avx2": vectors.EXACT, "portable": portable.multiply},
    "bfloat16": {"amx": amx.multiply_bfloat16, "avx2": vectors.EXACT, "portable": portable.multiply},
    "int8": _QUANTISED,
    "int4": _QUANTISED,
}
#: What inputs are rounded to -> path -> storage type -> product that gains by it. The others round the input first.
ROUNDED: dict[str, dict[str, dict[str, Product]]] = {
    "bfloat16": {
        "amx": dict.fromkeys(("bfloat16", "int8", "int4"), amx.multiply_rounded),
        "avx512bf16": dict.fromkeys(("bfloat16", "int8", "int4"), vectors.ROUNDED),
    },
    "int8": {
        "avx2": dict.fromkeys(("int8", "int4"), vectors.IN_BYTES),
    },
}


@dataclass(frozen=True, slots=True)
class Products:
    """Products on one path.

    Attributes
    ----------
    path : str
        One of `npllama.kernels.features.PATHS`.
    by_dtype : dict
        Storage type of the weights -> product.
    """

    path: str
    by_dtype: dict[str, Product]

    def linear(self, x: Array, weight: Tensor, bias: Tensor | None = None) -> Array:
        """Multiply rows by a weight matrix: ``y = x · weightᵀ + bias``. See `npllama.ops.linear`."""
        return self.linears(x, (weight,), (bias,))[0]

    def linears(self, x: Array, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> tuple[Array, ...]:
        """Multiply the same rows by several weight matrices. See `npllama.ops.linears`.

        Those of one storage type are one product, so that threads meet once.
        """
        n_new = len(x)
        outputs = tuple(aligned(n_new * weight.shape[0], x).reshape(n_new, weight.shape[0]) for weight in weights)
        for dtype in {weight.dtype for weight in weights}:
            mine = [i for i, weight in enumerate(weights) if weight.dtype == dtype]
            self.by_dtype[dtype](x, [weights[i] for i in mine], [outputs[i] for i in mine])
        for y, bias in zip_longest(outputs, biases):
            if bias is not None:
                y += bias.numbers()
        return outputs

    def gated_linears(
        self, x: Array, gate: Tensor, up: Tensor, biases: Sequence[Tensor | None], activation: str
    ) -> Array | None:
        """Gate one product by another of the same rows, before either is written.

        Parameters
        ----------
        x : ndarray of shape (T, D)
        gate, up : Tensor of shape (F, D)
        biases : pair of Tensor of shape (F,) or None
        activation : str
            One of `npllama.ops.ACTIVATIONS`.

        Returns
        -------
        ndarray of shape (T, F) or None
            What `linears` and `glu` give one after the other, to the bit. None where it is no single operation: it is
            for many tokens in vector registers, without biases.
        """
        product = self.by_dtype[gate.dtype]
        if (
            not isinstance(product, vectors.Vectors)
            or len(x) <= vectors.FEW
            or gate.dtype != up.dtype
            or any(bias is not None for bias in biases)
        ):
            return None
        act = aligned(len(x) * gate.shape[0], x).reshape(len(x), gate.shape[0])
        product.gated(x, gate, up, act, KINDS[activation])
        return act


@cache
def products(forced: str | None = None, activations: str = "float32") -> Products:
    """Return the products of the best path for this processor, or of a forced one.

    Parameters
    ----------
    forced : str, optional
        One of `npllama.kernels.features.PATHS`.
    activations : str
        What the input of every product is rounded to, one of `npllama.rounding.ACTIVATIONS`.

    Raises
    ------
    ParameterError, UnsupportedError
        See `npllama.kernels.features.choose`.
    """
    path = choose(host_features(), forced)
    steps = ladder(path)
    by_dtype = {dtype: next(by_path[step] for step in steps if step in by_path) for dtype, by_path in PRODUCTS.items()}
    if activations in ROUNDINGS:
        by_path = ROUNDED.get(activations, {})
        faster = next((by_path[step] for step in steps if step in by_path), {})
        by_dtype = {dtype: faster.get(dtype) or _rounding(product, activations) for dtype, product in by_dtype.items()}
    return Products(path, by_dtype)


def _rounding(product: Product, activations: str) -> Product:
    """Return a product that rounds its input first."""
    round_input = ROUNDINGS[activations]
    if isinstance(product, vectors.Vectors):
        return replace(product, enter=round_input)
    return lambda x, weights, outputs: product(round_input(x), weights, outputs)


def linear(x: Array, weight: Tensor, bias: Tensor | None = None) -> Array:
    """Multiply rows by a weight matrix: ``y = x · weightᵀ + bias``. See `npllama.ops.linear`."""
    return products().linear(x, weight, bias)


def linears(x: Array, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> tuple[Array, ...]:
    """Multiply the same rows by several weight matrices. See `npllama.ops.linears`."""
    return products().linears(x, weights, biases)


def gated_linears(x: Array, gate: Tensor, up: Tensor, biases: Sequence[Tensor | None], activation: str) -> Array | None:
    """Gate one product by another of the same rows. See `Products.gated_linears`."""
    return products().gated_linears(x, gate, up, biases, activation)
