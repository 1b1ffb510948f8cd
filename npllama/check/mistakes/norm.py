"""Mistakes in the norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, layers, shown, where, with_config
from npllama.check.rerun import Rerun, Seen
from npllama.dtypes import Tensor
from npllama.weights import LayerWeights


def eps(value: float) -> Plant:
    """Use another epsilon in every norm."""

    def plant(run: Rerun) -> Rerun | None:
        rms, layer = run.ops.rms_norm, run.ops.layer_norm
        changed = run.with_ops(
            rms_norm=lambda x, weight, eps: rms(x, weight, value),
            layer_norm=lambda x, weight, bias, eps: layer(x, weight, bias, value),
        )
        # GGUF keeps it in float32.
        return None if math.isclose(value, run.config.norm_eps, rel_tol=1e-6) else changed

    return plant


def eps_outside(run: Rerun) -> Rerun:
    """Add epsilon to the root, and not under it."""

    def rms_norm(x: Array, weight: Tensor, eps: float) -> Array:
        y: Array = x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * weight.numbers(to=x.dtype)
        return y

    def layer_norm(x: Array, weight: Tensor, bias: Tensor, eps: float) -> Array:
        return rms_norm(centred(x), weight, eps) + bias.numbers(to=x.dtype)

    return run.with_ops(rms_norm=rms_norm, layer_norm=layer_norm)


def weights_ignored(*names: str) -> Plant:
    """Let the norms with these weights multiply by one."""

    def plant(run: Rerun) -> Rerun:
        one = Tensor(np.ones(run.config.dim, np.float32), "float32")
        inner = dict.fromkeys(set(names) - {"norm"}, one)
        changed = tuple(replace(layer, **inner) for layer in run.weights.layers)
        last = one if "norm" in names and run.config.final_norm else run.weights.norm
        return replace(run, weights=replace(run.weights, layers=changed, norm=last))

    return plant


def plus_one(run: Rerun) -> Rerun:
    """Let every norm multiply by 1 + w."""
    rms, layer = run.ops.rms_norm, run.ops.layer_norm

    def more(weight: Tensor, x: Array) -> Tensor:
        return Tensor(1 + weight.numbers(to=x.dtype), x.dtype.name)

    return run.with_ops(
        rms_norm=lambda x, weight, eps: rms(x, more(weight, x), eps),
        layer_norm=lambda x, weight, bias, eps: layer(x, more(weight, x), bias, eps),
    )


def centred(x: Array) -> Array:
    """Subtract the mean of each row: (T, D) -> (T, D)."""
    y: Array = x - x.mean(axis=-1, keepdims=True)
    return y


def mean_subtracted(run: Rerun) -> Rerun:
    """Subtract the mean before every norm."""
    norm = run.ops.rms_norm
    return run.with_ops(rms_norm=lambda x, weight, eps: norm(centred(x), weight, eps))


def layer_norm_by(top: Callable[[Array], Array], variance: Callable[[Array], Array]) -> Plant:
    """Compute ``top(x) / sqrt(variance(x) + eps) * weight + bias`` for rows x (T, D)."""

    def layer_norm(x: Array, weight: Tensor, bias: Tensor, eps: float) -> Array:
        y: Array = top(x) / np.sqrt(variance(x)[:, None] + eps) * weight.numbers(to=x.dtype) + bias.numbers(to=x.dtype)
        return y

    return where("norm-layer", lambda run: run.with_ops(layer_norm=layer_norm))


def exchanged(w: LayerWeights) -> LayerWeights:
    """Exchange the two norms of a layer."""
    return replace(
        w,
        attention_norm=w.ffn_norm,
        attention_norm_bias=w.ffn_norm_bias,
        ffn_norm=w.attention_norm,
        ffn_norm_bias=w.attention_norm_bias,
    )


def stream(x: Array, seen: Seen) -> Array:
    """Put the residual stream in the place of its norm, for as many rows as there are of that."""
    return seen["stream"][-len(x) :]


def order(name: str) -> Plant:
    """Put the norms where another family has them; no mistake where the model has them there."""
    return with_config(lambda config: replace(config, norm_order=name))


#: What comes in the place of the norms of attention and of feed-forward, wherever they stand.
BARE_ATTENTION = {
    "attention_norm": stream,
    "attention_out_norm": lambda x, seen: seen["attention_out"],
    "resid_mid_norm": stream,
}
BARE_FEED_FORWARD = {
    "ffn_norm": stream,
    "ffn_out_norm": lambda x, seen: seen["ffn_out"],
    "resid_post_norm": stream,
}
FIRST = "layers.0.attention_norm"

ENTRIES = (
    Mistake(
        "norm-eps",
        "The norms add another epsilon than the model's.",
        "attention_norm of layer 0 differs by a factor that is the same along each row, most in rows of small "
        "embeddings; the text looks right.",
        "Read norm_eps from the checkpoint: 1e-5 for Llama 2 and 3, 1e-6 for Llama 1; 1e-8 and none are never right.",
        (
            *(Way(f"{value:g}", FIRST, eps(value)) for value in (1e-5, 1e-6, 1e-8, 0.0)),
            Way("outside the root", FIRST, eps_outside),
        ),
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
            Way("norm", "norm", where("final-norm", weights_ignored("norm"))),
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
        (Way("", FIRST, where("norm-rms", mean_subtracted)),),
    ),
    Mistake(
        "norm-keeps-mean",
        "The norms do not subtract the mean of each row, as RMSNorm does not.",
        "The norms' outputs differ by a little in every column.",
        "LayerNorm subtracts the mean, divides by the deviation, and adds a bias after its weight.",
        (
            Way(
                "divided by the root mean square", FIRST, layer_norm_by(lambda x: x, lambda x: np.mean(x * x, axis=-1))
            ),
            Way("divided by the deviation", FIRST, layer_norm_by(lambda x: x, lambda x: x.var(axis=-1))),
        ),
    ),
    Mistake(
        "norm-variance-unbiased",
        "The norms divide the sum of squares by D - 1 instead of D.",
        "The norms' outputs are too small by a factor that is the same for every row.",
        "LayerNorm's variance is the biased one: unbiased=False where a library asks.",
        (Way("", FIRST, layer_norm_by(centred, lambda x: x.var(axis=-1, ddof=1))),),
    ),
    Mistake(
        "norm-order",
        "The norms stand in another place than the model's: pre, post and output order have the same weights.",
        "The taps have other names; the projections of the first layer, or its resid_mid, differ at every position.",
        "Pre-norm is x + f(norm(x)), post-norm norm(x + f(x)), and norms of the output are x + norm(f(x)).",
        tuple(Way(name, FIRST, order(name)) for name in ("pre", "post", "output")),
    ),
    Mistake(
        "norm-missing",
        "A norm of the decoder blocks is left out.",
        "The norm's output equals its input, or is no tap at all.",
        "Every block has a norm for attention and one for the feed-forward layer.",
        (
            Way("attention", FIRST, shown(**BARE_ATTENTION)),
            Way("feed-forward", "layers.0.ffn_norm", shown(**BARE_FEED_FORWARD)),
            Way("both", FIRST, shown(**BARE_ATTENTION, **BARE_FEED_FORWARD)),
        ),
    ),
    Mistake(
        "norm-weights-swapped",
        "The weights of attention_norm and ffn_norm are exchanged.",
        "Both norms of every layer differ by a factor for each column.",
        "attention_norm is input_layernorm at Hugging Face, ffn_norm is post_attention_layernorm.",
        (Way("", FIRST, layers(exchanged)),),
    ),
    Mistake(
        "final-norm-missing",
        "The last layer's output goes to the output matrix without the final norm.",
        "All layers are right; norm equals the last resid_post.",
        "Apply the norm before the output matrix.",
        (Way("", "norm", where("final-norm", shown(norm=stream))),),
    ),
)
