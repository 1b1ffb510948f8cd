"""The forward pass: against transformers, against itself in pieces, and at its edges."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npllama
from npllama import ops
from npllama.cache import KVCache
from npllama.config import ModelConfig, RopeScaling
from npllama.errors import ContextOverflowError, ParameterError
from npllama.kernels.paths import twins
from npllama.rounding import ACTIVATIONS
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tensors, loud_tokens

CONFIGS = {
    "grouped": loud_config(),
    "every head its own keys": loud_config(n_kv_heads=4),
    "one head of keys": loud_config(n_kv_heads=1),
    "tied": loud_config(tied=True),
    "scaled frequencies": loud_config(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
    "heads wider than the model": loud_config(head_dim=32),
    "odd widths": loud_config(dim=52, head_dim=6, hidden_dim=73, vocab_size=101, n_layers=3),
}
ENGINES = [
    pytest.param(backend, dtype, id=f"{backend}-{dtype}")
    for backend in ("numpy", "fast")
    for dtype in ("float32", "bfloat16")
]


def nmse(candidate: Any, truth: Any) -> float:
    """Squared error relative to the truth's energy."""
    error = np.asarray(candidate, np.float64) - truth
    return float((error**2).sum() / (np.asarray(truth, np.float64) ** 2).sum())


