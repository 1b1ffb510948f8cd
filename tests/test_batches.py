"""Several sequences in one forward pass: each gets what it would get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import npllama
from npllama.cache import KVCache
from npllama.errors import ContextOverflowError, ParameterError
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens

MODELS = {
    "llama": {},
    "windows": {"windows": (5, 0)},
    "learned positions": {"positions": "learned", "max_seq_len": 100, "norm": "layer", "gated": False},
}


def fed(model: Any, lengths: list[int]) -> tuple[list[KVCache], list[Any]]:
    """Return a cache for each sequence, holding a prompt of the given length, and the prompts."""
    caches, prompts = [], []
    for seed, length in enumerate(lengths):
        cache, prompt = model.new_cache(80), loud_tokens(model.config, length, seed)
        model.forward(prompt, cache)
        caches.append(cache)
        prompts.append(prompt)
    return caches, prompts


@pytest.mark.parametrize("backend", ["numpy", "fast", "float64"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_sequences_together_get_the_logits_that_each_gets_alone(backend: str, changes: dict[str, Any]) -> None:
    model = loud_model(loud_config(**changes), backend=backend)
    together, _ = fed(model, [3, 17, 40])
    alone, _ = fed(model, [3, 17, 40])
    new = [[5], [7, 9, 11], [1, 2]]
    several = model.forward_many(new, together)
    for tokens, cache, twin, logits in zip(new, alone, together, several, strict=True):
        single = model.forward(tokens, cache)
        assert logits.shape == single.shape
        np.testing.assert_allclose(logits, single, rtol=0, atol=1e-4 * np.abs(single).max())
        assert twin.length == cache.length
        np.testing.assert_array_equal(twin.tokens, cache.tokens)


def test_last_gives_one_row_for_each_sequence() -> None:
    model = loud_model(loud_config())
    caches, _ = fed(model, [4, 9])
    whole = model.forward_many([[1, 2, 3], [4]], [cache.fork() for cache in caches])
    last = model.forward_many([[1, 2, 3], [4]], caches, last=True)
    assert [rows.shape for rows in last] == [(1, 256), (1, 256)]
    for rows, every in zip(last, whole, strict=True):
        np.testing.assert_allclose(rows, every[-1:], rtol=0, atol=1e-5 * np.abs(every[-1]).max())  # sums, not results


def test_a_cache_that_is_full_stops_the_whole_call_and_changes_none() -> None:
    model = loud_model(loud_config())
    caches, _ = fed(model, [4, 80])
    with pytest.raises(ContextOverflowError):
        model.forward_many([[1], [2]], caches)
    assert [cache.length for cache in caches] == [4, 80]


def test_what_makes_no_batch_is_refused() -> None:
    model = loud_model(loud_config())
    cache = model.new_cache(8)
    for sequences, caches in (([], []), ([[1]], []), ([[1], [2]], [cache, cache])):
        with pytest.raises(ParameterError):
            model.forward_many(sequences, caches)
    with npllama.record(model), pytest.raises(ParameterError, match="record"):
        model.forward_many([[1]], [cache])
