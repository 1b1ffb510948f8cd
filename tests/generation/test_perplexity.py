"""Perplexity is what its definition says: every token once, from the context that the windows give it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.errors import ContextOverflowError, ParameterError, TokenizerError
from npllama.generation.perplexity import _windows, perplexity
from npllama.generation.sampling import log_probabilities
from tests.generation.fakes import BOS, VOCABULARY, FakeModel, bigram, byte_tokenizer, writes
from tests.generation.test_generate import loud_model

TEXT = "The quick brown fox jumps over the lazy dog, twice: over and over."


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model: Any = FakeModel(lambda tokens: np.zeros(VOCABULARY), tokenizer=byte_tokenizer())
    found = perplexity(model, TEXT)
    assert math.isclose(found.perplexity, VOCABULARY, rel_tol=1e-6)
    assert found.standard_error < 1e-6


@pytest.mark.parametrize("context", [None, 4, 7, 16, 1024])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_sum_is_that_of_the_direct_computation(context: int | None, adds_bos: bool) -> None:
    model, table = bigram(tokenizer=byte_tokenizer(adds_bos=adds_bos))
    ids = [*([BOS] if adds_bos else []), *TEXT.encode()]
    direct = log_probabilities(
        table[ids[:-1]], np.array(ids[1:])
    )  # the context beyond one token is nothing to a bigram
    found = perplexity(model, TEXT, context=context)
    assert found.tokens == len(ids) - 1
    np.testing.assert_allclose(found.logprob_sum, direct.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.perplexity, np.exp(-direct.mean()), rtol=1e-12)
    error = np.exp(-direct.mean()) * direct.std(ddof=1) / np.sqrt(direct.size)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-12)


def test_each_window_stands_alone_and_scores_what_is_new() -> None:
    model = loud_model()
    ids = np.random.default_rng(5).integers(0, model.config.vocab_size, 50).tolist()
    total = 0.0
    for begin, first, end in [(0, 1, 16), (8, 16, 24), (16, 24, 32), (24, 32, 40), (32, 40, 48), (40, 48, 50)]:
        rows = model.forward(ids[begin : end - 1])[first - begin - 1 :]
        total += float(log_probabilities(rows, np.array(ids[first:end])).sum())
    found = perplexity(model, ids, context=16)
    assert (found.tokens, found.windows, found.context) == (49, 6, 16)
    np.testing.assert_allclose(found.logprob_sum, total, rtol=1e-6)


@pytest.mark.torch
def test_the_perplexity_is_the_exponential_of_torchs_cross_entropy() -> None:
    torch = pytest.importorskip("torch")
    model = loud_model()
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, 300).tolist()
    logits = torch.from_numpy(model.forward(ids)[:-1].astype(np.float64))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    np.testing.assert_allclose(perplexity(model, ids).perplexity, float(torch.exp(loss)), rtol=1e-5)


def test_every_window_begins_with_bos_where_the_tokenizer_adds_it() -> None:
    model, _ = bigram()
    perplexity(model, TEXT, context=16)
    text = list(TEXT.encode())
    assert model.calls[0] == [BOS, *text[:14]]
    assert model.calls[1][:2] == [BOS, text[7]]
    assert max(map(len, model.calls)) <= 16


@given(st.integers(0, 300), st.integers(3, 40), st.sampled_from([0, 1]))
def test_windows_score_every_token_once_from_half_a_window_of_context(length: int, size: int, first: int) -> None:
    windows = list(_windows(length, size, first))
    scored = [token for window in windows for token in range(window.scored, window.end)]
    assert scored == list(range(first, length))
    assert all(window.begin <= window.scored < window.end <= window.begin + size for window in windows)
    assert all(window.scored - window.begin >= size // 2 for window in windows[1:])


def test_progress_ends_at_the_whole_text() -> None:
    model, _ = bigram()
    seen: list[Any] = []
    perplexity(model, TEXT, context=16, progress=lambda *what: seen.append(what))
    assert seen[-1] == ("Scoring", len(TEXT), len(TEXT))
    assert len(seen) > 5


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short_to_measure_is_an_error(text: str) -> None:
    with pytest.raises(ParameterError, match=f"the text has {len(text)} tokens: too few"):
        perplexity(writes(""), text)


@pytest.mark.parametrize("context", [3, 0, -1, 8.0, True])
def test_a_context_too_small_is_an_error(context: Any) -> None:
    with pytest.raises(ParameterError, match=r"context is .*, expected an integer of 4 or more"):
        perplexity(writes(""), TEXT, context=context)


def test_a_context_beyond_the_models_is_an_error_with_both_numbers() -> None:
    with pytest.raises(
        ContextOverflowError, match="a window of 65 tokens was asked for, but the model's context is 64"
    ):
        perplexity(writes("", max_seq_len=64), TEXT, context=65)


def test_text_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        perplexity(writes("", tokenizer=None), TEXT)


def test_a_model_that_is_certain_and_wrong_gives_infinity_and_no_crash() -> None:
    model: Any = FakeModel(lambda tokens: np.where(np.arange(VOCABULARY) == 0, 2000.0, 0.0), tokenizer=byte_tokenizer())
    found = perplexity(model, TEXT)
    assert found.perplexity == math.inf
    assert found.logprob_sum == pytest.approx(-2000.0 * len(TEXT))