@pytest.mark.parametrize(("backend", "dtype"), ENGINES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_float32_engines_agree_with_the_float64_truth(config: ModelConfig, backend: str, dtype: str) -> None:
    tokens = loud_tokens(config)
    truth = loud_model(config, backend="float64", dtype=dtype).forward(tokens)
    assert truth.dtype == np.float64
    logits = loud_model(config, backend=backend, dtype=dtype).forward(tokens)
    assert logits.dtype == np.float32
    assert nmse(logits, truth) < 1e-10


@pytest.mark.torch
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_the_float64_engine_agrees_with_transformers(config: ModelConfig) -> None:
    torch = pytest.importorskip("torch")
    from tests.fixtures.reference import transformers_llama

    tokens = loud_tokens(config)
    with torch.no_grad():
        reference = transformers_llama(config, loud_tensors(config))(torch.from_numpy(tokens)[None]).logits[0].numpy()
    assert nmse(loud_model(config, backend="float64").forward(tokens), reference) < 1e-10


@pytest.mark.parametrize(("backend", "dtype"), ENGINES)
def test_step_by_step_and_chunked_equal_one_shot_at_every_position(backend: str, dtype: str) -> None:
    config = CONFIGS["grouped"]
    model, tokens = loud_model(config, backend=backend, dtype=dtype), loud_tokens(config)
    whole = model.forward(tokens)
    for sizes in ([1] * len(tokens), [7, 1, 30, 2, 24], [63, 1]):
        cache, ends = KVCache(config, len(tokens)), np.cumsum(sizes)
        parts = [model.forward(part, cache) for part in np.split(tokens, ends[:-1])]
        assert cache.length == len(tokens)
        np.testing.assert_allclose(np.concatenate(parts), whole, atol=2e-4 * np.abs(whole).max())
        assert (np.concatenate(parts).argmax(-1) == whole.argmax(-1)).all()


def test_decoding_in_float64_equals_one_shot_to_the_last_digits() -> None:
    config = CONFIGS["scaled frequencies"]
    model, tokens = loud_model(config, backend="float64"), loud_tokens(config)
    cache = KVCache(config, len(tokens))
    steps = np.concatenate([model.forward([token], cache) for token in tokens])
    assert nmse(steps, model.forward(tokens)) < 1e-26


def test_a_truncated_cache_gives_the_same_as_one_that_never_went_further() -> None:
    config = CONFIGS["grouped"]
    model, tokens = loud_model(config), loud_tokens(config)
    cache = KVCache(config, 70)
    model.forward(tokens, cache)
    cache.truncate(10)
    again = model.forward(tokens[10:13], cache)
    np.testing.assert_allclose(again, model.forward(tokens[:13])[10:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_last_gives_only_the_last_row(backend: str) -> None:
    config = CONFIGS["grouped"]
    model, tokens = loud_model(config, backend=backend), loud_tokens(config)
    last = model.forward(tokens, last=True)
    assert last.shape == (1, config.vocab_size)
    np.testing.assert_allclose(last[0], model.forward(tokens)[-1], atol=1e-5)


def test_what_the_activation_was_computed_from_is_gone_when_it_is_multiplied() -> None:
    config = loud_config(n_layers=1)
    model, projected, alive = loud_model(config), [], []

    def linears(x: Any, *others: Any) -> Any:
        found = ops.linears(x, *others)
        projected.extend(weakref.ref(y) for y in found if y.shape[1] == config.hidden_dim)
        return found

    def linear(x: Any, *others: Any) -> Any:
        if x.shape[1] == config.hidden_dim:
            alive.extend(reference() is not None for reference in projected)
        return ops.linear(x, *others)

    model._ops = SimpleNamespace(**{**vars(ops), "linears": linears, "linear": linear})
    model.forward(loud_tokens(config))
    assert alive == [False, False]  # gate and up, the largest arrays of a pass


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_many_tokens_have_the_bits_that_they_have_when_they_are_watched(dtype: str, activations: str) -> None:
    config = loud_config(hidden_dim=200)
    model, tokens = loud_model(config, backend="fast", dtype=dtype), loud_tokens(config, 40)
    model._ops = SimpleNamespace(**{**vars(ops), **twins(None, activations)})
    with npllama.record(model) as seen:
        watched = model.forward(tokens)
    assert {"layers.0.gate", "layers.0.up"} <= set(seen)
    np.testing.assert_array_equal(watched, model.forward(tokens))


def test_the_future_does_not_reach_back() -> None:
    config = CONFIGS["grouped"]
    model, tokens = loud_model(config), loud_tokens(config)
    other = tokens.copy()
    other[-1] = (other[-1] + 1) % config.vocab_size
    np.testing.assert_array_equal(model.forward(tokens)[:-1], model.forward(other)[:-1])


def test_kernels_give_the_same_numbers_with_one_thread_and_two() -> None:
    import numba

    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor")
    config = CONFIGS["grouped"]
    model = loud_model(config, backend="fast", dtype="bfloat16")
    before = numba.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            cache = KVCache(config, 8)
            results.append(np.concatenate([model.forward([token], cache) for token in range(8)]))
    finally:
        numba.set_num_threads(before)
    np.testing.assert_array_equal(*results)


def test_a_failed_forward_leaves_the_cache_as_it_was() -> None:
    config = CONFIGS["grouped"]
    model, cache = loud_model(config), KVCache(config, 4)
    model.forward([1, 2, 3], cache)
    with pytest.raises(ContextOverflowError, match="3 cached and 2 new positions"):
        model.forward([4, 5], cache)
    assert cache.length == 3
    np.testing.assert_allclose(model.forward([4], cache)[0], model.forward([1, 2, 3, 4])[-1], rtol=1e-4, atol=1e-5)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers() -> None:
    model = loud_model(loud_config(max_seq_len=16))
    with pytest.raises(ContextOverflowError, match=r"17 .* 16"):
        model.forward(np.zeros(17, int))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"shape \(0,\)"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([1.0, 2.0], "dtype float64"),
        ([True], "dtype bool"),
        ([0, 256], "token 256 at index 1 is outside the vocabulary of 256"),
        ([3, -1], "token -1 at index 1 is outside"),
    ],
)
def test_tokens_that_no_model_has_are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        loud_model(CONFIGS["grouped"]).forward(tokens)


@pytest.mark.parametrize("name", ["grouped", "tied"])
def test_bytes_per_token_count_each_matrix_once_and_one_embedding_row(name: str) -> None:
    config = CONFIGS[name]
    sizes = {key: array.nbytes for key, array in loud_tensors(config).items()}
    embedding = sizes.pop("tok_embeddings.weight")
    expected = sum(sizes.values()) + config.dim * 4 + (embedding if config.tied else 0)
    assert loud_model(config).nbytes_per_token == expected
