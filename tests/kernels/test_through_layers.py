"""All layers at once: the same bits as layer by layer, for the models that it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest

import npllama
from npllama import ops
from npllama.cache import KVCache, Lanes
from npllama.checkpoint.quantize import quantize
from npllama.checkpoint.rope import frequencies
from npllama.config import Experts
from npllama.dtypes import PACKINGS, Array, Tensor, narrow
from npllama.engine import Model
from npllama.kernels import byte_rows, vector_rows
from npllama.kernels.features import PATHS, choose, host_features
from npllama.kernels.paths import twins
from npllama.kernels.through_layers import through_layers, through_layers_by
from npllama.weights import gather_weights
from tests.fixtures.engine import FAST, loud_model
from tests.fixtures.loud import loud_config, loud_tensors, loud_tokens
from tests.fixtures.references import left_by

PATH = choose(host_features())
needs_vectors = pytest.mark.skipif(PATH == "portable", reason="this processor has no AVX2")
#: Tokens that bfloat16 weights meet in one pass.
MOST = 16 if PATH == "amx" else vector_rows.FEW

LAYER_BY_LAYER = SimpleNamespace(**{**vars(FAST), "through_layers": ops.through_layers})

#: Of odd widths a matrix is no whole number of blocks, and a row no whole number of steps.
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "odd widths": {"dim": 72, "n_heads": 9, "n_kv_heads": 3, "head_dim": 22, "hidden_dim": 200},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "ffn_bias": True},
    "normed queries and keys": {"qk_norm": "head"},
    "windows": {"windows": (40, 0)},
    "another activation and scale": {"activation": "gelu_tanh", "score_dim": 9},
    "one key/value head": {"n_heads": 24, "n_kv_heads": 1, "head_dim": 32},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "norms behind": {"norm_order": "output"},
    "another norm": {"norm": "layer"},
    "learned positions": {"positions": "learned"},
    "no gate": {"gated": False},
    "norms of whole projections": {"qk_norm": "projection"},
    "experts": {"experts": Experts(count=4, active=2, hidden_dim=64)},
    "narrow matrices": {"n_kv_heads": 1},
    **({"wide rows": {"dim": 2048, "n_layers": 1, "vocab_size": 8}} if PATH == "amx" else {}),
}
#: Storage types of a layer's matrices, in turn.
STORED: dict[str, tuple[str, ...]] = {
    "int8": ("int8",),
    "int4": ("int4",),
    "mixed": ("int8", "bfloat16", "int4", "int4", "bfloat16"),
}


@pytest.fixture(autouse=True)
def any_threads() -> Iterator[None]:
    """Give the threads back."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


def pair(dtype: str = "bfloat16", **changes: Any) -> tuple[Model, Model]:
    """Return a loud model that runs its layers at once, and the same one that goes layer by layer."""
    model = loud_model(loud_config(**changes), backend="fast", dtype=dtype)
    return model, Model(model.config, model.weights, LAYER_BY_LAYER, backend="fast")


def quantised_pair(dtypes: tuple[str, ...], **changes: Any) -> tuple[Model, Model]:
    """Return what `pair` does, the matrices stored as the dtypes say, one after another."""
    config, turn = loud_config(**changes), cycle(dtypes)

    def stored(array: Array) -> Tensor:
        if array.ndim == 1:
            return Tensor(array, "float32")
        dtype = next(turn)
        if dtype not in PACKINGS:
            return Tensor(narrow(array, dtype), dtype)
        data, scales, *minima = quantize(array, dtype)
        return Tensor(data, dtype, scales, minima[0] if minima else None, array.shape[1])

    tensors = {name: stored(array) for name, array in loud_tensors(config, 0).items()}
    if config.tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    weights = gather_weights(config, tensors.get, *frequencies(config))
    return Model(config, weights, FAST, backend="fast"), Model(config, weights, LAYER_BY_LAYER, backend="fast")


