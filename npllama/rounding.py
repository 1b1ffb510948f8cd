"""Inputs of products rounded before they are multiplied: what other engines compute in, said in the open.

Reading the weights is what one token costs, so its products may well be exact. Many tokens cost arithmetic, and there
a processor multiplies small numbers several times as fast as large ones. The model is then ``y = W · round(x)`` in
place of ``y = W · x``, for every product with weights and for any number of tokens. Norms and sums stay as they are.
What ``round`` does is declared, and the same number by number in every backend:

bfloat16
    To the nearest of the numbers with 8 significant bits, ties to even, each by itself. It is what units for bfloat16
    take, and what a model in torch's bfloat16 passes on. An error of at most 1/256 of each number.
int8
    To whole multiples of a step, in groups of 64 along the last axis, of which the last may be shorter::

        largest = max |x| of the group      scale = 127 / largest
        q = rint(x · scale)                 step = largest / 127
        round(x) = q · step                 q = -127 .. 127

    All of it in float32, each result rounded to the nearest, ties to even. It is what units for int8 take. llama.cpp
    (Q8_0 and Q8_K activations, groups of 32 and 256) and OpenVINO (dynamic quantisation) do the like. An error of half
    a step at most for every number of a group: where one number is large, the small ones beside it are lost. A group
    whose largest number is below 2⁻¹⁰⁰ becomes zeros; one that holds an infinity or a NaN becomes NaN throughout.

Numbers at the end of float32's range may become infinite in either.

Attention multiplies in what its keys and values are cached in (`npllama.KVCache`): float32, which rounds nothing, or
bfloat16, the default where activations are rounded. Then both sides of its two products are bfloat16, that is the
queries, too, and the weights of the values. Of scores s, the logarithms of the weights::

    w = bfloat16(2**(s · log2(e) - n))      probs = w / sum(w)      n = ceil(max(s · log2(e)))

Since n is a whole number, it moves exponents, not digits: with any other the probabilities would be the same. So a
kernel may choose another one for each block of keys.

What it costs: SmolLM2's predictions are 0.0002 nats (KL) from the exact ones with bfloat16, of which attention is a
third, and 0.005 with int8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from npllama.dtypes import GROUP, Array, narrow, widen

_HIGHEST = np.float32(127)
#: Groups below it are zeros: their scales would overflow long after it.
_TINY = np.float32(2.0**-100)


def rounded(x: Array) -> Array:
    """Return float32 numbers of any shape rounded to the nearest bfloat16, ties to even, as float32.

    Numbers of float64 become the nearest float32 before, and float64 again.
    """
    return widen(narrow(x.astype(np.float32, copy=False), "bfloat16"), "bfloat16").astype(x.dtype, copy=False)


def rounded_to_int8(x: Array) -> Array:
    """Return float32 numbers of any shape rounded in groups along the last axis to int8 times a step, as float32."""
    width = x.shape[-1]
    largest = np.maximum.reduceat(np.abs(x), range(0, width, GROUP), axis=-1)  # (..., groups)
    regular = np.isfinite(largest) & (largest >= _TINY)
    scale, step = np.zeros_like(largest), np.where(np.isfinite(largest), np.float32(0), np.float32(np.nan))
    np.divide(_HIGHEST, largest, out=scale, where=regular)
    np.divide(largest, _HIGHEST, out=step, where=regular)
    each_scale, each_step = (np.repeat(part, GROUP, axis=-1)[..., :width] for part in (scale, step))
    with np.errstate(over="ignore", invalid="ignore"):  # infinity times 0, in groups that become NaN anyway
        q = np.rint(x * each_scale) + np.float32(0)  # an integer has no negative zero
        y: Array = q * each_step
    return y


def softmax_of_rounded(scores: Array) -> Array:
    """Turn each row of scores (..., S) into probabilities in the proportions of weights rounded to bfloat16."""
    powers = scores * math.log2(math.e)
    weights = rounded(np.exp2(powers - np.ceil(powers.max(axis=-1, keepdims=True))))
    probs: Array = weights / weights.sum(axis=-1, keepdims=True)
    return probs


#: What the inputs of products can be rounded to -> how.
ROUNDINGS: dict[str, Callable[[Array], Array]] = {"bfloat16": rounded, "int8": rounded_to_int8}
#: The precisions of inputs that can be declared. The first one is what the engine computes in: no rounding.
ACTIVATIONS = ("float32", *ROUNDINGS)


def with_rounded_inputs(ops: Any, activations: str) -> SimpleNamespace:
    """Return operations whose products round their input first: `npllama.ops` with ``y = W · round(x)``.

    What is rounded is float32: numbers of float64 become the nearest float32 before.
    """

    def round_input(x: Array) -> Array:
        return ROUNDINGS[activations](x.astype(np.float32, copy=False)).astype(x.dtype, copy=False)

    def linear(x: Array, *others: Any) -> Array:
        y: Array = ops.linear(round_input(x), *others)
        return y

    def linears(x: Array, *others: Any) -> tuple[Array, ...]:
        ys: tuple[Array, ...] = ops.linears(round_input(x), *others)
        return ys

    def expert_linear(x: Array, *others: Any) -> Array:
        y: Array = ops.expert_linear(round_input(x), *others)
        return y

    return SimpleNamespace(**{**vars(ops), "linear": linear, "linears": linears, "expert_linear": expert_linear})
