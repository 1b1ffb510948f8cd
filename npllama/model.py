"""The model: the forward pass of a decoder-only transformer, written once.

It is *given* its operations: the textbook in `npllama.ops`, or that with the compiled kernels of `npllama.kernels` in
their place. Every intermediate tensor passes through a tap under its name in `npllama.taps`, where the axis letters of
the shape comments are explained, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npllama.cache import KVCache
from npllama.config import ModelConfig
from npllama.dtypes import Array, Tensor
from npllama.errors import ParameterError
from npllama.taps import Recorder, Tap, at_layer, untapped


class Ops(Protocol):
    """The operations that a forward pass is made of; see `npllama.ops` for what each computes."""

    embed: Callable[..., Array]
    rms_norm: Callable[..., Array]
    linear: Callable[..., Array]
    linears: Callable[..., tuple[Array, ...]]
    rope_tables: Callable[..., tuple[Array, Array]]
    apply_rope: Callable[..., Array]
    attention: Callable[..., Array]
    swiglu: Callable[..., Array]


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """Weights of one decoder layer, by their canonical names."""

    attention_norm: Tensor  # (D,)
    wq: Tensor  # (H*Dh, D)
    wk: Tensor  # (K*Dh, D)
    wv: Tensor  # (K*Dh, D)
    wo: Tensor  # (D, H*Dh)
    ffn_norm: Tensor  # (D,)
    w1: Tensor  # (F, D)  gate
    w3: Tensor  # (F, D)  up
    w2: Tensor  # (D, F)  down


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Weights of a model."""

    tok_embeddings: Tensor  # (V, D)
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # (D,)
    output: Tensor  # (V, D); the embedding itself in a tied model
    rope_freqs: NDArray[np.float32]  # (Dh/2,)


def gather_weights(config: ModelConfig, tensor: Callable[[str], Tensor], rope_freqs: NDArray[np.float32]) -> Weights:
    """Put a model's weights together from a function that finds a tensor by its canonical name."""

    def layer(i: int) -> LayerWeights:
        def weight(name: str) -> Tensor:
            return tensor(f"layers.{i}.{name}.weight")

        attention = {name: weight(f"attention.{name}") for name in ("wq", "wk", "wv", "wo")}
        feed_forward = {name: weight(f"feed_forward.{name}") for name in ("w1", "w2", "w3")}
        norms = {name: weight(name) for name in ("attention_norm", "ffn_norm")}
        return LayerWeights(**norms, **attention, **feed_forward)

    return Weights(
        tok_embeddings=tensor("tok_embeddings.weight"),
        layers=tuple(layer(i) for i in range(config.n_layers)),
        norm=tensor("norm.weight"),
        output=tensor("output.weight"),
        rope_freqs=rope_freqs,
    )


def block(
    x: Array,
    w: LayerWeights,
    i: int,
    rope: tuple[Array, Array],
    cache: KVCache,
    config: ModelConfig,
    ops: Ops,
    tap: Tap,
) -> Array:
    """Run decoder layer ``i``: x (T, D) -> (T, D)."""
    n_new = x.shape[0]
    heads, kv_heads = (n_new, config.n_heads, config.head_dim), (n_new, config.n_kv_heads, config.head_dim)

    h = tap("attention_norm", ops.rms_norm(x, w.attention_norm, config.norm_eps))  # (T, D)
    q, k, v = ops.linears(h, (w.wq, w.wk, w.wv))
    q = tap("q", q.reshape(heads))  # (T, H, Dh)
    k = tap("k", k.reshape(kv_heads))  # (T, K, Dh)
    v = tap("v", v.reshape(kv_heads))  # (T, K, Dh)
    q = tap("q_rope", ops.apply_rope(q, *rope))  # (T, H, Dh)
    k = tap("k_rope", ops.apply_rope(k, *rope))  # (T, K, Dh)
    keys, values = cache.append(i, k, v)  # (S, K, Dh)
    context = tap("context", ops.attention(q, keys, values, tap))  # (T, H, Dh)
    out = tap("attention_out", ops.linear(context.reshape(n_new, -1), w.wo))  # (T, D)
    x = tap("resid_mid", x + out)  # (T, D)

    h = tap("ffn_norm", ops.rms_norm(x, w.ffn_norm, config.norm_eps))  # (T, D)
    gate, up = ops.linears(h, (w.w1, w.w3))
    gate, up = tap("gate", gate), tap("up", up)  # (T, F)
    act = tap("ffn_act", ops.swiglu(gate, up))  # (T, F)
    out = tap("ffn_out", ops.linear(act, w.w2))  # (T, D)
    return tap("resid_post", x + out)  # (T, D)


def forward(
    tokens: NDArray[np.int64],
    weights: Weights,
    config: ModelConfig,
    ops: Ops,
    cache: KVCache,
    *,
    dtype: np.dtype[Any],
    tap: Tap = untapped,
    last: bool = False,
) -> Array:
    """Run the model on new tokens behind those in the cache.

    Parameters
    ----------
    tokens : ndarray of shape (T,)
        Valid token ids.
    weights, config, ops
        The model.
    cache : KVCache
        Grows by T positions, once all has been computed.
    dtype : numpy dtype
        float32 or float64: the dtype of every activation.
    tap : callable
        ``tap(name, x)`` sees every intermediate tensor and returns what the pass goes on with.
    last : bool
        Compute the logits of the last position only.

    Returns
    -------
    ndarray of shape (T, V), or (1, V) with ``last``
        Logits.
    """
    n_new = len(tokens)
    cache.reserve(n_new)
    rope = ops.rope_tables(weights.rope_freqs, cache.length, n_new)  # (T, Dh/2) twice
    x = tap("tok_embeddings", ops.embed(tokens, weights.tok_embeddings, dtype))  # (T, D)
    for i, layer in enumerate(weights.layers):
        x = block(x, layer, i, rope, cache, config, ops, at_layer(tap, i))  # (T, D)
    cache.advance(n_new)
    x = tap("norm", ops.rms_norm(x[-1:] if last else x, weights.norm, config.norm_eps))  # (T, D)
    return tap("logits", ops.linear(x, weights.output))  # (T, V)


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
        self._dtype = np.dtype(dtype)

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for this model with room for ``capacity`` positions."""
        return KVCache(self.config, capacity)

    @property
    def axes(self) -> Mapping[str, int]:
        """Lengths of the axis letters that the model fixes."""
        return self.config.axes

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of weights that decoding one token reads: every matrix once, one row of the embedding."""
        layers: Sequence[LayerWeights] = self.weights.layers
        in_layers: int = sum(getattr(layer, name).nbytes for layer in layers for name in LayerWeights.__slots__)
        row = self.weights.tok_embeddings.nbytes // self.config.vocab_size
        return in_layers + self.weights.norm.nbytes + self.weights.output.nbytes + row

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
        tap: Tap = untapped
        if self.recorder is not None:
            tap = self.recorder.step(len(ids), cache.length + len(ids), self._dtype)
        return forward(ids, self.weights, self.config, self._ops, cache, dtype=self._dtype, tap=tap, last=last)

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
