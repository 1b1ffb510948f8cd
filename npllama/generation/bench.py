"""Speed: of a generation as it runs, and of a model by a fixed measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from npllama.cache import KVCache
from npllama.errors import ContextOverflowError, ParameterError
from npllama.generation.generate import PREFILL_CHUNK, Step, prefill
from npllama.generation.sampling import is_integer
from npllama.model import Model


class Timed:
    """Iterate over the steps of a generation and measure how long the model takes for them, and nothing else.

    Parameters
    ----------
    steps : iterator of Step
        What `generate` returned.
    prompt_tokens : int
        How many tokens the prompt has that this generation feeds to the model.
    clock : callable
        Returns seconds.

    Attributes
    ----------
    tokens : int
        Steps so far.
    prefill_seconds : float
        Until the first step.
    decode_seconds : float
        Between the first step and the last one.
    """

    def __init__(
        self, steps: Iterator[Step], prompt_tokens: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._steps = steps
        self._prompt_tokens = prompt_tokens
        self._clock = clock

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        begin = self._clock()
        step = next(self._steps)
        seconds = self._clock() - begin
        if self.tokens == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_seconds += seconds
        self.tokens += 1
        return step

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second; None before the first step."""
        return _rate(self._prompt_tokens if self.tokens else 0, self.prefill_seconds)

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Generated tokens per second, those after the first; None before the second step."""
        return _rate(self.tokens - 1, self.decode_seconds)


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Speed:
    """What `bench` measured.

    Attributes
    ----------
    prefill_tokens, decode_tokens : int
        How many tokens each phase took.
    prefill_tokens_per_s, decode_tokens_per_s : float
        The speeds.
    bytes_per_token : int
        Bytes of weights that one decoded token reads. Times the decode speed: the memory bandwidth in use.
    """

    prefill_tokens: int
    decode_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bytes_per_token: int


def bench(
    model: Model,
    *,
    prompt: int = 512,
    decode: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Measure prefill and decode.

    Parameters
    ----------
    model : Model
        A loaded model.
    prompt : int
        Random tokens to prefill.
    decode : int
        Tokens to decode behind them, one forward pass each (random ones: what a token costs is not what it says).
    progress : callable, optional
        ``progress(what, done, total)`` in tokens, between the measured stretches only.
    clock : callable
        Returns seconds.

    Returns
    -------
    Speed
        The figures.

    Raises
    ------
    ParameterError
        A count is below 1.
    ContextOverflowError
        Both together exceed the model's context.

    Notes
    -----
    The same passes run once before, shortened to a chunk of the prompt and two decoded tokens: kernels are compiled
    and the mapped weights are in memory when the clock starts.
    """
    for name, value in (("prompt", prompt), ("decode", decode)):
        if not is_integer(value) or value < 1:
            raise ParameterError(f"{name} is {value!r}, expected an integer of 1 or more")
    if prompt + decode > model.config.max_seq_len:
        raise ContextOverflowError(
            f"{prompt} and {decode} tokens do not fit into the model's context of {model.config.max_seq_len}"
        )
    ids = [int(token) for token in np.random.default_rng(0).integers(0, model.config.vocab_size, prompt + decode)]
    report = progress or _ignore
    warm = min(prompt, PREFILL_CHUNK)
    report("Warming up", 0, prompt + decode)
    _measure(model, ids[:warm], ids[prompt : prompt + 2], clock)
    report("Measuring", 0, prompt + decode)
    prefill_seconds, decode_seconds = _measure(model, ids[:prompt], ids[prompt:], clock)
    report("Measuring", prompt + decode, prompt + decode)
    return Speed(
        prefill_tokens=prompt,
        decode_tokens=decode,
        prefill_tokens_per_s=prompt / prefill_seconds,
        decode_tokens_per_s=decode / decode_seconds,
        bytes_per_token=model.nbytes_per_token,
    )


def _measure(model: Model, prompt: list[int], decoded: list[int], clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the prefill and of the decoding behind it."""
    cache = KVCache(model.config, len(prompt) + len(decoded))
    begin = clock()
    prefill(model, prompt, cache)
    middle = clock()
    for token in decoded:
        model.forward([token], cache, last=True)
    return middle - begin, clock() - middle


def _ignore(what: str, done: int, total: int) -> None:
    """Stand for a progress bar that nobody watches."""
