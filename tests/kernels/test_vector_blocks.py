"""Products of many tokens in vector registers, beside the same products in float64 and token by token."""

from __future__ import annotations

import itertools

import numba
import numpy as np
import pytest

from npllama.checkpoint.quantize import quantize
from npllama.dtypes import PACKINGS, Array, Tensor, narrow
from npllama.kernels import byte_rows, glu, matmul, vector_blocks
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.matmul import ROUNDED, products
from npllama.kernels.vector_rows import FEW
from npllama.rounding import ROUNDINGS

#: The best path that multiplies in vector registers.
PATH = next((path for path in ("avx512bf16", "avx512", "avx2") if PATHS[path] <= host_features()), "avx2")
pytestmark = pytest.mark.skipif(not PATHS[PATH] <= host_features(), reason="this processor has no AVX2")

#: M and N: single numbers; last blocks, groups and chunks that are not whole; several chunks, and fields of blocks.
SHAPES = [(1, 1), (17, 33), (100, 300), (64, 576), (700, 260), (40, 2100), (150, 2100)]
#: What inputs are rounded to, and how weights are stored: all that is computed square by square.
KINDS = [
    *itertools.product(["float32"], ["float32", "bfloat16", "int8", "int4"]),
    *itertools.product(["bfloat16"], ["bfloat16", "int8", "int4"]),
    *itertools.product(["int8"], ["int8", "int4"]),
]
every_kind = pytest.mark.parametrize(("activations", "dtype"), KINDS)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(values: Array, dtype: str) -> Tensor:
    if dtype not in PACKINGS:
        return Tensor(narrow(values, dtype), dtype)
    data, scales, *minima = quantize(values, dtype)
    return Tensor(data, dtype, scales, minima[0] if minima else None, values.shape[-1])


def truth(x: Array, weight: Tensor, activations: str) -> Array:
    """Return the product in float64 of the input as it is rounded, and the weights as they are stored."""
    seen = x if activations == "float32" else ROUNDINGS[activations](x)
    return seen.astype(np.float64) @ weight.numbers(to=np.float64).T


def noise(y: Array, expected: Array) -> float:
    """Squared error relative to the squared truth."""
    return float(((y - expected) ** 2).sum() / (expected**2).sum())


def test_what_this_file_tests_is_what_models_use() -> None:
    rounding = {(kind, dtype) for kind, by_path in ROUNDED.items() for dtype in matmul.PRODUCTS if any(
        dtype in by_path.get(path, {}) for path in ("avx512bf16", "avx2"))}  # fmt: skip
    exact = {("float32", dtype) for dtype, by_path in matmul.PRODUCTS.items() if "avx2" in by_path}
    assert rounding | exact == set(KINDS)


@every_kind
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_only_the_input_is_rounded_and_only_as_declared(activations: str, dtype: str, m: int, n: int) -> None:
    weight = stored(normal(m, n, seed=1), dtype)
    for n_new in (FEW + 1, 16, 17, 70):
        x = normal(n_new, n)
        y = products(PATH, activations).linear(x, weight)
        assert noise(y, truth(x, weight, activations)) < 4e-13
        assert activations == "float32" or n == 1 or noise(y, truth(x, weight, "float32")) > 1e-8


@every_kind
def test_a_row_has_the_same_bits_in_any_company(activations: str, dtype: str) -> None:
    x, weight = normal(600, 300), stored(normal(100, 300, seed=1), dtype)
    product = products(PATH, activations)
    whole = product.linear(x, weight)
    for start, stop in ((0, FEW + 1), (580, 600), (5, 37), (100, 117), (0, 512), (88, 600)):
        np.testing.assert_array_equal(product.linear(x[start:stop], weight), whole[start:stop])


@every_kind
def test_among_few_a_row_differs_from_itself_among_many_by_rounding_alone(activations: str, dtype: str) -> None:
    x, weight = normal(24, 2000), stored(normal(64, 2000, seed=1), dtype)
    product = products(PATH, activations)
    few = np.concatenate([product.linear(x[t : t + byte_rows.FEW], weight) for t in range(0, 24, byte_rows.FEW)])
    scale = np.abs(x) @ np.abs(weight.numbers()).T
    assert (np.abs(few - product.linear(x, weight)) <= 2**-20 * scale).all()


