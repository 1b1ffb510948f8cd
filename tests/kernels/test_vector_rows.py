"""Products of a few tokens in vector registers: a row's bits do not depend on its company."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.dtypes import Array, Tensor, narrow
from npllama.kernels import vector_rows
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.matmul import products
from npllama.rounding import rounded

PATH = "avx2"
pytestmark = pytest.mark.skipif(not PATHS[PATH] <= host_features(), reason="this processor has no AVX2")

#: M and N: fewer rows than a block; no whole number of blocks or steps; more than one chunk of any number of tokens.
SHAPES = [(3, 7), (16, 16), (50, 33), (37, 600), (20, 2100), (18, 4500)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(values: Array, dtype: str) -> Tensor:
    return Tensor(narrow(values, dtype), dtype)


@pytest.mark.parametrize(
    ("path", "activations", "dtype"),
    [
        ("avx2", "float32", "float32"),
        ("avx2", "float32", "bfloat16"),
        ("avx2", "bfloat16", "bfloat16"),
        ("avx512bf16", "bfloat16", "bfloat16"),  # in pairs
    ],
)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_few_tokens_are_what_float64_says_and_each_is_what_it_is_alone(
    path: str, activations: str, dtype: str, m: int, n: int
) -> None:
    if not PATHS[path] <= host_features():
        pytest.skip("this processor has no such instructions")
    x, weight = normal(vector_rows.FEW, n), stored(normal(m, n, seed=1), dtype)
    product = products(path, activations)
    alone = np.concatenate([product.linear(x[t : t + 1], weight) for t in range(len(x))])
    entering = rounded(x) if activations == "bfloat16" else x
    expected = entering.astype(np.float64) @ weight.numbers(to=np.float64).T
    assert ((alone - expected) ** 2).sum() < 4e-13 * (expected**2).sum()
    for count in range(2, vector_rows.FEW + 1):
        np.testing.assert_array_equal(product.linear(x[:count], weight), alone[:count])


def test_a_row_does_not_depend_on_the_other_rows_of_the_weight() -> None:
    x, weight = normal(3, 600), stored(normal(75, 600), "bfloat16")
    whole = products(PATH).linear(x, weight)
    for start, stop in ((0, 49), (7, 60), (50, 75), (74, 75)):
        part = Tensor(weight.data[start:stop], "bfloat16")
        np.testing.assert_array_equal(products(PATH).linear(x, part), whole[:, start:stop])


def test_nothing_behind_the_last_row_is_read_as_a_weight() -> None:
    """The row ends within a vector, and what lies behind it is no number."""
    numbers = np.full(16 * 40 + 64, np.nan, np.float32)
    numbers[: 16 * 40] = normal(16 * 40)
    weight = Tensor(numbers[: 16 * 40].reshape(16, 40), "float32")
    for n_new in (1, 3, 8):
        assert np.isfinite(products(PATH).linear(normal(n_new, 40), weight)).all()


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("n_new", [1, 4, 8])
def test_threads_do_not_change_a_bit(n_new: int) -> None:
    x, weight = normal(n_new, 700), stored(normal(300, 700), "bfloat16")
    results = []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        results.append(products(PATH).linear(x, weight))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
