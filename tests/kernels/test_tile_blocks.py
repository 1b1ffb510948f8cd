"""Products of many tokens in the matrix unit, beside the same products in float64 and token by token."""

from __future__ import annotations

import ml_dtypes
import numba
import numpy as np
import pytest

from npllama.checkpoint.quantize import quantize
from npllama.dtypes import Array, Tensor, narrow
from npllama.kernels import tile_blocks
from npllama.kernels.features import choose, host_features, ladder
from npllama.kernels.matmul import products

pytestmark = pytest.mark.skipif(
    "amx" not in ladder(choose(host_features())), reason="this processor has no matrix unit"
)

#: M and N: the least that there may be; last blocks, steps and chunks that are not whole; several fields of blocks.
SHAPES = [(32, 32), (33, 33), (100, 300), (64, 576), (700, 260)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(values: Array, dtype: str) -> Tensor:
    if dtype == "bfloat16":
        return Tensor(narrow(values, dtype), dtype)
    data, scales, *minima = quantize(values, dtype)
    return Tensor(data, dtype, scales, minima[0] if minima else None, values.shape[-1])


def rounded(values: Array) -> Array:
    """Round as ml_dtypes does; float64."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def noise(y: Array, truth: Array) -> float:
    """Squared error relative to the squared truth."""
    return float(((y - truth) ** 2).sum() / (truth**2).sum())


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("n_new", [17, 32, 33, 70])
def test_in_three_parts_no_bit_of_the_input_is_lost(m: int, n: int, n_new: int) -> None:
    x, weight = normal(n_new, n), stored(normal(m, n, seed=1), "bfloat16")
    y = products("amx").linear(x, weight)
    assert noise(y, x.astype(np.float64) @ weight.numbers(to=np.float64).T) < 4e-13


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("n_new", [17, 70])
def test_rounded_the_input_and_the_weights_are_the_nearest_bfloat16(dtype: str, m: int, n: int, n_new: int) -> None:
    x, weight = normal(n_new, n), stored(normal(m, n, seed=1), dtype)
    y = products("amx", "bfloat16").linear(x, weight)
    truth = rounded(x) @ rounded(weight.numbers()).T
    assert noise(y, truth) < 4e-13
    assert noise(y, x.astype(np.float64) @ weight.numbers(to=np.float64).T) > 1e-7


@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_and_in_any_company(activations: str) -> None:
    x, weight = normal(600, 300), stored(normal(100, 300, seed=1), "bfloat16")
    product = products("amx", activations)
    whole = product.linear(x, weight)
    for start, stop in ((0, 1), (599, 600), (5, 21), (100, 117), (0, 512), (88, 600)):
        np.testing.assert_array_equal(product.linear(x[start:stop], weight), whole[start:stop])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rounded_integers_differ_between_few_and_many_tokens_by_the_rounding_of_the_weights(dtype: str) -> None:
    """Few tokens meet the integers as they are. A rounding moves a number by 1/512 of itself at most."""
    x, weight = normal(64, 320), stored(normal(96, 320, seed=1), dtype)
    product = products("amx", "bfloat16")
    few = np.concatenate([product.linear(x[t : t + 16], weight) for t in range(0, 64, 16)])
    bound = 2.0**-8 * np.abs(x) @ np.abs(weight.numbers()).T
    assert (np.abs(product.linear(x, weight) - few) <= bound).all()
    assert noise(few, rounded(x) @ weight.numbers(to=np.float64).T) < 4e-13


def test_several_matrices_at_once_give_what_each_gives_alone() -> None:
    x = normal(40, 160)
    weights = [stored(normal(m, 160, seed=m), "bfloat16") for m in (64, 33, 300)]
    for y, weight in zip(products("amx").linears(x, weights), weights, strict=True):
        np.testing.assert_array_equal(y, products("amx").linear(x, weight))


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("m", [32, 300, 900])
def test_threads_do_not_change_a_bit(m: int) -> None:
    x, weight = normal(50, 300), stored(normal(m, 300, seed=1), "bfloat16")
    results = []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        results.append(products("amx").linear(x, weight))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
def test_what_is_not_finite_touches_its_own_row_only(value: float, activations: str) -> None:
    x, weight = normal(40, 64), stored(np.ones((32, 64), np.float32), "bfloat16")
    x[7, 3] = value
    y = products("amx", activations).linear(x, weight)
    assert not np.isfinite(y[7]).any()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


def test_tokens_in_several_passes_give_what_they_give_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(100, 96), stored(normal(64, 96, seed=1), "bfloat16")
    whole = products("amx").linear(x, weight)
    monkeypatch.setattr(tile_blocks, "_TOKENS", 48)
    np.testing.assert_array_equal(products("amx").linear(x, weight), whole)
