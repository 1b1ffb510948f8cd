"""Runs of right and wrong engines, and what a mistake of the dictionary should look like in them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from npllama.check.mistakes import DICTIONARY, Mistake, Way
from npllama.check.rerun import Rerun
from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace, TraceLike
from npllama.check.trace_format import forward_rank
from npllama.config import ModelConfig, RopeScaling
from npllama.engine import Model
from tests.check.family_models import MODELS
from tests.check.planted import PLANTED
from tests.check.wrong_engine import WrongModel, build
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import LOUD_TOKENS, loud_config, loud_tokens

DECODED = 3

#: Every way of every mistake is one in at least one of these; the earlier ones are cheaper.
CONFIGS = (
    loud_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
    loud_config(n_kv_heads=4, norm_eps=1e-6, rope_theta=10_000.0),
    loud_config(n_layers=12, dim=32, n_heads=2, n_kv_heads=1, hidden_dim=48, vocab_size=64),
    *MODELS.values(),
)

WAYS = [(mistake, way) for mistake in DICTIONARY for way in mistake.ways]


def label(value: Mistake | Way) -> str:
    """Name a parameter for pytest."""
    return value.name if isinstance(value, Mistake) else value.label or "-"


def tokens_of(config: ModelConfig, seed: int = 0) -> tuple[int, ...]:
    """Return the prompt's tokens and those of the decode steps."""
    return tuple(int(token) for token in loud_tokens(config, LOUD_TOKENS + DECODED, seed))


@cache
def truth_model(config: ModelConfig, dtype: str, seed: int = 0) -> Model:
    """Return the model as it should be, in float64."""
    return loud_model(config, backend="float64", dtype=dtype, seed=seed)


@cache
def traces(config: ModelConfig, dtype: str, rounds_to: str = "float32") -> tuple[TraceLike, TraceLike]:
    """Return the float64 truth, and a reference in the candidate's dtype."""
    truth = run_trace(truth_model(config, dtype), tokens_of(config), prefill=LOUD_TOKENS)
    return truth, candidate([], config, dtype=dtype, rounds_to=rounds_to)


def config_for(way: Way, dtype: str) -> ModelConfig:
    """Return the first configuration in which a way is a mistake; StopIteration if there is none."""
    return next(config for config in CONFIGS if way.plant(right_run(config, dtype)) is not None)


def right_run(config: ModelConfig, dtype: str) -> Rerun:
    """Return the clean run of the tokens."""
    return Rerun.of(truth_model(config, dtype), tokens_of(config), LOUD_TOKENS)


def record(model: WrongModel, config: ModelConfig, rounds_to: str = "float32", seed: int = 0) -> TraceLike:
    """Run an engine over the tokens, and say that they were a run of the right model."""
    tokens = tokens_of(config, seed)
    trace = MemoryTrace(tokens=tokens, prefill=LOUD_TOKENS, dtype=rounds_to, config=config)
    engine = model if rounds_to in ("float32", "int8") else model.rounding(rounds_to)
    return run_trace(engine, tokens, prefill=LOUD_TOKENS, into=trace)


def candidate(
    mistakes: Sequence[tuple[str, str]],
    config: ModelConfig,
    *,
    backend: str = "numpy",
    dtype: str = "float32",
    rounds_to: str = "float32",
    seed: int = 0,
) -> TraceLike:
    """Record an engine with planted mistakes."""
    engine = wrong_model(mistakes, config, backend=backend, dtype=dtype, rounds_to=rounds_to, seed=seed)
    return record(engine, config, rounds_to, seed)


def wrong_model(
    mistakes: Sequence[tuple[str, str]],
    config: ModelConfig,
    *,
    backend: str = "numpy",
    dtype: str = "float32",
    rounds_to: str = "float32",
    seed: int = 0,
) -> WrongModel:
    """Return an engine with planted mistakes. In "int8" it rounds the inputs of its products."""
    activations = rounds_to if rounds_to == "int8" else "float32"
    parts = build(config, backend=backend, dtype=dtype, activations=activations, seed=seed)
    for mistake in mistakes:
        parts = PLANTED[mistake](parts)
    return parts.model()


def visible(way: Way, trace: TraceLike, reference: TraceLike) -> tuple[str, int]:
    """Return the first tap that two traces have, and its step, at or after the one at which a mistake shows."""
    right = {(entry.name, entry.step) for entry in reference.taps}
    names = [entry.name for entry in trace.taps if entry.step == way.step and (entry.name, entry.step) in right]
    return next(name for name in names if forward_rank(name) >= forward_rank(way.first)), way.step
