"""A prompt in chunks is what it is in one piece, for models with two sets of RoPE frequencies as well."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.cache import KVCache
from npllama.generation.perplexity import perplexity
from npllama.generation.prefill import prefill, reach
from npllama.generation.sampling import log_probabilities
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens
from tests.generation.test_lookup import LONGROPE

CONFIG = loud_config(family="phi3", rope_scaling=LONGROPE)


@pytest.mark.parametrize("backend", ["numpy", "float64"])
@pytest.mark.parametrize("length", [39, 40, 41, 80])
@pytest.mark.parametrize("chunk", [1, 16, 40, 64])
def test_a_longrope_prompt_in_chunks_is_what_it_is_in_one_piece(backend: str, length: int, chunk: int) -> None:
    model = loud_model(CONFIG, backend=backend)
    prompt = loud_tokens(CONFIG, length).tolist()
    cache = KVCache(CONFIG, 100)
    computed = []
    run = model._run
    model._run = lambda ids, *more: computed.append(len(ids)) or run(ids, *more)  # type: ignore[func-returns-value,method-assign]
    found = prefill(model, prompt, cache, chunk)
    assert sum(computed) == length  # nothing is computed twice
    np.testing.assert_allclose(found, model.forward(prompt)[-1:], atol=1e-4)


@pytest.mark.parametrize("cached", [1, 20, 39])
def test_a_longrope_prompt_behind_a_short_text_makes_it_a_long_one(cached: int) -> None:
    model = loud_model(CONFIG, backend="float64")
    text = loud_tokens(CONFIG, 70).tolist()
    cache = KVCache(CONFIG, 100)
    prefill(model, text[:cached], cache)
    np.testing.assert_allclose(prefill(model, text[cached:], cache, 8), model.forward(text)[-1:], atol=1e-9)


@pytest.mark.parametrize("length", [30, 41, 42, 90])
def test_the_perplexity_of_a_longrope_model_is_that_of_whole_windows(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npllama.generation.perplexity._CHUNK", 16)
    model = loud_model(CONFIG, backend="float64")
    text = loud_tokens(CONFIG, length)
    expected = log_probabilities(model.forward(text[:-1]), text[1:]).sum()
    assert perplexity(model, text.tolist(), context=length).logprob_sum == pytest.approx(expected, abs=1e-8)


def test_later_windows_of_a_longrope_text_are_read_as_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npllama.generation.perplexity._CHUNK", 16)
    model = loud_model(CONFIG, backend="float64")
    text = loud_tokens(CONFIG, 90)
    expected = log_probabilities(model.forward(text[:59]), text[1:60]).sum()
    expected += log_probabilities(model.forward(text[30:89])[29:], text[60:90]).sum()
    assert perplexity(model, text.tolist(), context=60).logprob_sum == pytest.approx(expected, abs=1e-8)


def test_only_a_longrope_model_has_a_limit_below_its_context() -> None:
    assert reach(loud_model(loud_config(max_seq_len=100)), 5) == 100
    model = loud_model(CONFIG)
    assert [reach(model, length) for length in (0, 39, 40)] == [40, 40, 40]
    assert reach(model, 41) == CONFIG.max_seq_len
