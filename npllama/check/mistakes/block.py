"""Mistakes in the feed-forward layer and in the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, shown
from npllama.check.rerun import Rerun


def gates_swapped(run: Rerun) -> Rerun:
    """Exchange w1 and w3 in every layer."""
    layers = tuple(replace(layer, w1=layer.w3, w3=layer.w1) for layer in run.weights.layers)
    return replace(run, weights=replace(run.weights, layers=layers))


def gated(swiglu: Callable[[Array, Array], Array]) -> Plant:
    """Compute something else of gate and up (T, F)."""
    return lambda run: run.with_ops(swiglu=swiglu)


def silu_of_up(run: Rerun) -> Rerun:
    """Put up through SiLU, and not gate."""
    swiglu = run.ops.swiglu
    return run.with_ops(swiglu=lambda gate, up: swiglu(up, gate))


def gelu_tanh(x: Array) -> Array:
    """Approximate GELU (Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415), any shape."""
    y: Array = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


def gelu_erf(x: Array) -> Array:
    """Exact GELU, x times the normal distribution's integral up to x, any shape."""
    erf = np.vectorize(math.erf, otypes=[x.dtype])
    y: Array = 0.5 * x * (1 + erf(x / math.sqrt(2)))
    return y


ATTENTION, FEED_FORWARD = "layers.0.resid_mid", "layers.0.resid_post"

ENTRIES = (
    Mistake(
        "w1-w3-swapped",
        "The matrices of gate and up are exchanged.",
        "gate holds what up should, and the other way round.",
        "w1 is gate_proj, w3 is up_proj, w2 is down_proj.",
        (Way("", "layers.0.gate", gates_swapped),),
    ),
    Mistake(
        "silu-of-up",
        "SiLU is applied to up instead of gate.",
        "gate and up are right, ffn_act is not.",
        "ffn_act is silu(gate) * up.",
        (Way("", "layers.0.ffn_act", silu_of_up),),
    ),
    Mistake(
        "wrong-activation",
        "The gate goes through another function than SiLU.",
        "gate and up are right, ffn_act is not, most where gate is between -4 and 0.",
        "silu(x) = x / (1 + exp(-x)).",
        (
            Way("GELU, by tanh", "layers.0.ffn_act", gated(lambda gate, up: gelu_tanh(gate) * up)),
            Way("GELU, exact", "layers.0.ffn_act", gated(lambda gate, up: gelu_erf(gate) * up)),
            Way("ReLU", "layers.0.ffn_act", gated(lambda gate, up: np.maximum(gate, 0) * up)),
            Way("none", "layers.0.ffn_act", gated(lambda gate, up: gate * up)),
        ),
    ),
    Mistake(
        "residual-missing",
        "A block's output replaces the residual stream instead of being added to it.",
        "resid_mid equals attention_out, or resid_post equals ffn_out.",
        "Add each block's output to the stream that entered it.",
        (
            Way("attention", ATTENTION, shown(resid_mid=lambda x, seen: seen["attention_out"])),
            Way("feed-forward", FEED_FORWARD, shown(resid_post=lambda x, seen: seen["ffn_out"])),
            Way(
                "both",
                ATTENTION,
                shown(resid_mid=lambda x, seen: seen["attention_out"], resid_post=lambda x, seen: seen["ffn_out"]),
            ),
        ),
    ),
    Mistake(
        "residual-doubled",
        "The residual stream is added twice.",
        "resid_mid or resid_post is too large by the stream that entered the block.",
        "Add the stream once: not in the block and again outside it.",
        (
            Way("attention", ATTENTION, shown(resid_mid=lambda x, seen: x + seen["stream"])),
            Way("feed-forward", FEED_FORWARD, shown(resid_post=lambda x, seen: x + seen["stream"])),
            Way(
                "both",
                ATTENTION,
                shown(resid_mid=lambda x, seen: x + seen["stream"], resid_post=lambda x, seen: x + seen["stream"]),
            ),
        ),
    ),
)