def fed(model: Model, length: int, capacity: int = 700, dtype: str = "float32") -> KVCache:
    """Return a cache that holds a prompt of the given length."""
    cache = KVCache(model.config, capacity, dtype)
    model.forward(loud_tokens(model.config, length), cache, last=True)
    return cache


def assert_same_bits(a: Any, b: Any) -> None:
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def assert_threads_change_nothing(run: Callable[[], Array]) -> None:
    results = []
    for n_threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(n_threads)
        results += [run() for _ in range(20)]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@needs_vectors
@pytest.mark.parametrize("changes", KNOWN.values(), ids=KNOWN)
def test_the_bits_are_those_of_going_layer_by_layer(changes: dict[str, Any]) -> None:
    at_once, by_layer = pair(**changes)
    assert through_layers(at_once.weights, at_once.config) is not None
    cache = fed(by_layer, 510)
    twin = cache.fork()
    for count in (1, 5, 2, 3, 8, MOST, 1, 5):  # across 512 keys, where attention is divided
        new = loud_tokens(at_once.config, count, seed=count)
        logits = at_once.forward(new, twin)
        assert np.isfinite(logits).all()
        assert_same_bits(logits, by_layer.forward(new, cache))
    assert_same_bits(twin.room()[:, :, :, : twin.length], cache.room()[:, :, :, : cache.length])


@needs_vectors
@pytest.mark.parametrize("dtypes", STORED.values(), ids=STORED)
@pytest.mark.parametrize("name", ["llama", "odd widths", "biases"])
def test_the_bits_of_integers_are_those_of_going_layer_by_layer(name: str, dtypes: tuple[str, ...]) -> None:
    at_once, by_layer = quantised_pair(dtypes, **KNOWN[name])
    assert through_layers(at_once.weights, at_once.config) is not None
    cache = fed(by_layer, 510)
    twin = cache.fork()
    for token in (3, 1, 4, 1, 5):
        logits = at_once.forward([token], twin)
        assert np.isfinite(logits).all()
        assert_same_bits(logits, by_layer.forward([token], cache))
    assert_same_bits(twin.room()[:, :, :, : twin.length], cache.room()[:, :, :, : cache.length])


@needs_vectors
@pytest.mark.parametrize(
    ("activations", "dtypes"),
    [*(("bfloat16", dtypes) for dtypes in (("bfloat16",), *STORED.values())), ("int8", ("int8",)), ("int8", ("int4",))],
)
def test_the_bits_of_rounded_inputs_are_those_of_going_layer_by_layer(
    activations: str, dtypes: tuple[str, ...]
) -> None:
    exact, _ = quantised_pair(dtypes)
    config, weights, rounding = (
        exact.config,
        exact.weights,
        SimpleNamespace(**{**vars(ops), **twins(None, activations)}),
    )
    at_once = Model(config, weights, rounding, backend="fast")
    layer_by_layer = Model(
        config, weights, SimpleNamespace(**{**vars(rounding), "through_layers": ops.through_layers}), backend="fast"
    )
    assert at_once.runs_at_once
    caches = [fed(model, 9) for model in (at_once, layer_by_layer, exact)]
    for token in (3, 1, 4, 1, 5):
        a, b, c = (
            model.forward([token], cache) for model, cache in zip((at_once, layer_by_layer, exact), caches, strict=True)
        )
        assert_same_bits(a, b)
        assert (a != c).any()


@needs_vectors
@pytest.mark.parametrize("name", ["llama", "odd widths", "normed queries and keys", "windows"])
@pytest.mark.parametrize(
    ("activations", "dtypes"),
    [
        *(("float32", dtypes) for dtypes in (("bfloat16",), *STORED.values())),
        *(("bfloat16", dtypes) for dtypes in (("bfloat16",), STORED["mixed"])),
        *(("int8", (dtype,)) for dtype in ("int8", "int4")),
    ],
)
def test_a_bfloat16_cache_has_the_bits_of_going_layer_by_layer(
    activations: str, dtypes: tuple[str, ...], name: str
) -> None:
    model, _ = quantised_pair(dtypes, **KNOWN[name])
    run = through_layers_by(PATH, model.weights, model.config, activations=activations)
    assert run is not None
    assert_at_once_changes_nothing(model, twins(None, activations), MOST, length=510, dtype="bfloat16")


