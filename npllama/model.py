"""The model: the forward pass of a decoder-only transformer, written once.

It is *given* its operations: the textbook in `npllama.ops`, or that with the compiled kernels of `npllama.kernels` in
their place. Every intermediate tensor passes through a tap under its name in `npllama.taps`, where the axis letters of
the shape comments are explained, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from npllama.cache import KVCache, Lanes
from npllama.config import Experts, ModelConfig
from npllama.dtypes import Array, Tensor
from npllama.taps import Tap, at_layer, untapped
from npllama.weights import LayerWeights, Weights


class Ops(Protocol):
    """The operations that a forward pass is made of; see `npllama.ops` for what each computes."""

    embed: Callable[..., Array]
    rms_norm: Callable[..., Array]
    layer_norm: Callable[..., Array]
    linear: Callable[..., Array]
    linears: Callable[..., tuple[Array, ...]]
    gated_linears: Callable[..., Array | None]
    rope_tables: Callable[..., tuple[Array, Array]]
    apply_rope: Callable[..., Array]
    attention: Callable[..., Array]
    attentions: Callable[..., Array]
    activate: Callable[..., Array]
    glu: Callable[..., Array]
    add: Callable[..., Array]
    softmax: Callable[..., Array]
    sigmoid: Callable[..., Array]
    route: Callable[..., Array]
    chosen_experts: Callable[..., NDArray[np.int64]]
    expert_linear: Callable[..., Array]
    through_layers: Callable[..., Callable[..., Array | None] | None]


def normalise(x: Array, weight: Tensor, bias: Tensor | None, config: ModelConfig, ops: Ops) -> Array:
    """Apply the kind of norm that the model has to rows: x (T, D) -> (T, D)."""
    if config.norm == "layer":
        return ops.layer_norm(x, weight, bias, config.norm_eps)
    return ops.rms_norm(x, weight, config.norm_eps)


def attend(
    h: Array,
    w: LayerWeights,
    i: int,
    rope: tuple[Array, Array] | None,
    cache: KVCache | Lanes,
    config: ModelConfig,
    ops: Ops,
    tap: Tap,
) -> Array:
    """Let positions exchange what they know: h (T, D) -> (T, D)."""
    n_new = h.shape[0]
    heads, kv_heads = (n_new, config.n_heads, config.head_dim), (n_new, config.n_kv_heads, config.head_dim)

    q, k, v = ops.linears(h, (w.wq, w.wk, w.wv), (w.wq_bias, w.wk_bias, w.wv_bias))
    q = tap("q", q.reshape(heads))  # (T, H, Dh)
    k = tap("k", k.reshape(kv_heads))  # (T, K, Dh)
    v = tap("v", v.reshape(kv_heads))  # (T, K, Dh)
    if w.q_norm is not None:
        rows = (n_new, -1) if config.qk_norm == "projection" else (-1, config.head_dim)
        q = tap("q_norm", ops.rms_norm(q.reshape(rows), w.q_norm, config.norm_eps).reshape(heads))
        k = tap("k_norm", ops.rms_norm(k.reshape(rows), w.k_norm, config.norm_eps).reshape(kv_heads))
    if rope is not None:
        q = tap("q_rope", ops.apply_rope(q, *rope))  # (T, H, Dh)
        k = tap("k_rope", ops.apply_rope(k, *rope))  # (T, K, Dh)
    how = {"divisor": math.sqrt(config.score_dim or config.head_dim), "window": config.window(i)}
    if isinstance(cache, Lanes):
        context = ops.attentions(q, cache.counts, cache.append(i, k, v), **how)
    else:
        context = ops.attention(q, *cache.append(i, k, v), tap, **how)
    context = tap("context", context)  # (T, H, Dh)
    return tap("attention_out", ops.linear(context.reshape(n_new, -1), w.wo, w.wo_bias))  # (T, D)


def gated(h: Array, w: LayerWeights, config: ModelConfig, ops: Ops, tap: Tap) -> Array:
    """Compute what each position's gates let through: h (T, D) -> (T, F)."""
    biases = w.w1_bias, w.w3_bias
    if tap is untapped:  # gate and up, the largest arrays of a pass, need not exist
        act = ops.gated_linears(h, w.w1, w.w3, biases, config.activation)  # (T, F)
        if act is not None:
            return act
    gate, up = ops.linears(h, (w.w1, w.w3), biases)
    return ops.glu(tap("gate", gate), tap("up", up), config.activation)  # (T, F)


