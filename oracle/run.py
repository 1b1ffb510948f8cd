"""Runs of a reference that are recorded into a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from npllama.check.trace import TraceSink
from npllama.config import ModelConfig
from npllama.dtypes import Array
from npllama.errors import ContextOverflowError, ParameterError
from oracle.equations import Tap


class Reference(Protocol):
    """A model in torch that shows its tensors: the oracle itself, or a third opinion."""

    producer: str
    config: ModelConfig
    dtype: str

    def forward(self, tokens: Sequence[int], tap: Tap) -> torch.Tensor:
        """Run new tokens behind those seen before; return logits (T, V). Taps have the shapes of `npllama.taps`."""


def numbers(x: torch.Tensor) -> Array:
    """Return a tensor as a NumPy array; bfloat16 is widened to float32, exactly."""
    array: Array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array


def record(
    reference: Reference, tokens: Sequence[int], sink: TraceSink, *, prefill: int | None = None, greedy: int = 0
) -> None:
    """Run a reference over tokens, the prefill at once and then one token a step, and hand every tap to a sink.

    Parameters
    ----------
    reference : Reference
        One that has seen no tokens yet.
    tokens : sequence of int
        Ids to feed, the prompt's first.
    sink : TraceSink
        A `TraceWriter` or `MemoryTrace` made for these tokens.
    prefill : int, optional
        How many tokens go in at once; by default all.
    greedy : int
        Steps to decode behind the given tokens, each with the most probable one (the lowest id of equals).

    Raises
    ------
    ParameterError
        A token outside the vocabulary, or a prefill that the tokens do not hold.
    ContextOverflowError
        More positions than the model's context.
    """
    given, first = len(tokens), len(tokens) if prefill is None else prefill
    check_run(reference.config, tokens, first, greedy)

    def run(step: int, ids: Sequence[int]) -> int:
        def tap(name: str, x: torch.Tensor) -> torch.Tensor:
            sink.add(step, name, numbers(x))
            return x

        return int(np.argmax(numbers(reference.forward(ids, tap)[-1])))

    best = run(0, tokens[:first])
    for position in range(first, given + greedy):
        if position >= given:
            sink.extend(best)
        best = run(position - first + 1, [tokens[position] if position < given else best])


def check_run(config: ModelConfig, tokens: Sequence[int], prefill: int, greedy: int = 0) -> None:
    """Refuse tokens that a model cannot run; see `record`."""
    if not 1 <= prefill <= len(tokens):
        raise ParameterError(f"a prefill of {prefill} tokens, expected 1 to {len(tokens)}")
    for index, token in enumerate(tokens):
        if not 0 <= token < config.vocab_size:
            raise ParameterError(f"token {token} at index {index} is not an id from 0 to {config.vocab_size - 1}")
    if len(tokens) + greedy > config.max_seq_len:
        raise ContextOverflowError(
            f"{len(tokens)} tokens and {greedy} decode steps exceed the model's context of {config.max_seq_len}",
            remedy="Use a shorter prompt or fewer steps.",
        )