@needs_vectors
@pytest.mark.parametrize("name", ["llama", "odd widths", "windows", "one key/value head"])
@pytest.mark.parametrize(
    ("activations", "dtypes"),
    [*((kind, dtypes) for kind in ("float32", "int8") for dtypes in STORED.values()), ("bfloat16", ("bfloat16",))],
)
def test_up_to_16_tokens_get_the_bits_that_each_gets_after_the_other(
    activations: str, dtypes: tuple[str, ...], name: str
) -> None:
    """So drafts change no token, even where rounding to int8 would make much of the last bit of a sum."""
    known, _ = quantised_pair(dtypes, **KNOWN[name])
    operations = SimpleNamespace(**{**vars(ops), **twins("avx2", activations)})
    model = Model(known.config, known.weights, operations, backend="fast", activations=activations)
    cache = fed(model, 505)
    twin, tokens = cache.fork(), loud_tokens(model.config, MOST, seed=3)
    together = model.forward(tokens, cache)
    for token, logits in zip(tokens, together, strict=True):
        assert_same_bits(model.forward([token], twin)[0], logits)


@needs_vectors
def test_a_first_prompt_needs_no_cache_before_it() -> None:
    at_once, by_layer = pair()
    assert_same_bits(at_once.forward([1, 2, 3]), by_layer.forward([1, 2, 3]))


@needs_vectors
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_of_several_sequences_has_its_own_length_and_count(dtype: str) -> None:
    at_once, by_layer = pair()
    caches = [fed(by_layer, length, dtype=dtype) for length in (3, 600, 64)]
    twins_of_caches = [cache.fork() for cache in caches]
    new = [[5], [7, 9, 11], [1, 2]]
    for a, b in zip(at_once.forward_many(new, twins_of_caches), by_layer.forward_many(new, caches), strict=True):
        assert_same_bits(a, b)
    for twin, cache in zip(twins_of_caches, caches, strict=True):
        assert_same_bits(twin.room()[:, :, :, : twin.length], cache.room()[:, :, :, : cache.length])


@needs_vectors
@pytest.mark.parametrize("count", [1, 7])
def test_the_number_of_threads_changes_nothing(count: int) -> None:
    at_once, _ = pair(**KNOWN["odd widths"])
    cache = fed(at_once, 600)
    new = loud_tokens(at_once.config, count, seed=1)
    assert_threads_change_nothing(lambda: at_once.forward(new, cache.fork()))


@needs_vectors
@pytest.mark.parametrize("dtypes", STORED.values(), ids=STORED)
def test_the_number_of_threads_changes_nothing_for_integers(dtypes: tuple[str, ...]) -> None:
    at_once, _ = quantised_pair(dtypes, **KNOWN["odd widths"])
    cache = fed(at_once, 600)
    assert_threads_change_nothing(lambda: at_once.forward([7], cache.fork()))


@needs_vectors
def test_who_watches_sees_every_layer_and_the_same_logits() -> None:
    model, _ = pair()
    with npllama.record(model) as seen:
        watched = model.forward([1, 2, 3])
    assert "layers.1.ffn_act" in seen
    assert_same_bits(watched, model.forward([1, 2, 3]))


@needs_vectors
def test_what_is_not_known_is_declined() -> None:
    for changes in UNKNOWN.values():
        model = loud_model(loud_config(**changes), dtype="bfloat16")
        assert through_layers(model.weights, model.config) is None, changes
    model = loud_model(loud_config(), dtype="float32")
    assert through_layers(model.weights, model.config) is None