def feed_forward(h: Array, w: LayerWeights, config: ModelConfig, ops: Ops, tap: Tap) -> Array:
    """Let each position think for itself: h (T, D) -> (T, D)."""
    if w.w1 is None:
        up = tap("up", ops.linear(h, w.w3, w.w3_bias))  # (T, F)
        act = ops.activate(up, config.activation)  # (T, F)
    else:
        act = gated(h, w, config, ops, tap)  # (T, F)
    return tap("ffn_out", ops.linear(tap("ffn_act", act), w.w2, w.w2_bias))  # (T, D)


def mixture(h: Array, w: LayerWeights, experts: Experts, config: ModelConfig, ops: Ops, tap: Tap) -> Array:
    """Let a few experts think for each position, chosen by a router: h (T, D) -> (T, D)."""
    probs = tap("router_probs", ops.softmax(tap("router_logits", ops.linear(h, w.router))))  # (T, E)
    weights = tap("router_weights", ops.route(probs, experts.active, experts.renormalise))  # (T, E)
    chosen = ops.chosen_experts(weights, experts.active)  # (T, A)
    each = np.broadcast_to(h[:, None], (*chosen.shape, h.shape[1]))  # (T, A, D)
    gate = tap("expert_gate", ops.expert_linear(each, chosen, w.w1, experts.count))  # (T, A, Fe)
    up = tap("expert_up", ops.expert_linear(each, chosen, w.w3, experts.count))  # (T, A, Fe)
    act = tap("expert_act", ops.glu(gate, up, config.activation))  # (T, A, Fe)
    answers = tap("expert_out", ops.expert_linear(act, chosen, w.w2, experts.count))  # (T, A, D)
    out = (np.take_along_axis(weights, chosen, -1)[:, :, None] * answers).sum(axis=1)  # (T, D)
    if w.shared_w1 is not None:
        gate, up = ops.linears(h, (w.shared_w1, w.shared_w3), (None, None))
        gate, up = tap("shared_gate", gate), tap("shared_up", up)  # (T, Fs)
        act = tap("shared_act", ops.glu(gate, up, config.activation))  # (T, Fs)
        weight = tap("shared_weight", ops.sigmoid(ops.linear(h, w.shared_router)))  # (T, 1)
        out = out + tap("shared_out", ops.linear(act, w.shared_w2) * weight)
    return tap("ffn_out", out)  # (T, D)


def block(
    x: Array,
    w: LayerWeights,
    i: int,
    rope: tuple[Array, Array] | None,
    cache: KVCache | Lanes,
    config: ModelConfig,
    ops: Ops,
    tap: Tap,
) -> Array:
    """Run decoder layer ``i``: x (T, D) -> (T, D).

    Two steps, attention and feed-forward, each add to the residual stream what they compute from it. Their norms stand
    where the family has them: before the step, behind its output, or behind the sum.
    """

    def attention_norm(name: str, y: Array) -> Array:
        return tap(name, normalise(y, w.attention_norm, w.attention_norm_bias, config, ops))

    def ffn_norm(name: str, y: Array) -> Array:
        return tap(name, normalise(y, w.ffn_norm, w.ffn_norm_bias, config, ops))

    h = attention_norm("attention_norm", x) if config.norm_order == "pre" else x  # (T, D)
    out = attend(h, w, i, rope, cache, config, ops, tap)  # (T, D)
    if config.norm_order == "output":
        out = attention_norm("attention_out_norm", out)
    x = tap("resid_mid", ops.add(x, out))  # (T, D)
    if config.norm_order == "post":
        x = attention_norm("resid_mid_norm", x)

    h = ffn_norm("ffn_norm", x) if config.norm_order == "pre" else x  # (T, D)
    if config.experts is not None and w.router is not None:
        out = mixture(h, w, config.experts, config, ops, tap)  # (T, D)
    else:
        out = feed_forward(h, w, config, ops, tap)  # (T, D)
    if config.norm_order == "output":
        out = ffn_norm("ffn_out_norm", out)
    x = tap("resid_post", ops.add(x, out))  # (T, D)
    return ffn_norm("resid_post_norm", x) if config.norm_order == "post" else x


