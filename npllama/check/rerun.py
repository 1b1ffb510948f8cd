"""The model once more, with one thing changed: everything that a mistake can touch, as a value.

A `Rerun` is the forward pass of `npllama.model` with its parts laid out: configuration, weights, operations, tokens,
cache and taps. A mistake is a function that returns a copy with one part replaced; `npllama.check.mistakes` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npllama import ops
from npllama.config import ModelConfig
from npllama.engine import Model
from npllama.model import forward
from npllama.taps import Tap
from npllama.weights import Weights

Array: TypeAlias = NDArray[Any]
#: The latest tensor of each kind ("q_rope", "context", ...) that has passed a tap, and the residual stream as "stream".
Seen: TypeAlias = dict[str, Array]

#: Step of tensors that nobody asked for: those of a cache that is computed anew.
_UNSEEN = -1
_STREAM = frozenset({"tok_embeddings", "embeddings", "resid_mid", "resid_mid_norm", "resid_post", "resid_post_norm"})


@dataclass(frozen=True, slots=True)
class Rerun:
    """A run over given tokens, prefill first and then one token a step.

    Attributes
    ----------
    config : ModelConfig
    weights : Weights
    ops : namespace
        The operations; the textbook's, but for what a mistake replaces.
    tokens : tuple of int
        Every id that is fed, the prompt's first.
    prefill : int
        How many of them go in at once.
    new_cache : callable
        ``new_cache(capacity)`` makes an empty cache.
    cache : callable
        ``cache(cache, seen)`` is the cache that the pass gets.
    tap : callable
        ``tap(inner, seen)`` is the tap that the pass gets; ``inner`` shows a tensor to whoever watches.
    anew : callable
        ``anew(run, before, after)`` tells whether the cache is computed anew where a text of ``before`` positions grows
        to ``after``.
    """

    config: ModelConfig
    weights: Weights
    ops: Any
    tokens: tuple[int, ...]
    prefill: int
    new_cache: Callable[[int], Any]
    cache: Callable[[Any, Seen], Any]
    tap: Callable[[Tap, Seen], Tap]
    anew: Callable[[Rerun, int, int], bool]

    @classmethod
    def of(cls, model: Model, tokens: tuple[int, ...], prefill: int) -> Rerun:
        """Return a run of a model in which nothing is changed, by the textbook's operations."""
        return cls(
            config=model.config,
            weights=model.weights,
            ops=SimpleNamespace(**vars(ops)),
            tokens=tokens,
            prefill=prefill,
            new_cache=model.new_cache,
            cache=lambda cache, seen: cache,
            tap=lambda inner, seen: inner,
            anew=_outgrown,
        )

    def with_ops(self, **functions: Callable[..., Any]) -> Rerun:
        """Return a copy with some operations replaced."""
        return replace(self, ops=SimpleNamespace(**{**vars(self.ops), **functions}))

    def play(self, dtype: np.dtype[Any], watch: Callable[[int, str, Array], Array]) -> None:
        """Run all steps.

        Parameters
        ----------
        dtype : numpy dtype
            float32 or float64.
        watch : callable
            ``watch(step, name, x)`` sees each tensor, step 0 being the prefill; the pass goes on with what it returns.
            Step -1 is no step of the run: there a cache is computed anew.
        """
        seen: Seen = {}
        # One position more than there are tokens, for mistakes that leave a hole.
        cache = self.cache(self.new_cache(min(len(self.tokens) + 1, self.config.max_seq_len)), seen)

        def call(step: int, first: int, end: int) -> None:
            ids = np.array(self.tokens[first:end], np.int64)
            tap = self.tap(_remembering(step, watch, seen), seen)
            forward(ids, self.weights, self.config, self.ops, cache, dtype=dtype, tap=tap)

        call(0, 0, self.prefill)
        for step, end in enumerate(range(self.prefill + 1, len(self.tokens) + 1), start=1):
            if self.anew(self, end - 1, end):
                cache.truncate(0)
                cache.horizon = end
                call(_UNSEEN, 0, end - 1)
            call(step, end - 1, end)


def _outgrown(run: Rerun, before: int, after: int) -> bool:
    """Tell whether a longrope model's text grows beyond its original context; see `npllama.engine.Model.forward`."""
    return run.config.is_long(after) and not run.config.is_long(before)


def _remembering(step: int, watch: Callable[[int, str, Array], Array], seen: Seen) -> Tap:
    """Return the innermost tap of a step: it shows a tensor, and keeps what the pass goes on with."""

    def tap(name: str, x: Array) -> Array:
        kind = kind_of(name)
        seen[kind] = x = watch(step, name, x)
        if kind in _STREAM:
            seen["stream"] = x
        return x

    return tap


def kind_of(name: str) -> str:
    """Return a tap's name without its layer: ``layers.3.q_rope`` -> ``q_rope``."""
    return name.rpartition(".")[2]
