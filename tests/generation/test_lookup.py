"""Drafts are what followed before, and change nothing but the number of forward passes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.cache import KVCache
from npllama.config import RopeScaling
from npllama.generation.generate import generate
from npllama.generation.lookup import Lookup
from npllama.generation.writer import Step
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config
from tests.generation.fakes import bigram, byte_tokenizer, writes

#: Frequencies for texts of up to 40 tokens, and very different ones beyond.
LONGROPE = RopeScaling(
    "longrope",
    original_max_seq_len=40,
    short_factors=(1.0, 1.1, 1.0, 1.3, 1.0, 1.6, 2.0, 1.2),
    long_factors=(1.5, 2.0, 3.0, 4.5, 7.0, 9.0, 20.0, 31.0),
    attention_factor=1.19,
)


# --- what is guessed ----------------------------------------------------------------------------------------------


def test_what_followed_the_last_three_tokens_before_is_guessed() -> None:
    assert Lookup([1, 2, 3, 4, 5, 9, 2, 3, 6, 1, 2, 3], 4).draft(9) == [4, 5, 9, 2]


def test_failing_that_the_last_two_or_the_last_one_decide() -> None:
    assert Lookup([1, 2, 3, 4, 9, 2, 3], 2).draft(9) == [4, 9]
    assert Lookup([1, 3, 4, 9, 2, 3], 2).draft(9) == [4, 9]


def test_of_several_places_the_latest_counts() -> None:
    assert Lookup([7, 1, 7, 2, 7, 3, 7], 1).draft(9) == [3]


def test_a_rhythm_goes_on_beyond_the_end_of_the_text() -> None:
    assert Lookup([1, 2, 1, 2], 5).draft(9) == [1, 2, 1, 2, 1]
    assert Lookup([4, 4], 3).draft(9) == [4, 4, 4]


@pytest.mark.parametrize(("text", "size", "limit"), [([], 3, 9), ([1, 2, 3], 3, 9), ([1, 1], 0, 9), ([1, 1], 3, 0)])
def test_where_nothing_can_be_guessed_nothing_is(text: list[int], size: int, limit: int) -> None:
    assert Lookup(text, size).draft(limit) == []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5), st.integers(-1, 8))
def test_a_draft_is_never_longer_than_allowed(text: list[int], size: int, limit: int) -> None:
    assert len(Lookup(text, size).draft(limit)) <= max(0, min(size, limit))


def test_after_wrong_drafts_there_are_ever_longer_pauses_until_one_is_right() -> None:
    lookup = Lookup([0, 1, 0, 0, 1, 1, 0], 4)  # each of the two tokens has been followed: there is always a guess
    places = []
    for place in range(80):
        draft = lookup.draft(9)
        if draft:
            places.append(place)
        lookup.add(1 - draft[0] if draft else 0)
    assert np.diff(places).tolist() == [2, 3, 5, 9, 17, 17, 17]
    draft = []
    while not draft:
        draft = lookup.draft(9)
        lookup.add(draft[0] if draft else 0)
    assert lookup.draft(9)


def test_a_wrong_draft_halves_the_next_and_a_right_one_doubles_it() -> None:
    lookup, lengths = Lookup([0, 1, 0, 0, 1, 1, 0], 8), []
    for is_right in (False, False, False, False, True, True, True, True, False):
        draft: list[int] = []
        while not draft:
            draft = lookup.draft(9)
            lookup.add((draft[0] if is_right else 1 - draft[0]) if draft else 0)
        lengths.append(len(draft))
    assert lengths == [8, 4, 2, 1, 1, 2, 4, 8, 8]


# --- what comes of it ---------------------------------------------------------------------------------------------


def run(model: Any, prompt: Any, **settings: Any) -> list[Step]:
    return list(generate(model, prompt, **settings))


def assert_same(found: list[Step], expected: list[Step]) -> None:
    """Compare steps; log-probabilities to rounding, since products of more rows are summed in another order."""
    assert [replace(step, logprob=0.0) for step in found] == [replace(step, logprob=0.0) for step in expected]
    np.testing.assert_allclose([step.logprob for step in found], [step.logprob for step in expected], atol=1e-9)


@pytest.mark.parametrize("lookup", [1, 4, 16])
@pytest.mark.parametrize("temperature", [0.0, 0.2, 0.7])
def test_drafts_change_no_token_and_no_random_number(lookup: int, temperature: float) -> None:
    drafted = 0
    for seed in range(6):
        model = loud_model(loud_config(vocab_size=24), backend="float64", seed=seed)
        prompt = [*range(8), *range(8)]
        settings = {"max_new_tokens": 40, "temperature": temperature, "top_p": 0.9, "seed": seed}
        found = run(model, prompt, lookup=lookup, **settings)
        assert_same(found, run(model, prompt, **settings))
        drafted += sum(step.drafted for step in found)
    assert drafted > 5


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_drafts_change_no_token_in_float32_either(backend: str) -> None:
    model = loud_model(loud_config(vocab_size=24), backend=backend, dtype="bfloat16")
    found = run(model, [1, 2, 3] * 5, max_new_tokens=40, lookup=8)
    expected = run(model, [1, 2, 3] * 5, max_new_tokens=40)
    assert [step.token for step in found] == [step.token for step in expected]
    assert any(step.drafted for step in found)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_ends_a_text_ends_it_at_the_same_place(seed: int) -> None:
    """A table of few tokens at a low temperature: they come again and again, and any of them can end the text."""
    model, table = bigram(seed, tokenizer=byte_tokenizer(adds_bos=False))
    table[:, [*range(97), *range(105, 256)]] = -np.inf  # a to h, and the special tokens
    settings = {"temperature": 0.5, "seed": seed, "stop": ["ab", "hgf"], "max_new_tokens": 60}
    for prompt in ("abcabc", "habit", "ffff"):
        assert run(model, prompt, lookup=7, **settings) == run(model, prompt, **settings)


def test_a_text_that_repeats_itself_takes_fewer_passes() -> None:
    song = "row, row, row your boat. " * 4
    model = writes(song, after=len(song) + 1)
    steps = run(model, song, lookup=8)
    assert "".join(step.text for step in steps) == song
    assert len(model.calls) < len(song) / 5
    assert sum(step.drafted for step in steps) == len(steps) - len(model.calls)


def test_without_lookup_every_token_has_a_pass_of_its_own() -> None:
    model = writes("aaaaaaaa", after=4)
    steps = run(model, "aaa")
    assert [len(call) for call in model.calls] == [4, *[1] * 8]
    assert not any(step.drafted for step in steps)


@pytest.mark.parametrize("room", [20, 21, 25, 33])
def test_drafts_stay_within_the_tokens_and_the_context(room: int) -> None:
    model = writes("a" * 100, after=16, max_seq_len=room)
    steps = run(model, "a" * 15, lookup=8)
    assert len(steps) == room - 16 + 1
    assert steps[-1].finish_reason == "length"
    assert sum(map(len, model.calls)) <= room


def test_after_any_step_the_cache_holds_all_tokens_but_the_last() -> None:
    model = loud_model(loud_config(vocab_size=24), backend="float64")
    prompt = [1, 2, 3] * 5
    cache = KVCache(model.config, 100)
    text = list(prompt)
    drafted = 0
    for step in generate(model, prompt, cache=cache, max_new_tokens=40, lookup=6):
        assert cache.tokens.tolist() == text
        text.append(step.token)
        drafted += step.drafted
    assert drafted > 5


def test_closing_amid_drafts_leaves_a_cache_to_go_on_from() -> None:
    model = loud_model(loud_config(vocab_size=24), backend="float64")
    prompt = [1, 2, 3] * 5
    whole = run(model, prompt, max_new_tokens=40, lookup=6)
    places = [step.index for step in whole if step.drafted]
    for place in (places[0], places[len(places) // 2], places[-1]):
        cache = KVCache(model.config, 100)
        with closing(generate(model, prompt, cache=cache, max_new_tokens=40, lookup=6)) as steps:
            first = [next(steps).token for _ in range(place + 1)]
        rest = run(model, first[-1:], cache=cache, max_new_tokens=40 - len(first), lookup=6)
        assert first + [step.token for step in rest] == [step.token for step in whole]


def test_what_came_before_the_prompt_is_looked_up_too() -> None:
    model = writes("cdef", after=9)
    cache = KVCache(model.config, 100)
    model.forward([*b"abcdefg"], cache)
    steps = run(model, "ab", cache=cache, lookup=8)
    assert "".join(step.text for step in steps) == "cdef"
    assert model.calls[1:] == [[*b"ab"], [*b"cdefgabcd"]]


@pytest.mark.parametrize("length", [28, 36, 38, 39, 40, 41])
def test_a_longrope_text_outgrows_its_context_at_the_same_token(length: int) -> None:
    config = loud_config(family="phi3", vocab_size=24, rope_scaling=LONGROPE)
    drafted = 0
    for seed in range(4):
        model = loud_model(config, backend="float64", seed=seed)
        prompt = [*range(4)] * 11
        found = run(model, prompt[:length], max_new_tokens=30, lookup=9)
        assert_same(found, run(model, prompt[:length], max_new_tokens=30))
        drafted += sum(step.drafted for step in found)
    assert drafted > 10
