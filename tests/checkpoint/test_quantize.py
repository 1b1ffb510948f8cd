"""The integers that are chosen: close to the best there are, whatever the numbers."""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npllama.checkpoint.quantize import quantize
from npllama.dtypes import LARGEST, PACKINGS, Array, Tensor, widen

RNG = np.random.default_rng(0)


def stored(values: Array, dtype: str, importance: Array | None = None) -> Tensor:
    data, *rest = quantize(values.astype(np.float32), dtype, importance)
    scales, minima = (*rest, None)[:2]
    return Tensor(data, dtype, scales, minima, values.shape[-1])


def sqnr(values: Array, dtype: str) -> float:
    error = values - stored(values, dtype).numbers(to=np.float64)
    return 10 * float(np.log10((values**2).sum() / (error**2).sum()))


def gaussian(*shape: int) -> Array:
    return (RNG.normal(size=shape) * 0.02).astype(np.float32)


def test_signal_to_noise_of_gaussian_weights_is_what_the_module_promises() -> None:
    weights = gaussian(256, 1024)
    assert sqnr(weights, "int8") == pytest.approx(44.7, abs=0.1)
    assert sqnr(weights, "int4") == pytest.approx(21.5, abs=0.1)


@pytest.mark.parametrize(("dtype", "format_", "gain"), [("int8", "Q8_0", -2.4), ("int4", "Q4_0", 0.1)])
def test_error_beside_that_of_ggufs_formats(dtype: str, format_: str, gain: float) -> None:
    """At 8.25 bits instead of 8.5 at most 2.4 dB less; at the same 4.5 bits always better."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[format_]
    for weights in (gaussian(64, 1024), RNG.standard_t(4, (64, 1024)).astype(np.float32)):
        theirs = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
        their_sqnr = 10 * np.log10((weights**2).sum() / ((weights - theirs) ** 2).sum())
        assert sqnr(weights, dtype) > their_sqnr + gain


def test_int4_is_close_to_the_best_line_that_a_search_finds() -> None:
    """Compared with every scale and minimum of a fine grid, the squared error is a tenth larger."""
    groups = gaussian(40, 64).astype(np.float64)
    found = ((groups - stored(groups, "int4").numbers(to=np.float64)) ** 2).sum(axis=1)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    best = np.full(len(groups), np.inf)
    for a, b in product(np.linspace(-0.05, 0.25, 31), repeat=2):
        start, end = low + a * (high - low), high - b * (high - low)
        q = np.clip(np.rint((groups - start) / (end - start) * 15), 0, 15)
        best = np.minimum(best, ((groups - (start + (end - start) / 15 * q)) ** 2).sum(axis=1))
    assert (found <= 1.5 * best).all()
    assert found.sum() <= 1.1 * best.sum()


@pytest.mark.parametrize("dtype", PACKINGS)
def test_what_the_format_holds_exactly_is_kept(dtype: str) -> None:
    """All its integers, with a scale and a minimum of few bits."""
    integers = np.arange(64) % 16 if dtype == "int4" else np.linspace(-127, 127, 64).round()
    for scale, minimum in ((1.0, 0.0), (0.25, -2.0 if dtype == "int4" else 0.0)):
        values = scale * integers[None] + minimum
        np.testing.assert_array_equal(stored(values, dtype).numbers(), values)


@pytest.mark.parametrize("dtype", PACKINGS)
def test_equal_numbers_stay_equal_and_zeros_zero(dtype: str) -> None:
    np.testing.assert_array_equal(stored(np.zeros((2, 100)), dtype).numbers(), np.zeros((2, 100)))
    found = stored(np.full((1, 100), 7.3), dtype).numbers()
    assert np.ptp(found[0, :64]) == np.ptp(found[0, 64:]) == 0
    assert found == pytest.approx(7.3, rel=2**-8)


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize("width", [1, 5, 63, 64, 65, 100])
def test_a_short_last_group_is_as_good_as_one_alone(dtype: str, width: int) -> None:
    weights = gaussian(3, width) + np.float32(1)
    whole = stored(weights, dtype).numbers()
    assert whole.shape == weights.shape
    last = (width - 1) // 64 * 64
    np.testing.assert_array_equal(whole[:, last:], stored(weights[:, last:], dtype).numbers())
    step = np.ptp(weights) / 15 if dtype == "int4" else np.abs(weights).max() / 127
    assert np.abs(whole - weights).max() <= 1.5 * step


@pytest.mark.parametrize("dtype", PACKINGS)
def test_leading_axes_are_rows(dtype: str) -> None:
    weights = gaussian(2, 3, 70)
    parts, flat = quantize(weights, dtype), quantize(weights.reshape(6, 70), dtype)
    for part, row in zip(parts, flat, strict=True):
        assert part.shape[:2] == (2, 3)
        np.testing.assert_array_equal(part.reshape(row.shape), row)


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_a_group_with_no_number_is_none_and_its_neighbours_are_untouched(dtype: str, bad: float) -> None:
    weights = gaussian(3, 128)
    clean = stored(weights, dtype).numbers()
    weights[1, 70] = bad
    found = stored(weights, dtype).numbers()
    assert np.isnan(found[1, 64:]).all()
    found[1, 64:] = clean[1, 64:]
    np.testing.assert_array_equal(found, clean)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 130)),
        elements=st.floats(-float(LARGEST), float(LARGEST), width=32),
    ),
    st.sampled_from(sorted(PACKINGS)),
)
def test_any_numbers_are_stored_within_their_range(values: Array, dtype: str) -> None:
    """No overflow, no NaN out of numbers, and never further away than the group is wide."""
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        tensor = stored(values, dtype)
    found = tensor.numbers(to=np.float64)
    assert np.isfinite(found).all()
    for start in range(0, values.shape[1], 64):
        group = values[:, start : start + 64].astype(np.float64)
        largest = np.abs(group).max(axis=1, keepdims=True)
        span = np.ptp(group, axis=1, keepdims=True) if dtype == "int4" else 2 * largest / 127
        tiny = 2.0**-120
        assert (np.abs(found[:, start : start + 64] - group) <= 0.5 * span + largest * 2**-7 + tiny).all()


@pytest.mark.parametrize(("dtype", "gain"), [("int8", 10), ("int4", 8)])
def test_what_counts_comes_out_more_exactly(dtype: str, gain: float) -> None:
    """Three columns of 128 that count a hundred times as much as the others, in dB of all that counts."""
    weights, importance = gaussian(256, 128), np.ones(128)
    importance[[3, 40, 90]] = 1e4
    plain, chosen = (
        importance * (weights - stored(weights, dtype, given).numbers(to=np.float64)) ** 2
        for given in (None, importance)
    )
    assert 10 * np.log10(plain.sum() / chosen.sum()) > gain


@pytest.mark.parametrize("dtype", PACKINGS)
def test_what_counts_twice_as_much_everywhere_counts_alike(dtype: str) -> None:
    weights, importance = gaussian(8, 100), RNG.random(100)
    for part, same in zip(quantize(weights, dtype, importance), quantize(weights, dtype, 2 * importance), strict=True):
        np.testing.assert_array_equal(part, same)
    for part, same in zip(quantize(weights, dtype, np.zeros(100)), quantize(weights, dtype), strict=True):
        np.testing.assert_array_equal(part, same)


def test_no_weight_is_cut_off_by_the_scale_of_int8() -> None:
    """However little it counts: nothing is further away than half a step, and no step is 1.51 times the least."""
    weights, importance = gaussian(64, 128), np.zeros(128)
    importance[::9] = RNG.random(15)
    tensor = stored(weights, "int8", importance)
    largest = np.abs(weights.reshape(64, 2, 64)).max(axis=-1)
    scales = widen(tensor.scales, "bfloat16")
    assert (scales < 1.51 * largest / 127.5 * (1 + 2**-7)).all()
    error = np.abs(weights - tensor.numbers()).reshape(64, 2, 64)
    assert (error <= 0.5 * scales[..., None] * (1 + 1e-4)).all()


def test_scales_are_positive_bfloat16() -> None:
    scales = quantize(gaussian(8, 256), "int8")[1]
    assert scales.dtype == np.uint16
    assert (scales.view(ml_dtypes.bfloat16) > 0).all()
