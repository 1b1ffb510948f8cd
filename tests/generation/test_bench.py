"""What is timed is the model's work and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from npllama.config import Experts
from npllama.errors import ContextOverflowError, ParameterError
from npllama.generation.bench import Limits, Timed, bench
from npllama.generation.cost import positions_seen, prefill_operations
from npllama.generation.generate import Step
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config
from tests.generation.fakes import bigram


def ticking(model: Any, seconds: Callable[[int], float]) -> tuple[Any, Callable[[], float]]:
    """Return a model whose forward pass of n tokens takes seconds(n) on the clock that comes with it."""
    now = 0.0
    forward = model.forward

    def slow(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        nonlocal now
        now += seconds(len(tokens))
        return forward(tokens, cache, last=last)

    def slow_together(sequences: Any, caches: Any, *, last: bool = False) -> Any:
        nonlocal now
        now += seconds(len(sequences))
        return [forward(tokens, cache, last=last) for tokens, cache in zip(sequences, caches, strict=True)]

    model.forward, model.forward_many = slow, slow_together
    return model, lambda: now


def by_length(count: int) -> float:
    """Return how long a pass takes: half a second for one token, a millisecond each for more."""
    return 0.5 if count == 1 else count / 1000


def test_the_speeds_are_tokens_by_the_time_of_their_phase() -> None:
    model, clock = ticking(bigram()[0], by_length)
    speed = bench(model, prompt=200, decode=4, clock=clock)
    assert speed.prefill_tokens_per_s == pytest.approx(1000)
    assert speed.decode_tokens_per_s == pytest.approx(2)
    assert (speed.prefill_tokens, speed.decode_tokens, speed.rounds, speed.bytes_per_token) == (200, 4, 3, 1000)
    assert speed.decode_bytes_per_s == pytest.approx(2000)
    assert speed.prefill_operations_per_s == pytest.approx(prefill_operations(model, 200) * 5)
    assert (speed.limits, speed.prefill_share, speed.decode_share) == (None, None, None)


def test_the_same_passes_run_once_before_the_clock_starts_and_then_once_a_round() -> None:
    model, clock = ticking(bigram()[0], lambda count: 1.0)
    bench(model, prompt=600, decode=3, rounds=2, clock=clock)
    assert [len(call) for call in model.calls] == [512, 1, 1, *[512, 88, 1, 1, 1] * 2]


def test_of_several_rounds_the_median_counts() -> None:
    now = iter([0, 0, 0, 0, 0, 10, 10, 12, 20, 21, 21, 25, 30, 35, 35, 36])  # four times prefill and decode: from, to
    speed = bench(bigram()[0], prompt=10, decode=4, clock=lambda: float(next(now)))
    assert speed.prefill_tokens_per_s == 2  # of 1, 10 and 2
    assert speed.decode_tokens_per_s == 2  # of 2, 1 and 4


def test_a_share_is_taken_of_what_the_machine_did_in_the_same_round() -> None:
    model, clock = ticking(bigram()[0], by_length)
    rates = iter([1.0, 4000.0, 8000.0, 20000.0])  # the first belongs to the warm-up

    def limits() -> Limits:
        rate = next(rates)
        return Limits(
            read_bytes_per_s=rate, multiply_add_per_s=1e6 * rate, product_per_s=5e5 * rate, arithmetic="tubes"
        )

    speed = bench(model, prompt=200, decode=4, limits=limits, clock=clock)
    assert speed.limits == Limits(8000.0, 8e9, 4e9, "tubes")
    assert speed.decode_share == pytest.approx(2000 / 8000)
    assert speed.prefill_share == pytest.approx(prefill_operations(model, 200) * 5 / 8e9)
    assert speed.prefill_share_of_product == pytest.approx(2 * speed.prefill_share)


def test_the_cache_that_a_token_reads_is_counted() -> None:
    model = loud_model(loud_config(n_layers=3, n_kv_heads=2, head_dim=16))
    speed = bench(model, prompt=8, decode=5, rounds=1)
    positions = (9 + 10 + 11 + 12 + 13) / 5
    assert speed.cache_bytes_per_token == positions * 3 * 2 * 2 * 16 * 4  # layers, keys and values, K, Dh, bytes
    assert speed.bytes_per_token == model.nbytes_per_token
    read = speed.bytes_per_token + speed.cache_bytes_per_token
    assert speed.decode_bytes_per_s == pytest.approx(read * speed.decode_tokens_per_s)


def test_the_operations_of_a_prefill_are_those_of_its_products() -> None:
    d, h, k, dh, f, v, layers = 64, 4, 2, 16, 192, 256, 3
    config = loud_config(
        dim=d, n_heads=h, n_kv_heads=k, head_dim=dh, hidden_dim=f, vocab_size=v, n_layers=layers, tied=True
    )
    products = 0
    for t in range(5):
        per_layer = d * h * dh + 2 * d * k * dh + h * dh * d + 3 * d * f + 2 * (t + 1) * h * dh
        products += layers * per_layer
    assert prefill_operations(loud_model(config), 5) == 2 * (products + d * v)


def test_a_layer_with_a_window_sees_no_more_positions_than_that() -> None:
    model, _ = bigram()
    model.config = loud_config(n_layers=2, windows=(0, 3))
    assert positions_seen(model, 1, 4) == ((2 + 3 + 4 + 5) + (2 + 3 + 3 + 3)) / 2


def test_of_experts_those_are_counted_that_are_asked() -> None:
    model, _ = bigram()
    experts = Experts(count=8, active=2, hidden_dim=96, shared_dim=32, dense_layers=(0,))
    model.config = loud_config(n_layers=2, hidden_dim=192)
    dense = prefill_operations(model, 4)
    model.config = loud_config(n_layers=2, hidden_dim=192, experts=experts)
    assert dense - prefill_operations(model, 4) == -(2 * 4 * 3 * 64 * (2 * 96 + 32 - 192))


def test_sequences_that_decode_together_are_counted_together_and_one_of_them_alone_before() -> None:
    model, clock = ticking(bigram()[0], lambda count: {1: 0.5, 8: 1.0}.get(count, 0.1))
    speed = bench(model, prompt=200, decode=4, batch=8, clock=clock)
    assert (speed.batch, speed.decode_tokens) == (8, 4)
    assert speed.decode_alone_tokens_per_s == pytest.approx(2)
    assert speed.decode_tokens_per_s == pytest.approx(8)
    assert speed.batch_gain == pytest.approx(4)
    assert speed.decode_bytes_per_s == pytest.approx(1000)  # of weights, once in a second for all


def test_one_sequence_alone_is_not_decoded_twice() -> None:
    model, clock = ticking(bigram()[0], by_length)
    speed = bench(model, prompt=200, decode=4, clock=clock)
    assert (speed.batch, speed.batch_gain) == (1, 1)
    assert speed.decode_alone_tokens_per_s == speed.decode_tokens_per_s


def test_every_sequence_of_a_batch_has_its_own_tokens_behind_the_same_prompt() -> None:
    model = loud_model(loud_config(n_layers=2, n_kv_heads=2, head_dim=16))
    passes: list[tuple[list[int], list[list[int]]]] = []
    forward_many = model.forward_many

    def watched(sequences: Any, caches: Any, *, last: bool = False) -> Any:
        seen = [cache.tokens.tolist() for cache in caches]
        passes.append(([cache.length for cache in caches], seen))
        return forward_many(sequences, caches, last=last)

    model.forward_many = watched  # type: ignore[method-assign]
    speed = bench(model, prompt=8, decode=3, rounds=1, batch=4)
    lengths = [length for length, _ in passes]
    assert lengths == [[8] * 4, [9] * 4, [8] * 4, [9] * 4, [10] * 4]  # two steps to warm up, and three
    assert len({tuple(tokens) for tokens in passes[2][1]}) == 1
    assert len({tuple(tokens) for tokens in passes[4][1]}) == 4
    positions = (9 + 10 + 11) / 3
    assert speed.cache_bytes_per_token == positions * 2 * 2 * 2 * 16 * 4  # of one sequence
    read = speed.bytes_per_token + 4 * speed.cache_bytes_per_token
    assert speed.decode_bytes_per_s == pytest.approx(read * speed.decode_tokens_per_s / 4)


def test_a_cache_of_half_the_size_is_read_in_half_the_bytes() -> None:
    whole, half = (
        bench(loud_model(loud_config(n_layers=2), cache_dtype=dtype), prompt=8, decode=2, rounds=1)
        for dtype in ("float32", "bfloat16")
    )
    assert whole.cache_bytes_per_token == 2 * half.cache_bytes_per_token


@pytest.mark.parametrize("name", ["prompt", "decode", "rounds", "batch"])
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
