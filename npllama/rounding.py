"""Inputs of products rounded to bfloat16: what other engines compute in, said in the open.

Reading the weights is what one token costs, so its products may well be exact. Many tokens cost arithmetic, and there
a processor with a unit for bfloat16 is three times as fast on an input that has been rounded to it. The model is then
``y = W · round(x)`` in place of ``y = W · x``, for every product with weights and for any number of tokens. Everything
else (norms, attention, sums) stays as it is.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from npllama.dtypes import Array, narrow, widen

#: What the inputs of products can be rounded to. The first one is what the engine computes in: no rounding.
ACTIVATIONS = ("float32", "bfloat16")


def rounded(x: Array) -> Array:
    """Return float32 numbers of any shape rounded to the nearest bfloat16, ties to even, as float32."""
    return widen(narrow(x, "bfloat16"), "bfloat16")


def with_rounded_inputs(ops: Any) -> SimpleNamespace:
    """Return operations whose products round their input first: `npllama.ops` with ``y = W · round(x)``."""

    def linear(x: Array, *others: Any) -> Array:
        y: Array = ops.linear(rounded(x), *others)
        return y

    def linears(x: Array, *others: Any) -> tuple[Array, ...]:
        ys: tuple[Array, ...] = ops.linears(rounded(x), *others)
        return ys

    def expert_linear(x: Array, *others: Any) -> Array:
        y: Array = ops.expert_linear(rounded(x), *others)
        return y

    return SimpleNamespace(**{**vars(ops), "linear": linear, "linears": linears, "expert_linear": expert_linear})
