"""Speed: of a generation as it runs, and of a model by a fixed measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray

from npllama.engine import Model
from npllama.errors import ContextOverflowError
from npllama.generation.cost import positions_seen, prefill_operations
from npllama.generation.plan import check_count
from npllama.generation.prefill import PREFILL_CHUNK, prefill
from npllama.generation.writer import Step


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
class Limits:
    """What the machine can do at most.

    Attributes
    ----------
    read_bytes_per_s : float
        Memory read by all threads together.
    multiply_add_per_s : float
        Operations of matrix products, two for each multiply-add, if nothing but arithmetic took time: what the unit
        that computes them does in registers, divided by how often it computes each product.
    product_per_s : float
        Operations that the kernel of matrix products reaches on a large square matrix.
    arithmetic : str
        Which unit that is, and in how many parts.
    """

    read_bytes_per_s: float
    multiply_add_per_s: float
    product_per_s: float
    arithmetic: str


#: Those of the limits that are rates.
_RATES = ("read_bytes_per_s", "multiply_add_per_s", "product_per_s")


@dataclass(frozen=True, slots=True)
class Speed:
    """What `bench` measured: medians over rounds, shares of the limits taken round by round.

    Attributes
    ----------
    prefill_tokens, decode_tokens, rounds : int
        How many tokens of a sequence each phase took, and how often.
    batch : int
        Sequences that decoded together. The prefill was one sequence's.
    prefill_tokens_per_s, decode_tokens_per_s : float
        The speeds; that of decoding counts the tokens of all sequences.
    decode_alone_tokens_per_s, batch_gain : float
        The speed of one sequence without the others, and that of all by it.
    prefill_operations_per_s : float
        Operations of the matrix products and of attention, by the prefill's time. See `npllama.generation.cost`.
    bytes_per_token : int
        Bytes of weights that one decoded token reads; sequences that decode together read them once.
    cache_bytes_per_token : int
        Bytes of keys and values that it reads, on average over the decoded tokens; each sequence reads its own.
    decode_bytes_per_s : float
        Both, by the decoding's time: the memory bandwidth in use. Of several sequences that ask different experts it
        counts too little.
    limits : Limits or None
        What the machine could have done meanwhile, where that was measured.
    prefill_share, prefill_share_of_product : float or None
        Operations per second by those of the arithmetic unit, and by those of large products. Attention is counted as
        if it was computed in the same unit.
    decode_share : float or None
        Bytes per second by those of a plain read.
    """

    prefill_tokens: int
    decode_tokens: int
    rounds: int
    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_alone_tokens_per_s: float
    batch_gain: float
    prefill_operations_per_s: float
    bytes_per_token: int
    cache_bytes_per_token: int
    decode_bytes_per_s: float
    limits: Limits | None
    prefill_share: float | None
    prefill_share_of_product: float | None
    decode_share: float | None


def bench(
    model: Model,
    *,
    prompt: int = 512,
    decode: int = 128,
    rounds: int = 3,
    batch: int = 1,
    limits: Callable[[], Limits] | None = None,
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
    rounds : int
        How often.
    batch : int
        Sequences to decode together, one token of each in a pass. They begin with the same prompt. With more than one,
        one of them decodes alone before, in every round.
    limits : callable, optional
        Measures what the machine can do; called in every round, between its phases, since a machine that is shared
        changes by the minute.
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
        Prompt and decoded tokens together exceed the model's context.

    Notes
    -----
    The same passes run once before, shortened to a chunk of the prompt and two decoded tokens: kernels are compiled
    and the mapped weights are in memory when the clock starts.
    """
    for name, value in (("prompt", prompt), ("decode", decode), ("rounds", rounds), ("batch", batch)):
        check_count(name, value)
    length = prompt + decode
    if length > model.config.max_seq_len:
        raise ContextOverflowError(
            f"{prompt} and {decode} tokens do not fit into the model's context of {model.config.max_seq_len}"
        )
    random = np.random.default_rng(0)
    ids: list[int] = random.integers(0, model.config.vocab_size, prompt).tolist()
    decoded = random.integers(0, model.config.vocab_size, (decode, batch))
    report = progress or _ignore
    measure = limits or _unmeasured

    def measured(ids: list[int], decoded: NDArray[np.int64]) -> _Round:
        return _round(model, ids, decoded, measure, clock)

    report("Warming up", 0, rounds * length)
    measured(ids[:PREFILL_CHUNK], decoded[:2])
    found = []
    for done in range(rounds):
        report("Measuring", done * length, rounds * length)
        found.append(measured(ids, decoded))
    report("Measuring", rounds * length, rounds * length)
    return _speed(model, prompt, decode, batch, found)


