"""The model: the forward pass of a decoder-only transformer, written once.

It is *given* its operations: the textbook in `npllama.ops`, or that with the compiled kernels of `npllama.kernels` in
their place. Every intermediate tensor passes through a tap under its name in `npllama.taps`, where the axis letters of
the shape comments are explained, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npllama.cache import KVCache, Lanes
from npllama.config import Experts, ModelConfig
from npllama.dtypes import Array, Tensor
from npllama.errors import ParameterError
from npllama.taps import Recorder, Tap, at_layer, untapped
from npllama.weights import LayerWeights, Weights


class Ops(Protocol):
    """The operations that a forward pass is made of; see `npllama.ops` for what each computes."""

    embed: Callable[..., Array]
    rms_norm: Callable[..., Array]
    layer_norm: Callable[..., Array]
    linear: Callable[..., Array]
    linears: Callable[..., tuple[Array, ...]]
    rope_tables: Callable[..., tuple[Array, Array]]
    apply_rope: Callable[..., Array]
    attention: Callable[..., Array]
    attentions: Callable[..., Array]
    activate: Callable[..., Array]
    glu: Callable[..., Array]
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


def feed_forward(h: Array, w: LayerWeights, config: ModelConfig, ops: Ops, tap: Tap) -> Array:
    """Let each position think for itself: h (T, D) -> (T, D)."""
    if w.w1 is None:
        up = tap("up", ops.linear(h, w.w3, w.w3_bias))  # (T, F)
        act = tap("ffn_act", ops.activate(up, config.activation))  # (T, F)
    else:
        gate, up = ops.linears(h, (w.w1, w.w3), (w.w1_bias, w.w3_bias))
        gate, up = tap("gate", gate), tap("up", up)  # (T, F)
        act = tap("ffn_act", ops.glu(gate, up, config.activation))  # (T, F)
    return tap("ffn_out", ops.linear(act, w.w2, w.w2_bias))  # (T, D)


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
    x = tap("resid_mid", x + out)  # (T, D)
    if config.norm_order == "post":
        x = attention_norm("resid_mid_norm", x)

    h = ffn_norm("ffn_norm", x) if config.norm_order == "pre" else x  # (T, D)
    if config.experts is not None and w.router is not None:
        out = mixture(h, w, config.experts, config, ops, tap)  # (T, D)
    else:
        out = feed_forward(h, w, config, ops, tap)  # (T, D)
    if config.norm_order == "output":
        out = ffn_norm("ffn_out_norm", out)
    x = tap("resid_post", x + out)  # (T, D)
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
    freqs = weights.rope_freqs_long if horizon > scaling.original_max_seq_len else weights.rope_freqs
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


class Model:
    """A loaded model: configuration, mapped weights, operations and, where the store has one, a tokenizer.

    Attributes
    ----------
    config : ModelConfig
    weights : Weights
    backend : str
        "fast", "numpy" or "float64".
    threads : int
        Threads that do its work: Numba's with the fast backend, BLAS's with the others.
    tokenizer : Tokenizer or None
        None for a store that takes and gives token ids only.
    notice : str or None
        What a person should know before trusting the text: for example that layers were left out.
    recorder : Recorder or None
        Set by `npllama.record` while it watches.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        *,
        backend: str,
        dtype: np.dtype[Any] | type = np.float32,
        threads: int = 1,
        tokenizer: Any = None,
        notice: str | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self.threads = threads
        self.tokenizer = tokenizer
        self.notice = notice
        self.recorder: Recorder | None = None
        self._ops = ops
        self._at_once = ops.through_layers(weights, config)
        self._dtype = np.dtype(dtype)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for this model with room for ``capacity`` positions."""
        return KVCache(self.config, capacity)

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: every matrix once, of experts those that are asked.

        Of the embeddings it is one row each.
        """
        w, config = self.weights, self.config
        total = w.output.nbytes + w.tok_embeddings.nbytes // config.vocab_size
        total += sum(tensor.nbytes for tensor in (w.norm, w.norm_bias, w.output_bias) if tensor is not None)
        if w.pos_embeddings is not None:
            total += w.pos_embeddings.nbytes // config.max_seq_len
        for layer in w.layers:
            stacked = () if config.experts is None or layer.router is None else ("w1", "w3", "w2")
            for name in LayerWeights.__slots__:
                tensor = getattr(layer, name)
                if tensor is None:
                    continue
                if config.experts is not None and name in stacked:
                    total += tensor.nbytes * config.experts.active // config.experts.count
                else:
                    total += tensor.nbytes
        return total

    def forward(self, tokens: ArrayLike, cache: KVCache | None = None, *, last: bool = False) -> Array:
        """Compute the logits of new tokens.

        Parameters
        ----------
        tokens : array_like of int, shape (T,)
            Token ids.
        cache : KVCache, optional
            What came before; it grows by T. Without one the tokens stand alone.
        last : bool
            Only the last position's logits, which is all that generating needs.

        Returns
        -------
        ndarray of shape (T, V), or (1, V) with ``last``
            float32 (float64 with the float64 backend).

        Raises
        ------
        ParameterError
            No tokens, or an id outside the vocabulary.
        ContextOverflowError
            More positions than the cache or the model's context holds.
        """
        ids = self._checked(tokens)
        if cache is None:
            cache = self.new_cache(len(ids))
        self._recompute_if_outgrown(cache, len(ids))
        tap: Tap = untapped
        if self.recorder is not None:
            tap = self.recorder.step(len(ids), cache.length + len(ids), self._dtype)
        logits = self._run(ids, cache, tap, last)
        cache.remember(ids)
        return logits

    def forward_many(
        self, sequences: Sequence[ArrayLike], caches: Sequence[KVCache], *, last: bool = False
    ) -> list[Array]:
        """Compute the logits of new tokens of several sequences in one pass: the weights are read once for all.

        Parameters
        ----------
        sequences : sequence of array_like of int, shape (T,)
            New tokens of each sequence; T may differ.
        caches : sequence of KVCache
            What came before in each.
        last : bool
            Only the last position's logits of each.

        Returns
        -------
        list of ndarray of shape (T, V), or (1, V) with ``last``

        Raises
        ------
        ParameterError
            As `forward` raises; or the sequences are none, or not as many as caches, or somebody records: tensors of
            several sequences have no one S.
        ContextOverflowError
            More positions than one of the caches holds.
        """
        if self.recorder is not None or not 0 < len(sequences) == len(caches):
            raise ParameterError(
                f"{len(sequences)} sequences with {len(caches)} caches, recorded: {self.recorder is not None}",
                remedy="Give each of one or more sequences its cache, outside of `record`.",
            )
        ids = [self._checked(tokens) for tokens in sequences]
        for new, cache in zip(ids, caches, strict=True):
            self._recompute_if_outgrown(cache, len(new))
        counts = [len(new) for new in ids]
        logits = self._run(np.concatenate(ids), Lanes(caches, counts), untapped, last)
        for new, cache in zip(ids, caches, strict=True):
            cache.remember(new)
        return np.split(logits, range(1, len(ids)) if last else np.cumsum(counts)[:-1])

    def _run(self, ids: NDArray[np.int64], cache: KVCache | Lanes, tap: Tap, last: bool) -> Array:
        model = ids, self.weights, self.config, self._ops, cache
        return forward(*model, dtype=self._dtype, tap=tap, last=last, at_once=self._at_once)

    def _recompute_if_outgrown(self, cache: KVCache, n_new: int) -> None:
        """Compute the cache anew where a longrope model's text now reaches beyond its original context.

        Its keys were turned by the frequencies of short texts, and those of long ones hold from here on, for every
        position. transformers does the same when it generates.
        """
        scaling = self.config.rope_scaling
        if scaling is None or self.weights.rope_freqs_long is None or cache.length == 0:
            return
        before, after = max(cache.horizon, cache.length), max(cache.horizon, cache.length + n_new)
        if before <= scaling.original_max_seq_len < after:
            cache.reserve(n_new)
            seen = cache.tokens.copy()
            cache.truncate(0)
            cache.horizon = after
            self._run(seen, cache, untapped, last=True)
            cache.remember(seen)

    def _checked(self, tokens: ArrayLike) -> NDArray[np.int64]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ParameterError(
                f"tokens have shape {ids.shape} and dtype {ids.dtype}, expected integers of shape (T,) with T >= 1"
            )
        outside = np.flatnonzero((ids < 0) | (ids >= self.config.vocab_size))
        if outside.size:
            at = int(outside[0])
            raise ParameterError(
                f"token {int(ids[at])} at index {at} is outside the vocabulary of {self.config.vocab_size}"
            )
        return ids.astype(np.int64, copy=False)
