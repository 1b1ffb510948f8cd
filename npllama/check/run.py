"""Runs of the engine that are watched: recorded into a trace, or fed a reference's tensors at every tap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from npllama.check.rows import relative_error
from npllama.check.trace import MemoryTrace, TraceLike, TraceSink
from npllama.config import ModelConfig
from npllama.errors import ParameterError, TraceError
from npllama.taps import Recorder, Tap

Array = NDArray[Any]
See = Callable[[str, Array], Array]
Sink = TypeVar("Sink", bound=TraceSink)


class Engine(Protocol):
    """A model that can be watched: `npllama.engine.Model`."""

    config: ModelConfig
    backend: str
    activations: str
    recorder: Recorder | None

    def new_cache(self, capacity: int) -> Any:
        """Return an empty cache."""

    def forward(self, tokens: Any, cache: Any = None) -> Array:
        """Run the model on new tokens behind the cached ones."""


class Watcher(Recorder):
    """A recorder that keeps nothing: it shows each tensor to a function, and the pass goes on with what that returns.

    Parameters
    ----------
    config, pattern
        As for `Recorder`, which checks every tensor against the table first.
    see : callable
        ``see(name, x)`` for each tensor that the pattern matches.
    """

    def __init__(self, config: ModelConfig, pattern: str, see: See) -> None:
        super().__init__(config, pattern)
        self._see = see

    def step(self, n_new: int, n_all: int, dtype: np.dtype[Any]) -> Tap:
        """Begin a forward call; see `Recorder.step`."""
        check = super().step(n_new, n_all, dtype)
        kept = self.steps.pop()

        def tap(name: str, x: Array) -> Array:
            check(name, x)
            copy = kept.pop(name, None)
            return x if copy is None else self._see(name, copy)

        return tap


@overload
def run_trace(
    model: Engine, tokens: Sequence[int], *, prefill: int, greedy: int = 0, pattern: str = "*", chunk: int | None = None
) -> MemoryTrace: ...
@overload
def run_trace(
    model: Engine,
    tokens: Sequence[int],
    *,
    prefill: int,
    into: Sink,
    greedy: int = 0,
    pattern: str = "*",
    chunk: int | None = None,
) -> Sink: ...
def run_trace(
    model: Engine,
    tokens: Sequence[int],
    *,
    prefill: int,
    into: Any = None,
    greedy: int = 0,
    pattern: str = "*",
    chunk: int | None = None,
) -> Any:
    """Run a model over tokens, prefill first and then one token a step, and record its taps.

    Parameters
    ----------
    model : Model
        Any backend; what it fuses away is not in the trace.
    tokens : sequence of int
        Token ids to feed, the prompt's first.
    prefill : int
        How many of them go in at once.
    into : TraceSink, optional
        A `TraceWriter` or `MemoryTrace` made for these tokens; by default a new `MemoryTrace`.
    greedy : int
        Steps to decode after the given tokens, each with the most probable one.
    pattern : str
        Shell-style pattern of tap names.
    chunk : int, optional
        Feed the prefill in pieces of at most so many tokens. The trace looks like that of one piece.

    Returns
    -------
    MemoryTrace or what ``into`` was
    """
    if not 1 <= prefill <= len(tokens):
        raise ParameterError(f"a prefill of {prefill} tokens, expected 1 to {len(tokens)}")
    if into is None:
        into = MemoryTrace(tokens=tokens, prefill=prefill, dtype=dtype_of(model), config=model.config)
    run = _Run(into, whole=chunk is None or chunk >= prefill)
    cache = model.new_cache(len(tokens) + greedy)
    cache.horizon = prefill
    with _watched(model, pattern, run.see):
        size = prefill if chunk is None else chunk
        for start in range(0, prefill, size):
            logits = model.forward(list(tokens[start : min(start + size, prefill)]), cache)
        run.end_prefill(prefill)
        for place in range(prefill, len(tokens) + greedy):
            if place < len(tokens):
                token = tokens[place]
            else:
                token = int(logits[-1].argmax())
                into.extend(token)
            run.step += 1
            logits = model.forward([token], cache)
    return into


class _Run:
    """Hands the tensors of a run to its sink; those of a chunked prefill when all chunks are there."""

    def __init__(self, sink: TraceSink, *, whole: bool) -> None:
        self.step = 0
        self._sink = sink
        self._whole = whole
        self._pieces: dict[str, list[Array]] = {}

    def see(self, name: str, x: Array) -> Array:
        if self._whole:
            self._sink.add(self.step, name, x)
        else:
            self._pieces.setdefault(name, []).append(x)
        return x

    def end_prefill(self, n_all: int) -> None:
        self._whole = True
        for name, parts in self._pieces.items():
            self._sink.add(0, name, _joined(name, parts, n_all))
        self._pieces.clear()


@contextmanager
def _watched(model: Engine, pattern: str, see: See) -> Iterator[None]:
    """Show a model's tensors to a function for a while."""
    before = model.recorder
    model.recorder = Watcher(model.config, pattern, see)
    try:
        yield
    finally:
        model.recorder = before


def dtype_of(model: Engine) -> str:
    """Return what a model computes in, as a trace says it."""
    return "float64" if model.backend == "float64" else model.activations


def _joined(name: str, parts: list[Array], n_all: int) -> Array:
    """Concatenate the chunks of a tensor along T; earlier chunks saw fewer keys, later ones are masked for them."""
    if len(parts) == 1:
        return parts[0]
    beyond = {"scores": -np.inf, "probs": 0.0}.get(name.rpartition(".")[2])
    if beyond is None:
        return np.concatenate(parts)
    wide = [np.pad(x, ((0, 0), (0, 0), (0, n_all - x.shape[2])), constant_values=beyond) for x in parts]
    return np.concatenate(wide, axis=1)


def shadow_run(model: Engine, reference: TraceLike, *, pattern: str = "*") -> dict[tuple[str, int], float]:
    """Measure the error of each operation alone, by feeding it the reference's inputs.

    At every tap the pass goes on with the reference's tensor instead of the engine's, so no error is inherited from
    the operations before. A tensor that the reference lacks passes as the engine computed it. The cache holds the
    reference's keys and values, too.

    Parameters
    ----------
    model : Model
        The engine to check.
    reference : TraceLike
        A trace of the same model, in canonical names; its tokens, prefill and steps are run.
    pattern : str
        Which taps to report; all are replaced.

    Returns
    -------
    dict
        (tap, step) -> squared error of the engine's tensor relative to the reference's, at the worst token.

    Raises
    ------
    TraceError
        A tensor of the reference does not have the engine's shape.
    """
    known = {(entry.name, entry.step) for entry in reference.taps}
    local: dict[tuple[str, int], float] = {}
    step = 0

    def see(name: str, x: Array) -> Array:
        if (name, step) not in known:
            return x
        given = np.array(reference.read(name, step), x.dtype)
        if given.shape != x.shape:
            raise TraceError(f"{name} of step {step} has shape {given.shape} in the reference, {x.shape} in the engine")
        if fnmatchcase(name, pattern):
            local[name, step] = relative_error(name, x, given)
        return given

    cache = model.new_cache(len(reference.tokens))
    with _watched(model, "*", see):
        model.forward(list(reference.tokens[: reference.prefill]), cache)
        for step in range(1, reference.steps + 1):
            model.forward([reference.tokens[reference.prefill + step - 1]], cache)
    return local
