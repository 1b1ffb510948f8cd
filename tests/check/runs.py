"""Runs that the tests of comparisons share: correct ones in many ways, and edited copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace, TraceLike
from npllama.config import ModelConfig
from npllama.dtypes import Array, narrow, widen
from npllama.taps import Recorder, Tap
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens

CONFIG = loud_config()
PREFILL, DECODE = 64, 3
TOKENS: list[int] = loud_tokens(CONFIG, PREFILL + DECODE).tolist()


def engine_trace(config: ModelConfig = CONFIG, *, chunk: int | None = None, **options: Any) -> MemoryTrace:
    """Record a loud model on the common tokens; options as for `loud_model`."""
    return run_trace(loud_model(config, **options), TOKENS, prefill=PREFILL, chunk=chunk)


class Through(Recorder):
    """A recorder that puts every tensor through a function, which the pass goes on with."""

    def __init__(self, config: ModelConfig, change: Callable[[str, Array], Array], into: MemoryTrace) -> None:
        super().__init__(config)
        self._change = change
        self._into = into
        self._step = -1

    def step(self, n_new: int, n_all: int, dtype: np.dtype[Any]) -> Tap:
        self._step += 1

        def tap(name: str, x: Array) -> Array:
            y = self._change(name, x)
            self._into.add(self._step, name, np.array(y))
            return y

        return tap


def changed_trace(change: Callable[[str, Array], Array], *, dtype: str = "float32", **options: Any) -> MemoryTrace:
    """Record a loud model while every tensor goes through ``change(name, x)``."""
    model = loud_model(CONFIG, **options)
    trace = MemoryTrace(tokens=TOKENS, prefill=PREFILL, dtype=dtype, config=CONFIG)
    model.recorder = Through(CONFIG, change, trace)
    cache = model.new_cache(len(TOKENS))
    model.forward(TOKENS[:PREFILL], cache)
    for token in TOKENS[PREFILL:]:
        model.forward([token], cache)
    return trace


def bfloat16(name: str, x: Array) -> Array:
    """Round to bfloat16 and widen again."""
    return widen(narrow(x, "bfloat16"), "bfloat16", x.dtype)


def edited(
    trace: TraceLike,
    edits: Mapping[tuple[str, int], Callable[[Array], Array] | None] | None = None,
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    arrange: Callable[[str, Array], Array] = lambda name, x: x,
    **header: Any,
) -> MemoryTrace:
    """Copy a trace with some tensors changed, removed (None), renamed, or laid out in another way."""
    settings = {"tokens": trace.tokens, "prefill": trace.prefill, "dtype": trace.dtype, "producer": trace.producer,
                "model": trace.model, **header}  # fmt: skip
    copy = MemoryTrace(**settings)
    for entry in trace.taps:
        edit = (edits or {}).get((entry.name, entry.step), lambda x: x)
        name = rename(entry.name)
        if edit is not None and name is not None:
            copy.add(entry.step, name, arrange(entry.name, edit(np.array(trace.read(entry.name, entry.step)))))
    return copy
