"""What is timed is the model's work and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from npllama.errors import ContextOverflowError, ParameterError
from npllama.generation.bench import Timed, bench
from npllama.generation.generate import Step
from tests.generation.fakes import bigram


def ticking(model: Any, seconds: Callable[[int], float]) -> tuple[Any, Callable[[], float]]:
    """Return a model whose forward pass of n tokens takes seconds(n) on the clock that comes with it."""
    now = 0.0
    forward = model.forward

    def slow(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        nonlocal now
        now += seconds(len(tokens))
        return forward(tokens, cache, last=last)

    model.forward = slow
    return model, lambda: now


def test_the_speeds_are_tokens_by_the_time_of_their_phase() -> None:
    model, clock = ticking(bigram()[0], lambda count: 0.5 if count == 1 else count / 1000)
    speed = bench(model, prompt=200, decode=4, clock=clock)
    assert speed.prefill_tokens_per_s == pytest.approx(1000)
    assert speed.decode_tokens_per_s == pytest.approx(2)
    assert (speed.prefill_tokens, speed.decode_tokens, speed.bytes_per_token) == (200, 4, 1000)


def test_the_same_passes_run_once_before_the_clock_starts() -> None:
    model, clock = ticking(bigram()[0], lambda count: 1.0)
    bench(model, prompt=600, decode=3, clock=clock)
    assert [len(call) for call in model.calls] == [512, 1, 1, 512, 88, 1, 1, 1]


@pytest.mark.parametrize("name", ["prompt", "decode"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_count_below_one_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"{name} is {value!r}"):
        bench(bigram()[0], **{name: value})


def test_more_tokens_than_the_context_is_an_error_with_all_numbers() -> None:
    with pytest.raises(ContextOverflowError, match="100 and 29 tokens do not fit into the model's context of 128"):
        bench(bigram(max_seq_len=128)[0], prompt=100, decode=29)


def test_what_the_reader_of_the_steps_does_is_not_timed() -> None:
    now = 0.0

    def steps() -> Iterator[Step]:
        nonlocal now
        for index, seconds in enumerate([3.0, 1.0, 1.0]):
            now += seconds
            yield Step(index, 1, "", 0.0)

    timed = Timed(steps(), 30, clock=lambda: now)
    for _ in timed:
        now += 100.0
    assert (timed.tokens, timed.prefill_seconds, timed.decode_seconds) == (3, 3.0, 2.0)
    assert (timed.prefill_tokens_per_s, timed.decode_tokens_per_s) == (10.0, 1.0)


def test_a_speed_that_was_not_measured_is_none() -> None:
    timed = Timed(iter([Step(0, 1, "", 0.0)]), 30)
    assert timed.prefill_tokens_per_s is None
    next(timed)
    assert timed.decode_tokens_per_s is None
