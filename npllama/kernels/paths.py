"""All kernels of one path, to run a model with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from npllama import kernels
from npllama.kernels.attend import attending
from npllama.kernels.experts import expert_linear_by
from npllama.kernels.matmul import products
from npllama.kernels.through_layers import through_layers_by


def twins(path: str | None = None, activations: str = "float32") -> dict[str, Callable[..., Any]]:
    """Return every kernel by the name of its operation.

    Parameters
    ----------
    path : str, optional
        One of `npllama.kernels.features.PATHS`; by default the best one for this processor.
    activations : {"float32", "bfloat16", "int8"}
        What the input of every product with weights is rounded to.

    Raises
    ------
    ParameterError, UnsupportedError
        See `npllama.kernels.features.choose`.
    """
    found = {name: getattr(kernels, name) for name in kernels.__all__ if name.islower()}
    product, attend = products(path, activations), attending(path)
    return found | {
        "linear": product.linear,
        "linears": product.linears,
        "gated_linears": product.gated_linears,
        "expert_linear": partial(expert_linear_by, product.linear),
        "attention": attend.attention,
        "attentions": attend.attentions,
        "through_layers": partial(through_layers_by, product.path, activations=activations),
    }
