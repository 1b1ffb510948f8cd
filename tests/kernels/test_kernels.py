"""Every kernel beside its op in float64, on the same input."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

from npllama import kernels, ops
from npllama.cache import CACHE_DTYPES
from npllama.dtypes import Array, Tensor, narrow
from npllama.kernels import jit, warmup
from npllama.kernels.features import choose, host_features
from npllama.kernels.paths import twins

RNG = np.random.default_rng(11)
ROWS = [1, 2, 4, 5, 33]
STORAGE = ["float32", "bfloat16"]


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def stored(values: Array, dtype: str) -> Tensor:
    data = narrow(values, dtype)
    data.setflags(write=False)  # as a memory map is
    return Tensor(data, dtype)


def wide(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(np.float64) for array in arrays)


def assert_close(kernel: Array, op: Array, ulps: float = 16) -> None:
    """Equal to within some float32 rounding steps of the largest number."""
    assert kernel.dtype == np.float32
    assert kernel.shape == op.shape
    np.testing.assert_allclose(kernel, op, rtol=0, atol=ulps * 2**-24 * np.abs(op).max())


@pytest.mark.parametrize("n_new", ROWS)
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize(("m", "n"), [(31, 64), (100, 37), (3, 8), (1, 1)])
def test_linear(n_new: int, dtype: str, m: int, n: int) -> None:
    x, weight = normal(n_new, n), stored(normal(m, n), dtype)
    assert_close(kernels.linear(x, weight), ops.linear(*wide(x), weight))


@pytest.mark.parametrize("dtype", STORAGE)
def test_linears(dtype: str) -> None:
    x, weights = normal(3, 16), [stored(normal(m, 16), dtype) for m in (8, 4, 4)]
    for kernel, op in zip(kernels.linears(x, weights), ops.linears(*wide(x), weights), strict=True):
        assert_close(kernel, op)


@pytest.mark.parametrize("n_new", ROWS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_rms_norm(n_new: int, dtype: str) -> None:
    x, weight = normal(n_new, 100) * 0.01, stored(RNG.uniform(0.5, 1.5, 100).astype(np.float32), dtype)
    assert_close(kernels.rms_norm(x, weight, 1e-5), ops.rms_norm(*wide(x), weight, 1e-5))


@pytest.mark.parametrize("n_new", ROWS)
def test_apply_rope_has_the_bits_of_its_op(n_new: int) -> None:
    x, freqs = normal(n_new, 3, 10), (10_000.0 ** -np.linspace(0, 1, 5)).astype(np.float32)
    cos, sin = ops.rope_tables(freqs, 1000, n_new)
    turned = kernels.apply_rope(x, cos, sin)
    np.testing.assert_array_equal(turned, ops.apply_rope(x, cos, sin))
    assert_close(turned, ops.apply_rope(*wide(x), cos, sin))


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 40)])
def test_softmax(shape: tuple[int, ...]) -> None:
    scores = normal(*shape) * 30
    scores[..., 0] = -np.inf
    before = scores.copy()
    assert_close(kernels.softmax(scores), ops.softmax(*wide(scores)))
    np.testing.assert_array_equal(scores, before)


ACTIVATIONS = sorted(ops.ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range_of_float32(activation: str) -> None:
    ends = np.float32([[-3e38, -200, -88, -87, 0, 87, 88, 89, 3e38]])
    gate, up = np.concatenate([normal(1, 500) * 30, normal(1, 500), ends], axis=1), normal(1, 1009)
    with np.errstate(over="ignore"):  # 3e38 cubed
        exact = ops.activate(*wide(gate), activation)
    # GELU's integral falls off so fast that its tail is the difference of nearly equal numbers in any float32.
    absolute = 1e-35 if activation in ("silu", "relu") else 1e-6
    np.testing.assert_allclose(kernels.activate(gate, activation), exact, rtol=1e-6, atol=absolute)
    finite = np.abs(gate) < 1e30
    glu = kernels.glu(gate, up, activation)[finite]
    np.testing.assert_allclose(glu, (exact * up)[finite], rtol=1e-6, atol=4 * absolute)


@pytest.mark.parametrize("shape", [(1, 7), (3, 100), (600, 3000)])
def test_a_sum_is_that_of_the_textbook_to_the_bit(shape: tuple[int, int]) -> None:
    x, y = normal(*shape), normal(*shape[::-1]).T
    np.testing.assert_array_equal(kernels.add(x, y), ops.add(x, y))


@pytest.mark.parametrize("n_new", ROWS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_layer_norm(n_new: int, dtype: str) -> None:
    x, weight, bias = normal(n_new, 100) + 3, stored(normal(100), dtype), stored(normal(100), dtype)
    assert_close(kernels.layer_norm(x, weight, bias, 1e-5), ops.layer_norm(*wide(x), weight, bias, 1e-5), ulps=64)


@pytest.mark.parametrize("dtype", STORAGE)
def test_expert_linear(dtype: str) -> None:
    x, stack = normal(9, 2, 64), stored(normal(4 * 48, 64), dtype)
    chosen = np.sort(np.array([RNG.permutation(4)[:2] for _ in range(9)]), axis=1)
    assert_close(kernels.expert_linear(x, chosen, stack, 4), ops.expert_linear(*wide(x), chosen, stack, 4))


def test_every_kernel_has_the_name_of_an_operation_on_every_path() -> None:
    for path in (None, "portable"):
        found = twins(path)
        assert {"linear", "linears", "attention", "attentions", "rms_norm", "glu", "expert_linear"} <= set(found)
        assert all(callable(getattr(ops, name)) for name in found)


def test_a_number_is_narrowed_to_the_bits_that_ml_dtypes_makes() -> None:
    bits = np.random.default_rng(2).integers(0, 1 << 32, 4000, dtype=np.uint32)
    bits[:8] = [0x7F800001, 0xFFC12345, 0x7F800000, 0x7F7FFFFF, 0x00000001, 0x80018000, 0x3F808000, 0x3F818000]
    numbers = bits.view(np.float32)

    @numba.njit
    def narrow(numbers: Array, stored: Array) -> None:
        for i in range(len(numbers)):
            stored[i] = jit.narrowed(numbers[i], stored)

    found, same = np.empty(len(bits), np.uint16), np.empty_like(numbers)
    narrow(numbers, found)
    narrow(numbers, same)
    with np.errstate(invalid="ignore", over="ignore"):
        np.testing.assert_array_equal(found, numbers.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(same.view(np.uint32), bits)


def test_exp_is_right_to_float32s_last_bit_and_ends_where_float32_does() -> None:
    x = np.linspace(-87, 88, 20_001, dtype=np.float32)
    y = np.array([jit.exp(value) for value in x])
    np.testing.assert_array_equal(y, y.astype(np.float32))
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=2**-23)
    assert jit.exp(np.float32(0)) == 1
    assert jit.exp(np.float32(-np.inf)) == jit.exp(np.float32(-88)) == 0
    assert jit.exp(np.float32(89)) == jit.exp(np.float32(np.inf)) == np.inf


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", STORAGE)
def test_nothing_is_left_to_compile_after_the_warm_up(dtype: str, cache_dtype: str) -> None:
    from tests.fixtures.engine import loud_model
    from tests.fixtures.loud import loud_config

    seen: list[tuple[str, int, int]] = []
    at_once = dtype != "float32" and choose(host_features()) != "portable"
    needs = warmup.Needs(dtype, cache_dtype=cache_dtype, at_once=at_once)
    warmup.compile_kernels(needs, lambda *step: seen.append(step))
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] == len(seen) - 1
    config = loud_config()
    model = loud_model(config, backend="fast", dtype=dtype, cache_dtype=cache_dtype)
    for layer in (model.weights, *model.weights.layers):
        for name in layer.__slots__:
            if isinstance(tensor := getattr(layer, name), Tensor):
                tensor.data.setflags(write=False)
    compiled = _signatures()
    for n_new in ROWS:
        model.forward(np.arange(n_new))
    assert _signatures() == compiled


def test_no_two_kernels_share_a_place_in_the_disk_cache() -> None:
    """Numba files a compiled kernel under its module and name: a second one there would get the first one's code."""
    places = [(kernel.py_func.__module__, kernel.py_func.__qualname__) for kernel in _kernels().values()]
    assert len(places) == len(set(places)) > 8


def _kernels() -> dict[int, Any]:
    """Return every compiled function of the package once, by its identity."""
    modules = [
        importlib.import_module(f"npllama.kernels.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
    ]
    return {id(value): value for module in modules for value in vars(module).values() if hasattr(value, "py_func")}


def _signatures() -> dict[str, list[str]]:
    """Return the compiled signatures of every kernel."""
    return {
        f"{kernel.py_func.__module__}.{kernel.py_func.__qualname__}": [str(found) for found in kernel.signatures]
        for kernel in _kernels().values()
    }


def test_the_cache_folder_changes_with_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    before = jit.cache_folder.__wrapped__()
    (tmp_path / "jit.py").write_text("changed")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    assert jit.cache_folder.__wrapped__() not in (None, before)


def test_kernels_compile_without_a_disk_cache_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "cache_folder", lambda: None)
    assert jit.compiled()(lambda x: x + 1)(1) == 2
