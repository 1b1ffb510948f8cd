"""Models whose products round their input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import npllama
from npllama import ops
from npllama.check.run import run_trace
from npllama.checkpoint.quantize import quantize
from npllama.dtypes import GROUP, PACKINGS, Array, Tensor, narrow
from npllama.errors import ParameterError
from npllama.kernels.features import PATHS, host_features
from npllama.rounding import (
    ACTIVATIONS,
    ROUNDINGS,
    rounded,
    rounded_to_int8,
    softmax_of_rounded,
    with_rounded_inputs,
)
from tests.fixtures.loud import loud_config, loud_tensors, loud_tokens, write_hf

CONFIG = loud_config()
TOKENS = loud_tokens(CONFIG)
ROUNDING = ACTIVATIONS[1:]


@pytest.fixture(scope="module", params=["bf16", "int8"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounding")
    source = write_hf(folder / "loud", loud_tensors(CONFIG), CONFIG)
    return npllama.convert(source, folder / "store", dtype=request.param)


def error(x: Array, truth: Array) -> float:
    """Squared error relative to the squared truth."""
    return float(((x - truth) ** 2).sum() / (truth**2).sum())


def stored(values: Array, dtype: str) -> Tensor:
    """Return a matrix as a weight is stored."""
    if dtype not in PACKINGS:
        return Tensor(narrow(values, dtype), dtype)
    data, scales, *minima = quantize(values, dtype)
    return Tensor(data, dtype, scales, minima[0] if minima else None, values.shape[1])


def test_rounding_is_to_the_nearest_and_ties_go_to_the_even() -> None:
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, -(1 + 2**-8 + 2**-20), np.inf, 3.4e38], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-6, 1.0, -(1 + 2**-7), np.inf, np.inf], np.float32)
    np.testing.assert_array_equal(rounded(x), expected)


def test_float64_is_rounded_to_the_same_numbers_and_stays_float64() -> None:
    x = np.random.default_rng(0).normal(size=100)
    assert rounded(x).dtype == np.float64
    np.testing.assert_array_equal(rounded(x), rounded(x.astype(np.float32)))


def test_probabilities_are_in_the_proportions_of_rounded_weights_wherever_these_begin() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    scores[1, 7:] = -np.inf
    scores[2] *= 10
    for dtype, near in ((np.float32, 1e-5), (np.float64, 1e-12)):
        found = softmax_of_rounded(scores.astype(dtype))
        assert found.dtype == dtype
        for n in (-3, 0, 5):
            powers = scores.astype(np.float64) * math.log2(math.e)
            weights = rounded(np.exp2(powers - powers.max(axis=1, keepdims=True).round() - n))
            expected = weights / weights.sum(axis=1, keepdims=True)
            # float32's powers may lie on the other side of where two bfloat16 meet
            differs = np.abs(found - expected) > near * expected
            assert differs.mean() < (0.05 if dtype == np.float32 else 1e-9)
            np.testing.assert_allclose(found, expected, rtol=2**-7)
        assert np.abs(found[0] / ops.softmax(scores[0].astype(dtype)) - 1).max() > 2**-11
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    assert (softmax_of_rounded(scores)[1, 7:] == 0).all()


def group(*numbers: float, largest: float = 127.0, size: int = GROUP) -> Array:
    """Return a group with these numbers at its beginning, zeros, and its largest at its end."""
    x = np.zeros(size, np.float32)
    x[: len(numbers)], x[-1] = numbers, largest
    return x


def test_int8_rounds_to_whole_steps_and_ties_go_to_the_even() -> None:
    x = group(0.5, 1.5, -2.5, 0.49, 0.51, -0.3, -126.6, 63.4)
    expected = group(0.0, 2.0, -2.0, 0.0, 1.0, 0.0, -127.0, 63.0)
    np.testing.assert_array_equal(rounded_to_int8(x), expected)
    assert not np.signbit(rounded_to_int8(x)[5])  # the integer 0 has no sign
    np.testing.assert_array_equal(rounded_to_int8(2 * x), 2 * expected)
    np.testing.assert_array_equal(rounded_to_int8(-x), -expected)


def test_int8_is_the_formula_number_by_number() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2 * GROUP + 9), np.float32)
    for row, found in zip(x, rounded_to_int8(x), strict=True):
        for first in (0, GROUP, 2 * GROUP):
            numbers = row[first : first + GROUP]
            largest = max(abs(number) for number in numbers)
            scale, step = np.float32(127) / largest, largest / np.float32(127)
            q = [np.int8(np.rint(number * scale)) for number in numbers]
            assert [np.float32(integer) * step for integer in q] == found[first : first + GROUP].tolist()
            assert np.abs(numbers - found[first : first + GROUP]).max() < 0.5001 * step


def test_every_group_has_a_step_of_its_own_and_the_last_one_may_be_short() -> None:
    x = np.concatenate([group(0.6), group(0.6, largest=1.27), group(0.6, largest=0.127, size=5)])
    found = rounded_to_int8(np.stack([x, -x]))
    first = [0, GROUP, 2 * GROUP]
    np.testing.assert_allclose(found[:, first], [[1.0, 0.6, 0.6], [-1.0, -0.6, -0.6]], rtol=1e-6)
    np.testing.assert_array_equal(found[0], rounded_to_int8(x))
    np.testing.assert_array_equal(found[0, 2 * GROUP :], rounded_to_int8(x[2 * GROUP :]))


def test_what_int8_makes_of_groups_that_are_no_ordinary_numbers() -> None:
    tiny, least = np.float32(2.0**-100), np.nextafter(np.float32(2.0**-100), np.float32(0))
    groups = [group(-1e-40, largest=least), group(tiny, largest=-tiny), group(largest=0.0), group(1.0, largest=np.inf)]
    groups += [group(np.nan), group(1.0, largest=-np.inf), group(1.0)]
    found = rounded_to_int8(np.concatenate(groups)).reshape(-1, GROUP)
    for zeros in (found[0], found[2]):
        assert not zeros.view(np.uint32).any()
    np.testing.assert_allclose(found[1][[0, -1]], [tiny, -tiny], rtol=1e-6)
    for missing in (found[3], found[4], found[5]):
        assert np.isnan(missing).all()
    np.testing.assert_array_equal(found[6], groups[6])


@pytest.mark.parametrize("activations", ROUNDING)
@pytest.mark.parametrize(
    "shape", [(2000, GROUP), (300, 3 * GROUP + 10), (999, 7), (12, 5, 2 * GROUP), (GROUP,), (3, 1)]
)
def test_the_kernels_round_as_the_textbook_does(activations: str, shape: tuple[int, ...]) -> None:
    from npllama.kernels.rounded import ROUNDINGS as KERNELS

    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
    of_any_size = rng.standard_normal(shape, np.float32) * (2.0 ** rng.integers(-140, 120, (*shape[:-1], 1))).astype(
        "f"
    )
    special = rng.choice(np.float32([0, -0.0, np.inf, np.nan, 3.4028235e38, -3.3e38, 1e-45, 1e-31, 1]), shape)
    ties = rng.integers(-254, 255, shape).astype(np.float32) / 2
    for x in (patterns, of_any_size, special, ties, ties.swapaxes(0, -1)):
        mine, theirs = KERNELS[activations](x), ROUNDINGS[activations](x)
        assert mine.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(np.signbit(mine) & ~np.isnan(mine), np.signbit(theirs) & ~np.isnan(theirs))


def test_vector_registers_round_a_group_to_int8_as_plain_loops_do() -> None:
    from npllama.kernels.rounded import int8_lanes, int8_step

    if not PATHS["avx2"] <= host_features():
        pytest.skip("this processor has no such instructions")
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, (300, GROUP), dtype=np.uint32).view(np.float32)
    of_any_size = rng.standard_normal((300, GROUP), np.float32) * np.ldexp(1.0, rng.integers(-110, 120, (300, 1)))
    special = rng.choice(np.float32([0, -0.0, 3.4e38, 1e-45, 1e-31, 1]), (300, GROUP))
    ties = np.hstack([np.full((300, 1), 127), rng.integers(-254, 255, (300, GROUP - 1)) / 2])
    rows = np.concatenate([patterns, of_any_size.astype("f"), special, ties.astype("f"), np.zeros((1, GROUP), "f")])
    rows[::7, 5], rows[3::7, 6] = np.nan, -np.inf
    plain, lanes = np.full((2, GROUP), 99, np.int8)
    for row in rows:
        step, total = int8_step(row, plain)
        found = int8_lanes(row.ctypes.data, lanes.ctypes.data)
        np.testing.assert_array_equal(found, (step, total))
        np.testing.assert_array_equal(lanes, plain)
        assert total == plain.sum(dtype=np.int64)


def test_both_sides_know_the_same_roundings() -> None:
    from npllama.kernels.rounded import ROUNDINGS as KERNELS

    assert set(KERNELS) == set(ROUNDINGS) == set(ROUNDING)


@pytest.mark.parametrize("activations", ROUNDING)
def test_every_product_and_nothing_else_is_rounded(activations: str) -> None:
    x, weight = np.random.default_rng(0).standard_normal((2, 3), np.float32), Tensor(np.eye(3, dtype="f"), "float32")
    of, expected = with_rounded_inputs(ops, activations), ROUNDINGS[activations](x)
    assert (expected != x).any()
    np.testing.assert_array_equal(of.linear(x, weight), expected)
    np.testing.assert_array_equal(of.linears(x, (weight,))[0], expected)
    one = np.zeros((2, 1), np.int64)
    np.testing.assert_array_equal(of.expert_linear(x[:, None], one, weight, 1)[:, 0], expected)
    assert of.rms_norm is ops.rms_norm
    assert of.attention is ops.attention
    assert of.linear(x.astype(np.float64), weight).dtype == np.float64


@pytest.mark.parametrize("backend", ["fast", "numpy"])
@pytest.mark.parametrize(("activations", "least", "most"), [("bfloat16", 1e-7, 1e-3), ("int8", 1e-5, 0.1)])
def test_a_rounding_model_is_as_far_from_the_exact_one_as_roundings_are(
    store: Path, backend: str, activations: str, least: float, most: float
) -> None:
    exact = npllama.load(store, backend="float64").forward(TOKENS)
    found = npllama.load(store, backend=backend, activations=activations).forward(TOKENS)
    assert least < error(found, exact) < most
    assert error(npllama.load(store, backend=backend).forward(TOKENS), exact) < 1e-9


@pytest.mark.parametrize("activations", ROUNDING)
def test_both_backends_round_alike(store: Path, activations: str) -> None:
    """Up to what rounding turns small differences into: a number that lies between two may go either way."""
    fast, textbook = (npllama.load(store, backend=backend, activations=activations) for backend in ("fast", "numpy"))
    exact = npllama.load(store, backend="float64").forward(TOKENS)
    apart = error(fast.forward(TOKENS[:12]), textbook.forward(TOKENS[:12]))
    assert apart < error(textbook.forward(TOKENS[:12]), exact[:12])


@pytest.mark.parametrize(("activations", "most"), [("bfloat16", 1e-3), ("int8", 0.1)])
def test_a_prompt_in_pieces_is_the_prompt_in_one(store: Path, activations: str, most: float) -> None:
    model = npllama.load(store, activations=activations)
    whole = model.forward(TOKENS)
    cache = model.new_cache(len(TOKENS))
    pieces = [model.forward(TOKENS[a:b], cache) for a, b in ((0, 3), (3, 4), (4, len(TOKENS)))]
    assert error(np.concatenate(pieces), whole) < most


@pytest.mark.parametrize("backend", ["fast", "numpy"])
@pytest.mark.parametrize("activations", ROUNDING)
def test_a_trace_of_a_rounding_model_says_so(store: Path, activations: str, backend: str) -> None:
    model = npllama.load(store, backend=backend, activations=activations)
    assert model.activations == activations
    assert run_trace(model, TOKENS, prefill=len(TOKENS)).dtype == activations
    assert run_trace(npllama.load(store), TOKENS, prefill=len(TOKENS)).dtype == "float32"


def test_unknown_activations_name_the_known_ones(store: Path) -> None:
    with pytest.raises(ParameterError, match=r"'float16', expected one of float32, bfloat16, int8"):
        npllama.load(store, activations="float16")


@pytest.mark.parametrize("activations", ROUNDING)
def test_the_truth_is_not_rounded(store: Path, activations: str) -> None:
    with pytest.raises(ParameterError, match=rf"rounded to {activations}, but the float64 backend is the truth"):
        npllama.load(store, backend="float64", activations=activations)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_on_every_path_int8_is_an_exact_product_with_the_rounded_input(path: str, dtype: str) -> None:
    """Whatever a kernel makes of integers: one token and many, whole groups and a rest, a row of no numbers."""
    if not PATHS[path] <= host_features():
        pytest.skip("this processor has no such instructions")
    from npllama.kernels.matmul import products

    rng = np.random.default_rng(0)
    for n_new, m, n in ((1, 64, 128), (5, 70, 100), (40, 130, 300), (2, 3, 7)):
        x = rng.standard_normal((n_new, n), np.float32) * np.float32(3)
        x[0, : n // 2] = 0
        weight = stored(rng.standard_normal((m, n), np.float32), dtype)
        found = products(path, "int8").linear(x, weight)
        exact = ops.linear(rounded_to_int8(x).astype(np.float64), weight)
        assert error(found, exact) < 1e-12
        assert error(found, ops.linear(x.astype(np.float64), weight)) > 1e-6
        x[-1, 3] = np.nan
        found = products(path, "int8").linear(x, weight)
        assert np.isnan(found[-1]).all()
        assert np.isfinite(found[:-1]).all()
