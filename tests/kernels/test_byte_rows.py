"""Products of a few tokens by dot products of bytes, as exact as float32; and what holds for rounded ones alike."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.checkpoint.quantize import quantize
from npllama.dtypes import PACKINGS, Array, Tensor
from npllama.kernels.byte_rows import FEW
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.matmul import products
from npllama.rounding import rounded_to_int8

PATH = "avx2"
pytestmark = pytest.mark.skipif(not PATHS[PATH] <= host_features(), reason="this processor has no AVX2")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(values: Array, dtype: str) -> Tensor:
    data, scales, *minima = quantize(values, dtype)
    for part in (data, scales, *minima):
        part.setflags(write=False)  # like a memory map
    return Tensor(data, dtype, scales, minima[0] if minima else None, values.shape[-1])


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (35, 64), (20, 65), (16, 576), (50, 1100), (33, 2100), (18, 8300)])
def test_few_tokens_are_what_float64_says_and_each_is_what_it_is_alone(
    activations: str, dtype: str, m: int, n: int
) -> None:
    """The widest rows are more than one chunk of any number of tokens."""
    x, weight = normal(FEW, n), stored(normal(m, n, seed=1), dtype)
    product = products(PATH, activations)
    entering = rounded_to_int8(x) if activations == "int8" else x
    alone = np.concatenate([product.linear(x[t : t + 1], weight) for t in range(FEW)])
    numbers = weight.numbers(to=np.float64)
    error = alone - entering.astype(np.float64) @ numbers.T
    size = (x.astype(np.float64) ** 2).sum() * (numbers**2).mean() * m
    assert (error**2).sum() < 1e-12 * size
    for count in range(2, FEW + 1):
        np.testing.assert_array_equal(product.linear(x[:count], weight), alone[:count])


@pytest.mark.parametrize("dtype", PACKINGS)
def test_zeros_and_groups_that_are_no_numbers(dtype: str) -> None:
    x, weight = normal(4, 200), stored(normal(40, 200), dtype)
    clean = products(PATH, "int8").linear(x, weight)
    x[1, 130], x[2] = np.inf, 0
    y = products(PATH, "int8").linear(x, weight)
    assert np.isnan(y[1]).all()
    assert not y[2].any()
    np.testing.assert_array_equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.usefixtures("any_threads")
def test_neither_other_rows_nor_threads_change_a_bit(dtype: str) -> None:
    x, weight = normal(3, 300), stored(normal(100, 300), dtype)
    whole = products(PATH, "int8").linear(x, weight)
    np.testing.assert_array_equal(products(PATH, "int8").linear(x, weight.rows(30, 77)), whole[:, 30:77])
    numba.set_num_threads(1)
    np.testing.assert_array_equal(products(PATH, "int8").linear(x, weight), whole)
