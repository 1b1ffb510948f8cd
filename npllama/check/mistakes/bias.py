"""Mistakes with the biases of projections and norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, where
from npllama.check.mistakes.rope import to_halves
from npllama.check.rerun import Rerun
from npllama.config import ModelConfig
from npllama.dtypes import Tensor
from npllama.weights import LayerWeights, Weights

Holder = TypeVar("Holder", LayerWeights, Weights)


def biases(change: Callable[[Array, ModelConfig], Array], *names: str) -> Plant:
    """Change the biases in these fields of the weights; no mistake in a model that has none of them."""

    def plant(run: Rerun) -> Rerun | None:
        def changed(weights: Holder) -> Holder:
            there = {name: getattr(weights, name, None) for name in names}
            new: dict[str, Any] = {
                name: Tensor(change(bias.numbers(), run.config), "float32")
                for name, bias in there.items()
                if bias is not None
            }
            return replace(weights, **new)

        holders = (run.weights, *run.weights.layers)
        if not any(getattr(holder, name, None) is not None for holder in holders for name in names):
            return None
        layers = tuple(changed(layer) for layer in run.weights.layers)
        return replace(run, weights=replace(changed(run.weights), layers=layers))

    return plant


def nothing(bias: Array, config: ModelConfig) -> Array:
    """Return zeros."""
    return np.zeros_like(bias)


def twice(bias: Array, config: ModelConfig) -> Array:
    """Return twice the bias."""
    return 2 * bias


def in_halves(bias: Array, config: ModelConfig) -> Array:
    """Return the bias of whole heads (heads * Dh,) with each head in halves."""
    return to_halves(bias.reshape(-1, config.head_dim)).reshape(-1)


#: What has biases -> tap at which a wrong one shows first, fields of the weights.
BIASES = {
    "q, k and v": ("layers.0.q", ("wq_bias", "wk_bias", "wv_bias")),
    "q": ("layers.0.q", ("wq_bias",)),
    "k": ("layers.0.k", ("wk_bias",)),
    "v": ("layers.0.v", ("wv_bias",)),
    "attention output": ("layers.0.attention_out", ("wo_bias",)),
    "feed-forward": ("layers.0.gate", ("w1_bias", "w3_bias", "w2_bias")),
    "norms": ("layers.0.attention_norm", ("attention_norm_bias", "ffn_norm_bias", "norm_bias")),
    "output": ("logits", ("output_bias",)),
}

ENTRIES = (
    Mistake(
        "bias-missing",
        "A bias is not added, although the model has it.",
        "The projection differs by the same numbers at every position.",
        "Load the biases along with the matrices: Qwen 2 has them on q, k and v only, GPT on everything.",
        tuple(Way(label, first, biases(nothing, *names)) for label, (first, names) in BIASES.items()),
    ),
    Mistake(
        "bias-doubled",
        "A bias is added twice.",
        "The projection differs by the same numbers at every position.",
        "Add it once: in the product with the matrix, or behind it.",
        tuple(
            Way(label, BIASES[label][0], biases(twice, *BIASES[label][1]))
            for label in ("q, k and v", "attention output", "feed-forward")
        ),
    ),
    Mistake(
        "bias-row-order",
        "The rows of a projection were brought into the order of RoPE, those of its bias were not.",
        "q or k differs by the same numbers at every position, k_rope by ones that turn.",
        "Permute the biases of q and k exactly as the rows of wq and wk.",
        (
            Way("q and k", "layers.0.q", where("rope", biases(in_halves, "wq_bias", "wk_bias"))),
            Way("k", "layers.0.k", where("rope", biases(in_halves, "wk_bias"))),
        ),
    ),
)
