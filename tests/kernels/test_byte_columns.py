"""Products of a few tokens that are rounded to int8: sixteen rows at a time."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.dtypes import PACKINGS, Array
from npllama.kernels.byte_columns import FEW
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.matmul import products
from npllama.rounding import rounded_to_int8
from tests.kernels.test_byte_rows import normal, stored

PATH = "avx2"
pytestmark = pytest.mark.skipif(not PATHS[PATH] <= host_features(), reason="this processor has no AVX2")

#: Rows and their numbers: fewer than a block, one and a part; groups short, odd, of several chunks, pages apart.
SHAPES = [(1, 1), (16, 64), (35, 65), (20, 576), (33, 1100), (50, 2100), (18, 8300), (33, 8192)]


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_a_token_is_bit_by_bit_what_it_is_alone_however_many_there_are(dtype: str, m: int, n: int) -> None:
    """Those beyond `FEW` come from other kernels, `npllama.kernels.vector_blocks`."""
    x, weight = normal(3 * FEW, n), stored(normal(m, n, seed=1), dtype)
    linear = products(PATH, "int8").linear
    alone = np.concatenate([linear(x[t : t + 1], weight) for t in range(len(x))])
    for count in (*range(2, FEW + 1), FEW + 1, 2 * FEW + 3, len(x)):
        np.testing.assert_array_equal(linear(x[:count], weight), alone[:count])
        np.testing.assert_array_equal(linear(x[-count:], weight), alone[-count:])


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_nothing_but_the_input_is_rounded(dtype: str, m: int, n: int) -> None:
    x, weight = normal(FEW, n), stored(normal(m, n, seed=1), dtype)
    numbers = weight.numbers(to=np.float64)
    assert relative_error(products(PATH, "int8").linear(x, weight), rounded_to_int8(x), numbers) < 1e-12
    assert n == 1 or relative_error(products(PATH, "int8").linear(x, weight), x, numbers) > 1e-6


def relative_error(y: Array, x: Array, weight: Array) -> float:
    """Return the squared error of y beside x · weightᵀ, as a share of what random numbers of that size come to."""
    error = y - x.astype(np.float64) @ weight.T
    return float((error**2).sum() / ((x.astype(np.float64) ** 2).sum() * (weight**2).mean() * len(weight)))
