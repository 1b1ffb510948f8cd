"""The keys and values of the positions that a model has already seen."""

from __future__ import annotations

import numpy as np

from npllama.config import ModelConfig
from npllama.dtypes import Array
from npllama.errors import ContextOverflowError, ParameterError


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

    Raises
    ------
    ContextOverflowError
        ``capacity`` exceeds the model's context.

    Notes
    -----
    Keys are kept after RoPE, so a position is rotated once. Memory is taken at the first `append`, in the dtype that is
    appended: ``2 * L * capacity * K * Dh`` numbers. The system hands out its pages as they are first written.
    """

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        if capacity < 1:
            raise ParameterError(f"the cache's capacity is {capacity}, expected at least 1")
        if capacity > config.max_seq_len:
            raise ContextOverflowError(
                f"a cache of {capacity} positions was asked for, but the model's context is {config.max_seq_len}",
                remedy="Shorten the prompt or ask for fewer new tokens.",
            )
        self.capacity = capacity
        self.length = 0
        self._shape = (config.n_layers, capacity, config.n_kv_heads, config.head_dim)  # (L, S, K, Dh)
        self._keys: Array | None = None
        self._values: Array | None = None

    @property
    def nbytes(self) -> int:
        """Bytes set aside; 0 before the first `append`."""
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes

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
            Views of all positions so far, the new ones included. `length` moves only with `advance`.
        """
        if self._keys is None or self._values is None:
            self._keys = np.zeros(self._shape, k.dtype)
            self._values = np.zeros(self._shape, v.dtype)
        end = self.length + k.shape[0]
        self._keys[layer, self.length : end] = k
        self._values[layer, self.length : end] = v
        return self._keys[layer, :end], self._values[layer, :end]

    def advance(self, n_new: int) -> None:
        """Count ``n_new`` positions, written in every layer, as seen."""
        self.reserve(n_new)
        self.length += n_new

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ParameterError(f"cannot truncate to {length} positions, the cache holds {self.length}")
        self.length = length
