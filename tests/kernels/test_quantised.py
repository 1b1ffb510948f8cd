"""Products with int8 and int4 weights: every path against float64 on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numba
import numpy as np
import pytest

from npllama import ops
from npllama.checkpoint.quantize import quantize
from npllama.dtypes import PACKINGS, Array, Tensor, n_groups
from npllama.kernels import digits, features, matmul, quantised
from npllama.kernels.matmul import PRODUCTS

Product = Callable[[Array, Sequence[Tensor], Sequence[Array]], None]

PATHS = [path for path, needs in features.PATHS.items() if needs.issubset(features.host_features())]
RNG = np.random.default_rng(0)

#: Squared error, in units of what the numbers' sizes let one expect of the result's square: sums of so many products in
#: float32 reach 1e-14 to 3e-13.
NOISE = 5e-13


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def stored(m: int, n: int, dtype: str) -> Tensor:
    data, scales, *minima = quantize(normal(m, n), dtype)
    for part in (data, scales, *minima):
        part.setflags(write=False)  # like a memory map
    return Tensor(data, dtype, scales, minima[0] if minima else None, n)


def multiplied(path: str, x: Array, *weights: Tensor) -> list[Array]:
    outputs = [np.full((len(x), weight.shape[0]), np.nan, np.float32) for weight in weights]
    matmul.products(path).by_dtype[weights[0].dtype](x, weights, outputs)
    return outputs


def assert_noise(y: Array, x: Array, weight: Tensor) -> None:
    """Assert that each row is within float32's noise of the textbook in float64."""
    wide, numbers = x.astype(np.float64), weight.numbers(to=np.float64)
    error = ((y - ops.linear(wide, weight)) ** 2).sum(axis=1)
    size = (wide**2).sum(axis=1) * (numbers**2).mean() * len(numbers)
    assert (error <= NOISE * size).all(), error / size


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize(("m", "n"), [(96, 576), (35, 64), (131, 1100), (5, 37), (1, 1), (32, 129)])
def test_products_of_any_size_are_within_the_noise_of_float32(path: str, dtype: str, m: int, n: int) -> None:
    weight = stored(m, n, dtype)
    for n_new in (1, 2, 15, 16, 17, 40):
        x = normal(n_new, n)
        assert_noise(multiplied(path, x, weight)[0], x, weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", PACKINGS)
def test_outliers_and_tiny_numbers_among_the_activations(path: str, dtype: str) -> None:
    """One number a thousand times the others costs no more than in float32, and no row suffers from its neighbours."""
    weight = stored(64, 640, dtype)
    x = normal(6, 640)
    x[0, 100] = 3000
    x[1] *= 1e-20
    x[2] *= 1e20
    x[3, 64:] = 0
    x[4] = 1
    assert_noise(multiplied(path, x, weight)[0], x, weight)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", PACKINGS)
def test_zeros_give_exactly_zero(path: str, dtype: str) -> None:
    assert not multiplied(path, np.zeros((3, 200), np.float32), stored(40, 200, dtype))[0].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n_new", [1, 20])
def test_what_is_not_finite_stays_so_in_its_row_alone(path: str, dtype: str, bad: float, n_new: int) -> None:
    weight, x = stored(40, 200, dtype), normal(n_new, 200)
    clean = multiplied(path, x, weight)[0]
    x[0, 130] = bad
    found = multiplied(path, x, weight)[0]
    assert not np.isfinite(found[0]).any()
    np.testing.assert_array_equal(found[1:], clean[1:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.usefixtures("any_threads")
def test_a_number_depends_on_no_other_row_nor_on_the_threads(path: str, dtype: str) -> None:
    """Bit by bit; only a few tokens may go another way than many."""
    weights, x = [stored(m, 300, dtype) for m in (96, 64, 40)], normal(37, 300)
    together = multiplied(path, x, *weights)
    for weight, y in zip(weights, together, strict=True):
        np.testing.assert_array_equal(multiplied(path, x, weight)[0], y)
        np.testing.assert_array_equal(multiplied(path, x[5:22], weight)[0], y[5:22])
        np.testing.assert_array_equal(multiplied(path, x[5:7], weight)[0], multiplied(path, x[2:9], weight)[0][3:5])
    numba.set_num_threads(1)
    for y, alone in zip(together, multiplied(path, x, *weights), strict=True):
        np.testing.assert_array_equal(alone, y)


@pytest.mark.skipif("amx" not in PATHS, reason="this processor has no matrix unit")
@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize(("bytes_", "panels"), [(1, 1), (192 * 16 * 3, 2), (1 << 20, 2)])
def test_passes_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch, dtype: str, bytes_: int, panels: int) -> None:
    weight, x = stored(70, 700, dtype), normal(50, 700)
    whole = multiplied("amx", x, weight)[0]
    monkeypatch.setattr("npllama.kernels.quantised_tiles._PASS_BYTES", bytes_)
    monkeypatch.setattr("npllama.kernels.quantised_tiles._PASS_PANELS", panels)
    np.testing.assert_array_equal(multiplied("amx", x, weight)[0], whole)


@pytest.mark.parametrize("dtype", PACKINGS)
def test_linear_chooses_by_the_dtype_and_adds_the_bias(dtype: str) -> None:
    weight, x = stored(40, 100, dtype), normal(3, 100)
    bias = Tensor(normal(40), "float32")
    for path in (*PATHS, None):
        y = matmul.products(path).linear(x, weight, bias)
        np.testing.assert_allclose(y, ops.linear(x.astype(np.float64), weight, bias), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", PACKINGS)
def test_rows_of_a_stack_are_multiplied_where_they_lie(dtype: str) -> None:
    stack, x = stored(120, 200, dtype), normal(4, 200)
    for path in PATHS:
        whole = multiplied(path, x, stack)[0]
        np.testing.assert_array_equal(multiplied(path, x, stack.rows(40, 80))[0], whole[:, 40:80])


@pytest.mark.parametrize("columns", [1, 5, 16])
def test_digits_stand_for_the_numbers_to_float32s_last_bit(columns: int) -> None:
    x = normal(21, 150)
    x[:, 7] *= 100
    packed, steps, sums = digits.pack(x, columns)
    panels, groups = -(-len(x) // columns), n_groups(150)
    by_digit = packed.reshape(panels, groups, 3, 16, columns, 4).astype(np.float64)
    integers = (by_digit * [[[[65536.0]]], [[[256.0]]], [[[1.0]]]]).sum(axis=2)  # (panels, groups, 16, C, 4)
    step = steps[: panels * groups * columns].reshape(panels, groups, 1, columns, 1)
    numbers = (integers * step).transpose(0, 3, 1, 2, 4).reshape(panels * columns, groups * 64)
    padded = np.zeros_like(numbers)
    padded[:21, :150] = x
    largest = np.abs(padded).reshape(-1, groups, 64).max(axis=2).repeat(64, axis=1)
    assert (np.abs(numbers - padded) <= largest * 2**-22).all()
    total = numbers.reshape(panels, columns, groups, 64).sum(axis=3).transpose(0, 2, 1)
    np.testing.assert_allclose(sums[: total.size], total.reshape(-1), rtol=1e-5, atol=1e-5)


def test_the_portable_path_is_the_one_of_the_module_that_says_so() -> None:
    assert {PRODUCTS[dtype]["portable"] for dtype in PACKINGS} == {quantised.multiply}