@dataclass(frozen=True, slots=True)
class _Round:
    """Seconds of the phases, the limits between them, and the bytes that a position takes in the cache."""

    prefill: float
    alone: float
    together: float
    limits: Limits | None
    position_bytes: float


def _round(
    model: Model,
    prompt: list[int],
    decoded: NDArray[np.int64],
    limits: Callable[[], Limits | None],
    clock: Callable[[], float],
) -> _Round:
    """Prefill a prompt, and decode tokens (steps, batch) behind it: those of the first sequence, then all."""
    cache = model.new_cache(len(prompt) + len(decoded))
    begin = clock()
    prefill(model, prompt, cache)
    prefilled = clock() - begin
    measured = limits()
    others = [cache.fork() for _ in range(decoded.shape[1] - 1)]
    begin = clock()
    for tokens in decoded:
        model.forward(tokens[:1], cache, last=True)
    alone = together = clock() - begin
    if others:
        cache.truncate(len(prompt))
        begin = clock()
        for tokens in decoded:
            model.forward_many(tokens[:, None], [cache, *others], last=True)
        together = clock() - begin
    return _Round(prefilled, alone, together, measured, cache.nbytes / cache.capacity)


def _speed(model: Model, prompt: int, decode: int, batch: int, rounds: list[_Round]) -> Speed:
    operations = prefill_operations(model, prompt)
    cache_bytes = rounds[0].position_bytes * positions_seen(model, prompt, decode) / decode
    read = decode * (model.nbytes_per_token + batch * cache_bytes)

    def typical(value: Callable[[_Round], float]) -> float:
        return median(value(entry) for entry in rounds)

    def share(value: Callable[[_Round, Limits], float]) -> float | None:
        shares = [value(entry, entry.limits) for entry in rounds if entry.limits is not None]
        return median(shares) if shares else None

    limits = [entry.limits for entry in rounds if entry.limits is not None]
    return Speed(
        prefill_tokens=prompt,
        decode_tokens=decode,
        rounds=len(rounds),
        batch=batch,
        prefill_tokens_per_s=typical(lambda entry: prompt / entry.prefill),
        decode_tokens_per_s=typical(lambda entry: batch * decode / entry.together),
        decode_alone_tokens_per_s=typical(lambda entry: decode / entry.alone),
        batch_gain=typical(lambda entry: batch * entry.alone / entry.together),
        prefill_operations_per_s=typical(lambda entry: operations / entry.prefill),
        bytes_per_token=model.nbytes_per_token,
        cache_bytes_per_token=round(cache_bytes),
        decode_bytes_per_s=typical(lambda entry: read / entry.together),
        limits=_typical_limits(limits) if limits else None,
        prefill_share=share(lambda entry, limit: operations / entry.prefill / limit.multiply_add_per_s),
        prefill_share_of_product=share(lambda entry, limit: operations / entry.prefill / limit.product_per_s),
        decode_share=share(lambda entry, limit: read / entry.together / limit.read_bytes_per_s),
    )


def _typical_limits(limits: list[Limits]) -> Limits:
    return replace(limits[0], **{name: median(getattr(entry, name) for entry in limits) for name in _RATES})


def _unmeasured() -> None:
    """Stand for limits that nobody measures."""


def _ignore(what: str, done: int, total: int) -> None:
    """Stand for a progress bar that nobody watches."""