@every_kind
def test_several_matrices_at_once_give_what_each_gives_alone(activations: str, dtype: str) -> None:
    x = normal(40, 160)
    weights = [stored(normal(m, 160, seed=m), dtype) for m in (64, 33, 5, 300)]
    product = products(PATH, activations)
    for y, weight in zip(product.linears(x, weights), weights, strict=True):
        np.testing.assert_array_equal(y, product.linear(x, weight))


@every_kind
@pytest.mark.parametrize(("m", "n"), [(1, 1), (50, 96), (64, 576), (300, 1100)])
def test_one_product_gated_by_another_has_the_bits_of_both_and_the_gate(
    activations: str, dtype: str, m: int, n: int
) -> None:
    gate, up = stored(normal(m, n, seed=1), dtype), stored(normal(m, n, seed=2), dtype)
    product = products(PATH, activations)
    for n_new, activation in ((FEW + 1, "silu"), (48, "gelu"), (70, "silu"), (530, "relu")):
        x = normal(n_new, n)
        both = product.linears(x, (gate, up))
        act = product.gated_linears(x, gate, up, (None, None), activation)
        assert act is not None
        np.testing.assert_array_equal(act, glu(*both, activation))


@every_kind
@pytest.mark.usefixtures("any_threads")
def test_threads_do_not_change_a_bit_behind_a_gate(activations: str, dtype: str) -> None:
    x, gate, up = normal(50, 300), stored(normal(300, 300, seed=1), dtype), stored(normal(300, 300, seed=2), dtype)
    product, results = products(PATH, activations), []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        results.append(product.gated_linears(x, gate, up, (None, None), "silu"))
    for result in results:
        assert result is not None
        np.testing.assert_array_equal(result, results[0])


@every_kind
@pytest.mark.usefixtures("any_threads")
def test_threads_do_not_change_a_bit(activations: str, dtype: str) -> None:
    for m in (16, 300, 900):
        x, weight = normal(50, 300), stored(normal(m, 300, seed=1), dtype)
        results = []
        for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(threads)
            results.append(products(PATH, activations).linear(x, weight))
        for result in results:
            np.testing.assert_array_equal(result, results[0])


@every_kind
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_touches_its_own_row_only(activations: str, dtype: str, value: float) -> None:
    x, weight = normal(40, 128), stored(normal(32, 128), dtype)
    clean = products(PATH, activations).linear(x, weight)
    x[7, 3] = value
    y = products(PATH, activations).linear(x, weight)
    assert not np.isfinite(y[7]).any()
    np.testing.assert_array_equal(np.delete(y, 7, axis=0), np.delete(clean, 7, axis=0))


@every_kind
def test_tokens_in_several_passes_give_what_they_give_in_one(
    monkeypatch: pytest.MonkeyPatch, activations: str, dtype: str
) -> None:
    x, weight = normal(100, 96), stored(normal(64, 96, seed=1), dtype)
    whole = products(PATH, activations).linear(x, weight)
    monkeypatch.setattr(vector_blocks, "_TOKENS", 48)
    np.testing.assert_array_equal(products(PATH, activations).linear(x, weight), whole)


@pytest.mark.parametrize("activations", ["bfloat16", "int8"])
def test_integers_below_what_the_rounding_holds_are_multiplied_exactly(activations: str) -> None:
    """A group of up to 127 in steps of 1 loses nothing, and neither do weights that are integers."""
    rng = np.random.default_rng(3)
    x = rng.integers(-127, 128, (20, 64)).astype(np.float32)
    x[:, 0] = 127
    weights = rng.integers(-127, 128, (16, 64)).astype(np.float32)
    weights[:, 5] = 127
    weight = stored(weights, "int8")
    assert (weight.numbers() == weights).all()
    np.testing.assert_array_equal(products(PATH, activations).linear(x, weight), x @ weights.T)
