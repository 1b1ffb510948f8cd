"""The keys and values of the positions that a model has already seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.config import ModelConfig
from npllama.dtypes import Array, bfloat16
from npllama.errors import ContextOverflowError, ParameterError
from npllama.pages import untouched_zeros

#: What a `KVCache` can keep keys and values in.
CACHE_DTYPES = ("float32", "bfloat16")


def check_dtype(dtype: str) -> None:
    """Raise ParameterError unless a `KVCache` can keep keys and values in a dtype."""
    if dtype not in CACHE_DTYPES:
        raise ParameterError(f"the cache's dtype is {dtype!r}, expected one of {', '.join(CACHE_DTYPES)}")


class KVCache:
    """Rotated keys and values of every layer, for one sequence.

    The cache owns its length. A forward call writes the new positions behind it, layer by layer, and moves it once at
    its end: a call that fails half-way leaves the cache as it was.

    Parameters
    ----------
    config : ModelConfig
        Gives L, K and Dh, and the longest context.
    capacity : int
        Positions to make room for.
    dtype : str
        "float32" keeps what is appended as it comes, float64 included. "bfloat16" rounds it, to the nearest with ties
        to even, which halves memory and the time to read it, and costs two of three digits. It also is what attention
        then multiplies in, see `npllama.rounding`.

    Attributes
    ----------
    capacity : int
    length : int
        Positions so far, S.
    dtype : str
    horizon : int
        How many positions are known to come in all, where that is more than S: those of a prompt that is fed in chunks.
        0 says nothing. Whoever feeds the prompt sets it.

    Raises
    ------
    ContextOverflowError
        ``capacity`` exceeds the model's context.
    ParameterError
        ``capacity`` is below 1, or there is no such ``dtype``.

    Notes
    -----
    Keys are kept after RoPE, so a position is rotated once. Memory is taken at the first `append`:
    ``2 * L * capacity * K * Dh`` numbers. The system hands out its pages as they are first written. Each head's
    positions lie in a row, since attention reads them head by head.
    """

    def __init__(self, config: ModelConfig, capacity: int, dtype: str = "float32") -> None:
        if capacity < 1:
            raise ParameterError(f"the cache's capacity is {capacity}, expected at least 1")
        if capacity > config.max_seq_len:
            raise ContextOverflowError(
                f"a cache of {capacity} positions was asked for, but the model's context is {config.max_seq_len}",
                remedy="Shorten the prompt or ask for fewer new tokens.",
            )
        check_dtype(dtype)
        self.capacity = capacity
        self.length = 0
        self.dtype = dtype
        self.horizon = 0
        self._config = config
        self._tokens = np.zeros(capacity, np.int64)
        self._numbers: Array | None = None  # (2, L, K, S, Dh): keys, values

    @property
    def nbytes(self) -> int:
        """Bytes set aside; 0 before the first `append`."""
        return 0 if self._numbers is None else self._numbers.nbytes

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Ids of the positions so far, shape (S,), a view; 0 where nobody has said (`remember`)."""
        return self._tokens[: self.length]

    def remember(self, tokens: NDArray[np.int64]) -> None:
        """Note the ids, shape (T,), of the latest positions, once they are counted (`advance`).

        Raises
        ------
        ParameterError
            More ids than positions.
        """
        if len(tokens) > self.length:
            raise ParameterError(f"{len(tokens)} ids were to be remembered, the cache holds {self.length} positions")
        self._tokens[self.length - len(tokens) : self.length] = tokens

    def reserve(self, n_new: int) -> None:
        """Check that ``n_new`` more positions fit.

        Raises
        ------
        ContextOverflowError
            With both numbers.
        """
        if self.length + n_new > self.capacity:
            raise ContextOverflowError(
                f"{self.length} cached and {n_new} new positions do not fit into a cache of {self.capacity}",
                remedy="Use a larger cache, or truncate this one.",
            )

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Write the new positions of one layer behind the cached ones.

        Parameters
        ----------
        layer : int
            Index of the layer.
        k, v : ndarray of shape (T, K, Dh)
            New rotated keys, new values.

        Returns
        -------
        keys, values : ndarray of shape (S, K, Dh)
            Views of all positions so far, the new ones included. `length` moves only with `advance`. A bfloat16 cache
            returns arrays of ml_dtypes' bfloat16, which NumPy widens as it computes with them.
        """
        if self._numbers is None:
            self._numbers = self._room(k.dtype)
        end = self.length + len(k)
        layers = self._numbers[:, layer]  # (2, K, capacity, Dh)
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large for bfloat16 becomes infinity
            layers[0, :, self.length : end] = k.transpose(1, 0, 2)
            layers[1, :, self.length : end] = v.transpose(1, 0, 2)
        return layers[0, :, :end].transpose(1, 0, 2), layers[1, :, :end].transpose(1, 0, 2)

    def room(self) -> Array:
        """Return the memory of all positions, (2, L, K, capacity, Dh): keys, values. It is taken now if it was not.

        For whoever writes new positions of all layers at once: behind `length`, which then moves with `advance`.
        """
        if self._numbers is None:
            self._numbers = self._room(np.dtype(np.float32))
        return self._numbers

    def _room(self, appended: np.dtype[Any]) -> Array:
        """Return zeros for all positions."""
        if self.dtype == "bfloat16":
            appended = bfloat16()
        config = self._config
        return untouched_zeros((2, config.n_layers, config.n_kv_heads, self.capacity, config.head_dim), appended)

    def advance(self, n_new: int) -> None:
        """Count ``n_new`` positions, written in every layer, as seen."""
        self.reserve(n_new)
        self.length += n_new

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on, and their ids; with the last of them, how many were to come."""
        if not 0 <= length <= self.length:
            raise ParameterError(f"cannot truncate to {length} positions, the cache holds {self.length}")
        self._tokens[length : self.length] = 0
        self.length = length
        if length == 0:
            self.horizon = 0

    def fork(self) -> KVCache:
        """Return an independent copy, for sequences that begin alike: only the positions so far are copied."""
        twin = KVCache(self._config, self.capacity, self.dtype)
        twin.length, twin.horizon = self.length, self.horizon
        twin._tokens[: self.length] = self.tokens
        if self._numbers is not None:
            twin._numbers = twin._room(self._numbers.dtype)
            twin._numbers[:, :, :, : self.length] = self._numbers[:, :, :, : self.length]
        return twin


class Lanes:
    """Caches of several sequences whose new positions lie end to end in one forward call.

    Parameters
    ----------
    caches : sequence of KVCache
        One for each sequence, all different.
    counts : sequence of int
        New positions of each; T is their sum.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        if len({id(cache) for cache in caches}) < len(caches):
            raise ParameterError("two sequences were given one cache", remedy="Give each its own; see KVCache.fork.")
        self.caches = tuple(caches)
        self.counts = tuple(counts)

    def append(self, layer: int, k: Array, v: Array) -> list[tuple[Array, Array]]:
        """Write the new positions (T, K, Dh) of one layer behind each sequence's own; return what each then has."""
        ends = np.cumsum(self.counts)
        spans = (slice(end - count, end) for count, end in zip(self.counts, ends, strict=True))
        return [cache.append(layer, k[span], v[span]) for cache, span in zip(self.caches, spans, strict=True)]

    def reserve(self, n_new: int) -> None:
        """Check that every sequence's new positions fit; see `KVCache.reserve`."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.reserve(count)

    def advance(self, n_new: int) -> None:
        """Count every sequence's new positions as seen."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.advance(count)
