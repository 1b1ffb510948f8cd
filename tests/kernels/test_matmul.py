"""Products on every path that this processor has, beside the textbook in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama import ops
from npllama.dtypes import Array, Tensor, narrow
from npllama.errors import ParameterError, UnsupportedError
from npllama.kernels import amx, features, portable
from npllama.kernels.features import PATHS, choose, host_features, ladder
from npllama.kernels.matmul import PRODUCTS, products

HERE = ladder(choose(host_features()))
ROWS = [1, 2, 5, 15, 16, 17, 48, 70]
#: Widths below and above a step, with and without a rest, and in several passes; heights around blocks of 32 and 48.
SHAPES = [(48, 32), (1, 1), (50, 33), (97, 100), (131, 576), (49, 2100)]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
needs_amx = pytest.mark.skipif("amx" not in HERE, reason="this processor has no matrix unit")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def stored(values: Array, dtype: str = "bfloat16") -> Tensor:
    data = narrow(values, dtype)
    data.setflags(write=False)  # as a memory map is
    return Tensor(data, dtype)


def noise(y: Array, truth: Array) -> float:
    """Squared error relative to the squared truth."""
    return float(((y - truth) ** 2).sum() / (truth**2).sum())


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_products_are_the_textbooks_to_float32_noise(path: str, dtype: str, m: int, n: int) -> None:
    weight = stored(normal(m, n), dtype)
    for n_new in ROWS:
        x = normal(n_new, n)
        y = products(path).linear(x, weight)
        assert y.dtype == np.float32
        assert y.flags.c_contiguous
        assert y.ctypes.data % 64 == 0
        assert noise(y, ops.linear(x.astype(np.float64), weight)) < 4e-13


@pytest.mark.torch
@pytest.mark.parametrize("path", HERE)
def test_products_are_torchs_in_float64_to_float32_noise(path: str) -> None:
    import torch

    x, weight = normal(37, 1000), normal(211, 1000)
    rounded = torch.from_numpy(weight).bfloat16()
    truth = torch.nn.functional.linear(torch.from_numpy(x).double(), rounded.double()).numpy()
    data = rounded.view(torch.int16).numpy().view(np.uint16)
    assert noise(products(path).linear(x, Tensor(data, "bfloat16")), truth) < 2e-13


@pytest.mark.parametrize("path", HERE)
@given(
    n_new=st.integers(1, 70),
    m=st.integers(1, 150),
    n=st.integers(1, 200),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
@settings(max_examples=25)
def test_products_of_any_shape(path: str, n_new: int, m: int, n: int, dtype: str) -> None:
    x, weight = normal(n_new, n), stored(normal(m, n), dtype)
    assert noise(products(path).linear(x, weight), ops.linear(x.astype(np.float64), weight)) < 4e-13


@pytest.mark.parametrize("path", HERE)
@given(x=st.lists(FINITE.filter(lambda number: number == 0 or abs(number) >= 2.0**-100), min_size=64, max_size=64))
@settings(max_examples=25)
def test_no_bit_of_the_input_is_lost(path: str, x: list[float]) -> None:
    """Each row of the identity picks one number, and what comes out is that number."""
    row = np.array([x], np.float32)
    for rows in (row, np.repeat(row, 20, axis=0)):
        np.testing.assert_array_equal(products(path).linear(rows, stored(np.eye(64, dtype=np.float32))), rows)


@pytest.mark.parametrize("path", HERE)
def test_numbers_near_nothing_count_for_almost_nothing(path: str) -> None:
    x = np.full((3, 64), 1e-39, np.float32)
    np.testing.assert_allclose(products(path).linear(x, stored(normal(64, 64))), 0, atol=1e-36)


def as_nan(payload: int) -> np.float32:
    return np.uint32(0x7F800000 + payload).view(np.float32)


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, as_nan(1), as_nan(0x8001), 3.4e38])
@pytest.mark.parametrize("n_new", [1, 20])
def test_what_is_not_finite_stays_so_and_touches_its_own_row_only(path: str, value: float, n_new: int) -> None:
    x, weight = normal(n_new, 100), stored(normal(60, 100))
    clean = products(path).linear(x, weight)
    sick = x.copy()
    sick[n_new // 2, 37] = value
    y = products(path).linear(sick, weight)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = ops.linear(sick, weight)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(y), np.isposinf(expected))
    np.testing.assert_array_equal(np.isneginf(y), np.isneginf(expected))
    others = np.arange(n_new) != n_new // 2
    np.testing.assert_array_equal(y[others], clean[others])


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_matrices_at_once_give_what_each_gives_alone(path: str, dtype: str) -> None:
    weights = [stored(normal(m, 100, seed=m), dtype) for m in (64, 48, 130)]
    for n_new in (1, 9, 40):
        x = normal(n_new, 100)
        together = products(path).linears(x, weights)
        for y, weight in zip(together, weights, strict=True):
            np.testing.assert_array_equal(y, products(path).linear(x, weight))


def test_matrices_of_different_storage_types_at_once() -> None:
    x, weights = normal(3, 64), [stored(normal(50, 64), dtype) for dtype in ("float32", "bfloat16", "float32")]
    for y, weight in zip(products().linears(x, weights), weights, strict=True):
        np.testing.assert_array_equal(y, products().linear(x, weight))


@pytest.mark.parametrize("path", HERE)
def test_a_bias_is_added_to_every_row(path: str) -> None:
    x, weights = normal(3, 64), [stored(normal(50, 64)), stored(normal(60, 64))]
    biases = [None, stored(normal(60))]
    plain, (first, second) = products(path).linears(x, weights), products(path).linears(x, weights, biases)
    np.testing.assert_array_equal(first, plain[0])
    np.testing.assert_array_equal(second, plain[1] + biases[1].numbers())


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n_new", [1, 7, 40, 130])
@pytest.mark.usefixtures("any_threads")
def test_threads_do_not_change_a_bit(path: str, dtype: str, n_new: int) -> None:
    x, weight = normal(n_new, 2100), stored(normal(300, 2100), dtype)
    results = []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        results.append(products(path).linear(x, weight))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


@needs_amx
@pytest.mark.parametrize("n", [40, 2100, 4500])
def test_in_tiles_a_row_is_the_same_bits_alone_and_among_others(n: int) -> None:
    x, weight = normal(130, n), stored(normal(120, n))
    whole = products("amx").linear(x, weight)
    for start, stop in ((0, 1), (77, 78), (3, 5), (0, 15), (10, 26), (0, 17), (60, 130)):
        part = products("amx").linear(np.ascontiguousarray(x[start:stop]), weight)
        np.testing.assert_array_equal(part, whole[start:stop])


@needs_amx
def test_in_tiles_an_output_does_not_depend_on_the_other_rows_of_the_weight() -> None:
    x, weight = normal(20, 100), stored(normal(150, 100))
    whole = products("amx").linear(x, weight)
    for start, stop in ((0, 49), (7, 60), (100, 150)):
        np.testing.assert_array_equal(products("amx").linear(x, stored_rows(weight, start, stop)), whole[:, start:stop])


def stored_rows(weight: Tensor, start: int, stop: int) -> Tensor:
    return Tensor(weight.data[start:stop], weight.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_plain_loops_a_row_alone_is_within_rounding_of_itself_among_others(dtype: str) -> None:
    """A single row is summed in an order of its own there: the difference is bounded, not zero."""
    x, weight = normal(9, 2000), stored(normal(64, 2000), dtype)
    whole = products("portable").linear(x, weight)
    scale = np.abs(x) @ np.abs(weight.numbers()).T
    for t in range(9):
        alone = products("portable").linear(np.ascontiguousarray(x[t : t + 1]), weight)
        assert np.abs(alone - whole[t]).max() <= 2**-22 * scale[t].max()


def test_plain_loops_in_several_passes_equal_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(23, 64), stored(normal(29, 64))
    whole = products("portable").linear(x, weight)
    monkeypatch.setattr(portable, "_PASS_BYTES", 8 * 64 * 4)
    np.testing.assert_array_equal(products("portable").linear(x, weight), whole)


@pytest.mark.parametrize("n_new", [1, 8, 30])
@pytest.mark.parametrize("m", [3, 128, 131])
def test_plain_loops_shared_between_threads_equal_those_on_one(
    monkeypatch: pytest.MonkeyPatch, n_new: int, m: int
) -> None:
    x, weight = normal(n_new, 64), stored(normal(m, 64))
    results = []
    for small in (0, 1 << 60):
        monkeypatch.setattr(portable, "_SMALL", small)
        results.append(products("portable").linear(x, weight))
    np.testing.assert_array_equal(*results)


# --- which path -------------------------------------------------------------------------------------------------


def test_the_best_path_is_the_first_whose_needs_are_met() -> None:
    everything = frozenset().union(*PATHS.values())
    assert choose(everything) == "amx"
    assert choose(everything - {"amx-bf16"}) == "avx512bf16"
    assert choose(everything - {"avx512bf16"}) == "avx512"
    assert choose(everything - {"avx512f"}) == "avx2"
    assert choose({"avx2", "fma"}) == "avx2"
    assert choose(everything - {"fma"}) == "portable"
    assert choose(frozenset()) == "portable"


def test_a_path_can_be_forced_where_it_can_run() -> None:
    assert choose(PATHS["amx"] | PATHS["avx512"], "avx512") == "avx512"
    assert choose(frozenset(), "portable") == "portable"
    with pytest.raises(UnsupportedError, match=r"amx-tile.*Choose 'portable'"):
        choose(PATHS["avx512"], "amx")
    with pytest.raises(ParameterError, match="'sse', expected one of amx, avx512bf16, avx512, avx2, portable"):
        choose(frozenset(), "sse")


def test_kernels_are_chosen_by_what_numba_is_told_to_compile_for() -> None:
    script = "from npllama.kernels.features import choose, host_features; print(choose(host_features()))"
    for told, path in (("+avx2,+fma,-avx512f", "avx2"), ("+sse4.2,-avx2", "portable")):
        environment = {**os.environ, "NUMBA_CPU_FEATURES": told}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == path


def test_a_ladder_leads_down_to_plain_loops() -> None:
    assert ladder("amx") == ("amx", "avx512bf16", "avx512", "avx2", "portable")
    assert ladder("portable") == ("portable",)


def test_every_storage_type_has_plain_loops() -> None:
    assert all("portable" in by_path for by_path in PRODUCTS.values())
    assert all(set(by_path) <= set(PATHS) for by_path in PRODUCTS.values())


def test_forced_plain_loops_use_nothing_else() -> None:
    chosen = products("portable")
    assert chosen.path == "portable"
    assert chosen.by_dtype["bfloat16"] is chosen.by_dtype["float32"] is portable.multiply


def test_what_cannot_be_gated_at_once_is_declined() -> None:
    x, gate, up, bias = normal(40, 64), stored(normal(48, 64)), stored(normal(48, 64)), stored(normal(48))
    for path in HERE:
        product = products(path)
        assert product.gated_linears(x[:16], gate, up, (None, None), "silu") is None  # few
        assert product.gated_linears(x, gate, up, (bias, None), "silu") is None
        assert product.gated_linears(x, gate, up, (None, bias), "silu") is None
        assert product.gated_linears(x, gate, stored(normal(48, 64), "float32"), (None, None), "silu") is None
        is_declined = product.gated_linears(x, gate, up, (None, None), "silu") is None
        assert is_declined == (path in ("amx", "portable"))


@needs_amx
def test_bfloat16_weights_meet_the_matrix_unit_where_there_is_one() -> None:
    assert products().path == "amx"
    assert products().by_dtype["bfloat16"] is amx.multiply_bfloat16


def test_without_leave_from_the_system_the_matrix_unit_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_may_use_tiles", lambda: False)
    assert not any(name.startswith("amx") for name in host_features.__wrapped__())
    monkeypatch.undo()
    monkeypatch.setattr(features.sys, "platform", "win32")
    assert not any(name.startswith("amx") for name in host_features.__wrapped__())
