"""Models whose products round their input to bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import npllama
from npllama import ops
from npllama.check.run import run_trace
from npllama.dtypes import Array, Tensor
from npllama.errors import ParameterError
from npllama.rounding import rounded, with_rounded_inputs
from tests.fixtures.loud import loud_config, loud_tensors, loud_tokens, write_hf

CONFIG = loud_config()
TOKENS = loud_tokens(CONFIG)


@pytest.fixture(scope="module", params=["bf16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounding")
    source = write_hf(folder / "loud", loud_tensors(CONFIG), CONFIG)
    return npllama.convert(source, folder / "store", dtype=request.param)


def error(x: Array, truth: Array) -> float:
    """Squared error relative to the squared truth."""
    return float(((x - truth) ** 2).sum() / (truth**2).sum())


def test_rounding_is_to_the_nearest_and_ties_go_to_the_even() -> None:
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -(1 + 2**-8 + 2**-20), np.inf, 3.4e38], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-6, 1.0, -(1 + 2**-7), np.inf, np.inf], np.float32)
    np.testing.assert_array_equal(rounded(x), expected)


def test_the_kernel_rounds_as_the_textbook_does() -> None:
    from npllama.kernels.rounded import rounded as compiled

    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45])])
    np.testing.assert_array_equal(compiled(x), rounded(x))
    np.testing.assert_array_equal(np.signbit(compiled(x[-7:])), np.signbit(rounded(x[-7:])))


def test_every_product_and_nothing_else_is_rounded() -> None:
    x, weight = np.full((2, 2), 1 + 2**-9, np.float32), Tensor(np.eye(2, dtype=np.float32), "float32")
    of = with_rounded_inputs(ops, "bfloat16")
    ones = np.ones((2, 2))
    np.testing.assert_array_equal(of.linear(x, weight), ones)
    np.testing.assert_array_equal(of.linears(x, (weight,))[0], ones)
    np.testing.assert_array_equal(of.expert_linear(x[:, None], np.zeros((2, 1), np.int64), weight, 1)[:, 0], ones)
    assert of.rms_norm is ops.rms_norm
    assert of.attention is ops.attention


@pytest.mark.parametrize("backend", ["fast", "numpy"])
def test_a_rounding_model_is_as_far_from_the_exact_one_as_roundings_are(store: Path, backend: str) -> None:
    exact = npllama.load(store, backend="float64").forward(TOKENS)
    found = npllama.load(store, backend=backend, activations="bfloat16").forward(TOKENS)
    assert 1e-7 < error(found, exact) < 1e-3
    assert error(npllama.load(store, backend=backend).forward(TOKENS), exact) < 1e-9


def test_both_backends_round_alike(store: Path) -> None:
    """Up to what rounding turns small differences into: a number that lies between two bfloat16 may go either way."""
    fast, textbook = (npllama.load(store, backend=backend, activations="bfloat16") for backend in ("fast", "numpy"))
    exact = npllama.load(store, backend="float64").forward(TOKENS)
    apart = error(fast.forward(TOKENS[:12]), textbook.forward(TOKENS[:12]))
    assert apart < error(textbook.forward(TOKENS[:12]), exact[:12])


def test_a_prompt_in_pieces_is_the_prompt_in_one(store: Path) -> None:
    model = npllama.load(store, activations="bfloat16")
    whole = model.forward(TOKENS)
    cache = model.new_cache(len(TOKENS))
    pieces = [model.forward(TOKENS[a:b], cache) for a, b in ((0, 3), (3, 4), (4, len(TOKENS)))]
    assert error(np.concatenate(pieces), whole) < 1e-3


def test_a_trace_of_a_rounding_model_says_so(store: Path) -> None:
    model = npllama.load(store, activations="bfloat16")
    assert model.activations == "bfloat16"
    assert run_trace(model, TOKENS, prefill=len(TOKENS)).dtype == "bfloat16"
    assert run_trace(npllama.load(store), TOKENS, prefill=len(TOKENS)).dtype == "float32"


def test_unknown_activations_name_the_known_ones(store: Path) -> None:
    with pytest.raises(ParameterError, match=r"'float16', expected one of float32, bfloat16, int8"):
        npllama.load(store, activations="float16")


def test_the_truth_is_not_rounded(store: Path) -> None:
    with pytest.raises(ParameterError, match=r"rounded to bfloat16, but the float64 backend is the truth"):
        npllama.load(store, backend="float64", activations="bfloat16")