def spans(cache: KVCache | Lanes, n_new: int) -> list[tuple[int, int, int]]:
    """Return for each sequence its first new position, how many there are, and how many its text is known to have."""
    lanes = cache if isinstance(cache, Lanes) else Lanes((cache,), (n_new,))
    return [
        (own.length, count, max(own.horizon, own.length + count))
        for own, count in zip(lanes.caches, lanes.counts, strict=True)
    ]


def rope_at(weights: Weights, config: ModelConfig, ops: Ops, start: int, count: int, horizon: int) -> list[Array]:
    """Return the cosines and sines of positions [start, start + count), (T, Dh/2) each.

    A longrope model has two sets of frequencies. The second serves texts that reach beyond its original context:
    ``horizon`` is the number of positions that the text is known to have.
    """
    scaling = config.rope_scaling
    if scaling is None or weights.rope_freqs_long is None:
        return [*ops.rope_tables(weights.rope_freqs, start, count)]
    freqs = weights.rope_freqs_long if config.is_long(horizon) else weights.rope_freqs
    return [*ops.rope_tables(freqs, start, count, scaling.attention_factor)]


def forward(
    tokens: NDArray[np.int64],
    weights: Weights,
    config: ModelConfig,
    ops: Ops,
    cache: KVCache | Lanes,
    *,
    dtype: np.dtype[Any],
    tap: Tap = untapped,
    last: bool = False,
    at_once: Callable[..., Array | None] | None = None,
) -> Array:
    """Run the model on new tokens behind those in the cache.

    Parameters
    ----------
    tokens : ndarray of shape (T,)
        Valid token ids.
    weights, config, ops
        The model.
    cache : KVCache or Lanes
        Grows by T positions, once all has been computed. Lanes: the tokens are several sequences laid end to end.
    dtype : numpy dtype
        float32 or float64: the dtype of every activation.
    tap : callable
        ``tap(name, x)`` sees every intermediate tensor and returns what the pass goes on with.
    last : bool
        Compute the logits of each sequence's last position only.
    at_once : callable, optional
        What ``ops.through_layers`` returned: runs all layers as one operation where nobody watches, or declines.

    Returns
    -------
    ndarray of shape (T, V), or (sequences, V) with ``last``
        Logits.
    """
    n_new = len(tokens)
    cache.reserve(n_new)
    each = spans(cache, n_new)
    rope = None
    if weights.rope_freqs is not None:
        tables = (rope_at(weights, config, ops, *span) for span in each)
        cos, sin = (np.concatenate(parts) for parts in zip(*tables, strict=True))
        rope = cos, sin  # (T, Dh/2) twice
    x = tap("tok_embeddings", ops.embed(tokens, weights.tok_embeddings, dtype))  # (T, D)
    if weights.pos_embeddings is not None:
        positions = np.concatenate([np.arange(start, start + count) for start, count, _ in each])
        x = x + tap("pos_embeddings", ops.embed(positions, weights.pos_embeddings, dtype))
        x = tap("embeddings", x)  # (T, D)
    done = None if at_once is None or tap is not untapped else at_once(x, rope, cache)  # (T, D)
    if done is None:
        for i, layer in enumerate(weights.layers):
            x = block(x, layer, i, rope, cache, config, ops, at_layer(tap, i))  # (T, D)
    else:
        x = done
    cache.advance(n_new)
    if last:
        x = x[np.cumsum([count for _, count, _ in each]) - 1]  # (sequences, D)
    if weights.norm is not None:
        x = tap("norm", normalise(x, weights.norm, weights.norm_bias, config, ops))  # (T, D)
    return tap("logits", ops.linear(x, weights.output, weights.output_bias))  # (T, V)