@needs_vectors
@pytest.mark.parametrize("dtypes", STORED.values(), ids=STORED)
@pytest.mark.parametrize(("path", "most"), [("avx2", byte_rows.FEW), ("amx", 1)])
def test_integers_decline_many_tokens_and_several_where_tiles_are_faster(
    dtypes: tuple[str, ...], path: str, most: int
) -> None:
    model, _ = quantised_pair(dtypes)
    run = through_layers_by(path, model.weights, model.config)
    if path == "amx" and "bfloat16" in dtypes and not PATHS[path] <= host_features():
        pytest.skip("this processor has no matrix unit")
    assert run is not None
    for n_new in {1, most, most + 1}:
        x, angles = np.ones((n_new, 64), np.float32), np.ones((n_new, 8), np.float32)
        assert (run(x, (angles, angles), KVCache(model.config, 32)) is None) == (n_new > most)


@needs_vectors
def test_many_tokens_and_caches_of_other_numbers_are_declined() -> None:
    model = loud_model(loud_config(), dtype="bfloat16")
    run = through_layers(model.weights, model.config)
    assert run is not None

    def result(n_new: int, cache: KVCache | Lanes) -> Any:
        x, angles = np.ones((n_new, 64), np.float32), np.ones((n_new, 8), np.float32)
        return run(x, (angles, angles), cache)

    assert result(MOST, KVCache(model.config, 32)) is not None
    assert result(MOST + 1, KVCache(model.config, 32)) is None
    assert result(1, KVCache(model.config, 32, "bfloat16")) is not None
    unlike = KVCache(model.config, 32), KVCache(model.config, 32, "bfloat16")
    assert result(2, Lanes(unlike, (1, 1))) is None
    double = KVCache(model.config, 32)
    double.append(0, *np.ones((2, 1, model.config.n_kv_heads, model.config.head_dim)))
    assert result(1, double) is None


def test_plain_loops_go_layer_by_layer() -> None:
    model = loud_model(loud_config(), dtype="bfloat16")
    assert twins("portable")["through_layers"](model.weights, model.config) is None


def assert_at_once_changes_nothing(
    model: Model, known: dict[str, Any], most: int, *, length: int = 9, dtype: str = "float32"
) -> None:
    """Compare the logits of several tokens, and then what is in the cache, which nothing rounded behind a product."""
    operations = SimpleNamespace(**{**vars(ops), **known})
    by_layer = SimpleNamespace(**{**vars(operations), "through_layers": ops.through_layers})
    both = [Model(model.config, model.weights, of, backend="fast") for of in (operations, by_layer)]
    assert [one.runs_at_once for one in both] == [True, False]
    caches = [fed(one, length, dtype=dtype) for one in both]
    for count in (most, min(most, 3), 1):
        new = loud_tokens(model.config, count, seed=count)
        assert_same_bits(*(one.forward(new, cache) for one, cache in zip(both, caches, strict=True)))
    assert_same_bits(*(cache.room()[:, :, :, : cache.length] for cache in caches))


@needs_vectors
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_several_tokens_meet_integers_at_once(activations: str) -> None:
    model, _ = quantised_pair(("int8", "int4"))
    assert_at_once_changes_nothing(model, twins("avx2", activations), byte_rows.FEW)


@needs_vectors
@pytest.mark.parametrize("path", ["avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_on_every_path_the_bits_are_those_of_single_operations(path: str, activations: str) -> None:
    if not PATHS[path] <= host_features():
        pytest.skip("this processor has no such instructions")
    model = loud_model(loud_config(), dtype="bfloat16")
    assert_at_once_changes_nothing(model, twins(path, activations), vector_rows.FEW)


@needs_vectors
@pytest.mark.parametrize("n_new", [1, 5, 40])
@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("stored", [("bfloat16",), *STORED.values()], ids=["bfloat16", *STORED])
def test_kernels_leave_no_array_in_memory(stored: tuple[str, ...], activations: str, n_new: int) -> None:
    """Most of what kernels call counts no references: an array that was made there would never be given back."""
    plain, _ = quantised_pair(stored)
    operations = SimpleNamespace(**{**vars(ops), **twins(None, activations)})
    model = Model(plain.config, plain.weights, operations, backend="fast")
    tokens = loud_tokens(model.config, n_new)
    assert left_by(lambda: model.forward(tokens)) == 0
