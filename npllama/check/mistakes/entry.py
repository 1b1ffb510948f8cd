"""What an entry of the bug dictionary is, and the tools that its plants share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npllama.check.rerun import Rerun, Seen, kind_of
from npllama.config import ModelConfig
from npllama.dtypes import narrow, widen
from npllama.taps import Tap
from npllama.weights import LayerWeights

Array: TypeAlias = NDArray[Any]
#: Takes a clean run and returns it with a mistake; None where it would be no mistake: a theta that the model has.
Plant: TypeAlias = Callable[[Rerun], Rerun | None]
#: ``change(x, seen)`` returns what comes in the place of a tapped tensor x.
Change: TypeAlias = Callable[[Array, Seen], Array]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to make a mistake.

    Attributes
    ----------
    label : str
        What tells it from the other ways; empty when there is only one.
    first : str
        Tap at which it shows first; it shows at none before that in any family.
    plant : callable
        Makes it in a run.
    step : int
        0 when it shows in the prefill, 1 when only decoding shows it.
    rounds : str
        A dtype that the first tensor is rounded to by the mistake itself, if it is. Where a number is near the middle
        between two of that dtype, nobody can say which one it became.
    """

    label: str
    first: str
    plant: Plant
    step: int = 0
    rounds: str = ""


@dataclass(frozen=True, slots=True)
class Mistake:
    """An entry of the dictionary.

    Attributes
    ----------
    name : str
        Its name in reports.
    what, shows, fix : str
        A sentence each for a person: what it is, how it shows, how to mend it.
    ways : tuple of Way
        How it is made.
    """

    name: str
    what: str
    shows: str
    fix: str
    ways: tuple[Way, ...]


def shown(**changes: Change) -> Plant:
    """Put something else in the place of tensors, for those who watch as for the pass; keys are kinds of taps."""

    def plant(run: Rerun) -> Rerun:
        def around(inner: Tap, seen: Seen) -> Tap:
            def tap(name: str, x: Array) -> Array:
                change = changes.get(kind_of(name))
                return inner(name, x if change is None else change(x, seen).astype(x.dtype, copy=False))

            return tap

        return replace(run, tap=around)

    return plant


def passed_on(**changes: Change) -> Plant:
    """Let the pass go on with something else than the tensors that it shows; keys are kinds of taps."""

    def plant(run: Rerun) -> Rerun:
        def around(inner: Tap, seen: Seen) -> Tap:
            def tap(name: str, x: Array) -> Array:
                x = inner(name, x)
                change = changes.get(kind_of(name))
                return x if change is None else change(x, seen).astype(x.dtype, copy=False)

            return tap

        return replace(run, tap=around)

    return plant


def with_layers(run: Rerun, change: Callable[[LayerWeights], LayerWeights]) -> Rerun:
    """Return a run with other weights in every layer."""
    return replace(run, weights=replace(run.weights, layers=tuple(change(layer) for layer in run.weights.layers)))


def layers(change: Callable[[LayerWeights], LayerWeights]) -> Plant:
    """Change the weights of every layer."""
    return lambda run: with_layers(run, change)


def with_config(change: Callable[[ModelConfig], ModelConfig | None]) -> Plant:
    """Run the weights under another configuration; no mistake where that is None, or the model's own."""

    def plant(run: Rerun) -> Rerun | None:
        config = change(run.config)
        return None if config in (None, run.config) else replace(run, config=config)

    return plant


def where(words: str, plant: Plant) -> Plant:
    """Make a mistake in models with a layer of which all these words of `ModelConfig.features` are true; in no others.

    Parameters
    ----------
    words : str
        With spaces between them.
    plant : callable
    """
    needed = frozenset(words.split())

    def planted(run: Rerun) -> Rerun | None:
        there = any(needed <= run.config.features(i) for i in range(run.config.n_layers))
        return plant(run) if there else None

    return planted


class Altered:
    """An object with some of its methods replaced."""

    def __init__(self, original: Any, **methods: Callable[..., Any]) -> None:
        self._original = original
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def decodes(run: Rerun) -> bool:
    """Tell whether a run goes on after its prefill."""
    return len(run.tokens) > run.prefill


def rounded(x: Array, dtype: str) -> Array:
    """Round numbers to "float16" or "bfloat16" and widen them to their own dtype again."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(x.dtype)
    return widen(narrow(x, dtype), dtype, x.dtype)
