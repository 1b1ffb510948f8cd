"""Mistakes in the feed-forward layer and in the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from npllama import ops
from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, layers, shown
from npllama.check.rerun import Rerun, Seen
from npllama.weights import LayerWeights


def gated(plant: Plant) -> Plant:
    """Make a mistake in models whose feed-forward layers or experts have gates; in no others."""
    return lambda run: plant(run) if any(layer.w1 is not None for layer in run.weights.layers) else None


def exchanged(w: LayerWeights) -> LayerWeights:
    """Exchange w1 and w3, of a shared expert as well."""
    if w.w1 is None:
        return w
    changed = replace(w, w1=w.w3, w3=w.w1, w1_bias=w.w3_bias, w3_bias=w.w1_bias)
    return replace(changed, shared_w1=w.shared_w3, shared_w3=w.shared_w1)


def activation_of_up(run: Rerun) -> Rerun:
    """Put up through the activation, and not gate."""
    glu = run.ops.glu
    return run.with_ops(glu=lambda gate, up, activation: glu(up, gate, activation))


def without_stream(x: Array, seen: Seen) -> Array:
    """Take from a sum the stream that was added: what a block gave, with its norm where that stands at its output."""
    return x - seen["stream"]


def with_stream(x: Array, seen: Seen) -> Array:
    """Add the stream to a sum once more."""
    return x + seen["stream"]


def activation(name: str, function: Callable[[Array], Array]) -> Plant:
    """Use another activation than the model's; no mistake where it has that name."""

    def plant(run: Rerun) -> Rerun | None:
        changed = run.with_ops(
            glu=lambda gate, up, _: function(gate) * up,
            activate=lambda x, _: function(x),
        )
        return None if run.config.activation == name else changed

    return plant


ATTENTION, FEED_FORWARD = "layers.0.resid_mid", "layers.0.resid_post"

ENTRIES = (
    Mistake(
        "w1-w3-swapped",
        "The matrices of gate and up are exchanged.",
        "gate holds what up should, and the other way round.",
        "w1 is gate_proj, w3 is up_proj, w2 is down_proj.",
        (Way("", "layers.0.gate", gated(layers(exchanged))),),
    ),
    Mistake(
        "silu-of-up",
        "SiLU, or what the model has for it, is applied to up instead of gate.",
        "gate and up are right, ffn_act is not.",
        "ffn_act is silu(gate) * up.",
        (Way("", "layers.0.ffn_act", gated(activation_of_up)),),
    ),
    Mistake(
        "wrong-activation",
        "The feed-forward layer has another activation than the model's.",
        "gate and up are right, ffn_act is not, most where what goes in is between -4 and 0.",
        "Llama's is silu(x) = x / (1 + exp(-x)). The GELU of GPT is by tanh, also where a config.json calls it gelu.",
        tuple(
            Way(label, "layers.0.ffn_act", activation(name, function))
            for label, name, function in (
                ("SiLU", "silu", ops.silu),
                ("GELU, by tanh", "gelu_tanh", ops.gelu_tanh),
                ("GELU, exact", "gelu", ops.gelu),
                ("ReLU", "relu", ops.relu),
                ("none", "", lambda x: x),
            )
        ),
    ),
    Mistake(
        "residual-missing",
        "A block's output replaces the residual stream instead of being added to it.",
        "resid_mid equals attention_out, or resid_post equals ffn_out.",
        "Add each block's output to the stream that entered it.",
        (
            Way("attention", ATTENTION, shown(resid_mid=without_stream)),
            Way("feed-forward", FEED_FORWARD, shown(resid_post=without_stream)),
            Way(
                "both",
                ATTENTION,
                shown(resid_mid=without_stream, resid_post=without_stream),
            ),
        ),
    ),
    Mistake(
        "residual-doubled",
        "The residual stream is added twice.",
        "resid_mid or resid_post is too large by the stream that entered the block.",
        "Add the stream once: not in the block and again outside it.",
        (
            Way("attention", ATTENTION, shown(resid_mid=with_stream)),
            Way("feed-forward", FEED_FORWARD, shown(resid_post=with_stream)),
            Way(
                "both",
                ATTENTION,
                shown(resid_mid=with_stream, resid_post=with_stream),
            ),
        ),
    ),
)
