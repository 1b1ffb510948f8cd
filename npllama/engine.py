"""A loaded model: what a forward pass needs, put together, and checked on the way in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npllama.cache import KVCache, Lanes
from npllama.config import ModelConfig
from npllama.dtypes import Array
from npllama.errors import ParameterError
from npllama.model import Ops, forward
from npllama.taps import Recorder, Tap, untapped
from npllama.weights import LayerWeights, Weights

#: Called as ``progress(what, done, total)``.
Progress = Callable[[str, int, int], None]


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
    activations : str
        What the inputs of its products are rounded to, see `npllama.rounding`; "float32" is not at all.
    cache_dtype : str
        How the caches that it makes keep keys and values, see `npllama.cache.KVCache`.
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
        activations: str = "float32",
        cache_dtype: str = "float32",
        tokenizer: Any = None,
        notice: str | None = None,
        prepare: Callable[[Progress | None], None] | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self.threads = threads
        self.activations = activations
        self.cache_dtype = cache_dtype
        self.tokenizer = tokenizer
        self.notice = notice
        self.recorder: Recorder | None = None
        self._ops = ops
        self._prepare = prepare
        self._at_once = ops.through_layers(weights, config)
        self._dtype = np.dtype(dtype)

    def prepare(self, progress: Progress | None = None) -> None:
        """Compile the kernels that the model needs and that no earlier process has compiled.

        `npllama.load` does so unless it is told not to, and the first forward pass otherwise. What nearly no model
        needs is compiled when it is first used.

        Parameters
        ----------
        progress : callable, optional
            Called as ``progress(what, done, total)``.
        """
        if self._prepare is not None:
            self._prepare(progress)
            self._prepare = None

    def new_cache(self, capacity: int) -> KVCache:
        """Return an empty cache for this model with room for ``capacity`` positions."""
        return KVCache(self.config, capacity, self.cache_dtype)

    @property
    def runs_at_once(self) -> bool:
        """Tell whether all layers can be one operation where nobody watches."""
        return self._at_once is not None

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
        self.prepare()
        model = ids, self.weights, self.config, self._ops, cache
        return forward(*model, dtype=self._dtype, tap=tap, last=last, at_once=self._at_once)

    def _recompute_if_outgrown(self, cache: KVCache, n_new: int) -> None:
        """Compute the cache anew where a longrope model's text now reaches beyond its original context.

        Its keys were turned by the frequencies of short texts, and those of long ones hold from here on, for every
        position. transformers does the same when it generates.
        """
        before, after = max(cache.horizon, cache.length), max(cache.horizon, cache.length + n_new)
        if cache.length > 0 and self.config.is_long(after) and not self.config.is_long(before):
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
