"""Mistakes in the norms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, shown
from npllama.check.rerun import Rerun
from npllama.dtypes import Tensor


def eps(value: float) -> Plant:
    """Use another epsilon in every norm."""

    def plant(run: Rerun) -> Rerun | None:
        norm = run.ops.rms_norm
        changed = run.with_ops(rms_norm=lambda x, weight, eps: norm(x, weight, value))
        # GGUF keeps it in float32.
        return None if math.isclose(value, run.config.norm_eps, rel_tol=1e-6) else changed

    return plant


def weights_ignored(*names: str) -> Plant:
    """Let the norms with these weights multiply by one."""

    def plant(run: Rerun) -> Rerun:
        one = Tensor(np.ones(run.config.dim, np.float32), "float32")
        inner = dict.fromkeys(set(names) - {"norm"}, one)
        weights = replace(run.weights, layers=tuple(replace(layer, **inner) for layer in run.weights.layers))
        return replace(run, weights=replace(weights, norm=one) if "norm" in names else weights)

    return plant


def plus_one(run: Rerun) -> Rerun:
    """Let every norm multiply by 1 + w."""
    norm = run.ops.rms_norm

    def rms_norm(x: Array, weight: Tensor, eps: float) -> Array:
        y: Array = norm(x, Tensor(1 + weight.numbers(to=x.dtype), x.dtype.name), eps)
        return y

    return run.with_ops(rms_norm=rms_norm)


def mean_subtracted(run: Rerun) -> Rerun:
    """Subtract the mean before every norm."""
    norm = run.ops.rms_norm
    return run.with_ops(rms_norm=lambda x, weight, eps: norm(x - x.mean(axis=-1, keepdims=True), weight, eps))


def swapped(run: Rerun) -> Rerun:
    """Exchange the two norm weights of every layer."""
    layers = [replace(w, attention_norm=w.ffn_norm, ffn_norm=w.attention_norm) for w in run.weights.layers]
    return replace(run, weights=replace(run.weights, layers=tuple(layers)))


FIRST = "layers.0.attention_norm"

ENTRIES = (
    Mistake(
        "norm-eps",
        "The norms add another epsilon than the model's.",
        "attention_norm of layer 0 differs by a factor that is the same along each row, most in rows of small "
        "embeddings; the text looks right.",
        "Read norm_eps from the checkpoint: 1e-5 for Llama 2 and 3, 1e-6 for Llama 1; 1e-8 and none are never right.",
        tuple(Way(f"{value:g}", FIRST, eps(value)) for value in (1e-5, 1e-6, 1e-8, 0.0)),
    ),
    Mistake(
        "norm-weight-ignored",
        "Rows are normalised, but not multiplied by the norm's weight.",
        "The norm's output differs by a factor for each column.",
        "Multiply by the weight after dividing by the root mean square.",
        (
            Way("all", FIRST, weights_ignored("attention_norm", "ffn_norm", "norm")),
            Way("attention_norm", FIRST, weights_ignored("attention_norm")),
            Way("ffn_norm", "layers.0.ffn_norm", weights_ignored("ffn_norm")),
            Way("norm", "norm", weights_ignored("norm")),
        ),
    ),
    Mistake(
        "norm-weight-plus-one",
        "The norms multiply by one plus their weight.",
        "The norms' outputs are too large, by a factor for each column.",
        "Multiply by the weight itself; 1 + w is another family's (Gemma).",
        (Way("", FIRST, plus_one),),
    ),
    Mistake(
        "norm-subtracts-mean",
        "The norms subtract the mean of each row, as LayerNorm does.",
        "The norms' outputs differ by a little in every column.",
        "RMSNorm divides by the root mean square and subtracts nothing.",
        (Way("", FIRST, mean_subtracted),),
    ),
    Mistake(
        "norm-weights-swapped",
        "The weights of attention_norm and ffn_norm are exchanged.",
        "Both norms of every layer differ by a factor for each column.",
        "attention_norm is input_layernorm at Hugging Face, ffn_norm is post_attention_layernorm.",
        (Way("", FIRST, swapped),),
    ),
    Mistake(
        "final-norm-missing",
        "The last layer's output goes to the output matrix without the final norm.",
        "All layers are right; norm equals the last resid_post.",
        "Apply the norm before the output matrix.",
        (Way("", "norm", shown(norm=lambda x, seen: seen["resid_post"][-len(x) :])),),
    ),
)
