"""npllama, in its own interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving import Engine, serve_engine

import npllama
from npllama.generation.prefill import prefill


class Npllama:
    """A converted model with the fast backend."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._model = npllama.load(settings["model"], threads=settings["threads"], activations=settings["dtype"])
        self.version = f"npllama {npllama.__version__}"
        self.vocab_size = self._model.config.vocab_size
        self.weight_bytes = self._model.nbytes_per_token
        self.start(1)
        self.feed([0])  # the cache takes its memory with the first token
        self.position_bytes = self._cache.nbytes // self._cache.capacity

    def start(self, capacity: int) -> None:
        """Begin a text."""
        self._cache = npllama.KVCache(self._model.config, capacity)

    def feed(self, tokens: list[int]) -> None:
        """Run tokens, many in chunks as a prompt is."""
        run = prefill if len(tokens) > 1 else _one
        self._logits = run(self._model, tokens, self._cache)

    def logits(self) -> Sequence[float]:
        """Return the last logits."""
        found: Sequence[float] = self._logits.reshape(-1)[-self.vocab_size :]
        return found


def _one(model: Any, tokens: list[int], cache: Any) -> Any:
    return model.forward(tokens, cache, last=True)


def load(settings: dict[str, Any]) -> Engine:
    """Load the model."""
    return Npllama(settings)


if __name__ == "__main__":
    serve_engine(load)
