"""Number types: every bfloat16 there is, and rounding as torch and ml_dtypes do it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.dtypes import PACKINGS, STORAGE, Array, Tensor, cast, n_groups, narrow, pack, unpack, widen
from npllama.errors import UnsupportedError

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


def hard_floats() -> Array:
    """Return float32 numbers of every exponent: random, on and beside the ties, and NaN of all kinds."""
    rng = np.random.default_rng(0)
    exponents = np.repeat(np.arange(256, dtype=np.uint32), 64) << np.uint32(23)
    mantissas = rng.integers(0, 1 << 23, exponents.size, dtype=np.uint32)
    ties = (mantissas & np.uint32(0x7F0000)) | np.uint32(0x8000)
    bits = np.concatenate([exponents | part for part in (mantissas, ties, ties - 1, ties + 1)])
    return np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)


@pytest.mark.parametrize("to", [np.float32, np.float64])
def test_every_bfloat16_widens_exactly(to: type) -> None:
    with np.errstate(invalid="ignore"):
        expected = ALL_BITS.view(ml_dtypes.bfloat16).astype(np.float32).astype(to)
    found = widen(ALL_BITS, "bfloat16", to)
    assert found.dtype == to
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == (ALL_BITS >= 0x8000)).all()


def test_every_bfloat16_survives_the_way_there_and_back() -> None:
    back = narrow(widen(ALL_BITS, "bfloat16"), "bfloat16")
    nan = np.isnan(widen(ALL_BITS, "bfloat16"))
    np.testing.assert_array_equal(back[~nan], ALL_BITS[~nan])
    assert np.isnan(widen(back[nan], "bfloat16")).all()


def test_every_float16_widens_exactly() -> None:
    found = widen(ALL_BITS.view(np.float16), "float16")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, ALL_BITS.view(np.float16).astype(np.float64))


@pytest.mark.torch
def test_rounding_is_torch_s() -> None:
    torch = pytest.importorskip("torch")
    values = hard_floats()
    found = narrow(values, "bfloat16")
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    np.testing.assert_array_equal(found[~nan], theirs[~nan])
    assert np.isnan(widen(found[nan], "bfloat16")).all()
    assert not np.isnan(widen(found[~nan], "bfloat16")).any()


@given(st.floats(width=32, allow_nan=False))
def test_rounding_picks_the_nearest_and_the_even_one_of_two(value: float) -> None:
    bits = int(narrow(np.array([value], np.float32), "bfloat16")[0])
    magnitude, exact = bits & 0x7FFF, abs(value)
    below, here, above = (
        float(widen(np.array([max(magnitude + step, 0)], np.uint16), "bfloat16", np.float64)[0]) for step in (-1, 0, 1)
    )
    if here == np.inf:  # from halfway between the largest number and the next power of two on
        assert exact >= 2.0**128 - 2.0**119
        return
    distance = abs(exact - here)
    assert distance <= abs(exact - below)
    if above != np.inf:
        assert distance <= abs(above - exact)
        if distance in (abs(exact - below), abs(above - exact)) and distance > 0:
            assert magnitude % 2 == 0


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # a tie goes to the even one, below
        (0x3F818000, 0x3F82),  # ... or above
        (0x3F808001, 0x3F81),  # just above a tie
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity
        (0x7F800000, 0x7F80),  # infinity stays
        (0x00000001, 0x0000),  # the smallest number vanishes
        (0x00008001, 0x0001),  # subnormals are kept
        (0x80000000, 0x8000),  # minus zero
    ],
)
def test_rounding_by_hand(bits: int, rounded: int) -> None:
    assert narrow(np.array([bits], np.uint32).view(np.float32), "bfloat16").tolist() == [rounded]


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FBFFFFF, 0x7FFFFFFF, 0xFF800001, 0xFFC00000])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_a_nan_stays_one_without_a_warning(bits: int, target: str) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    assert np.isnan(widen(narrow(value, target), target)).all()
    assert np.isnan(widen(value, "float32", np.float64)).all()


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_a_double_that_is_too_large_becomes_infinity_without_a_warning(target: str) -> None:
    np.testing.assert_array_equal(widen(narrow(np.array([1e300, -1e300]), target), target), [np.inf, -np.inf])


def test_cast_keeps_bits_when_there_is_nothing_to_do() -> None:
    assert cast(ALL_BITS, "bfloat16", "bfloat16") is ALL_BITS
    values = np.ones(3, np.float32)
    assert cast(values, "float32", "float32") is values


def test_cast_of_doubles_rounds_to_float32_once() -> None:
    values = np.array([1 + 2.0**-24 + 2.0**-50, 0.1, 1e-40])
    np.testing.assert_array_equal(cast(values, "float64", "float32"), values.astype(np.float32))


@pytest.mark.parametrize("target", ["float16", "int8", "int4", "float64"])
def test_other_storage_is_refused(target: str) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot be stored as {target}"):
        narrow(np.ones(1, np.float32), target)


def test_storage_is_little_endian_and_of_the_right_width() -> None:
    for name, dtype in STORAGE.items():
        assert dtype.newbyteorder("<") == dtype, name
        assert dtype.itemsize * 8 == (
            8 if name == "bool" else 16 if name == "bfloat16" else np.dtype(name).itemsize * 8
        )


def test_tensor_gives_numbers_of_any_part() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for dtype in ("float32", "bfloat16"):
        tensor = Tensor(narrow(values, dtype), dtype)
        assert tensor.shape == (3, 4)
        assert tensor.nbytes == (48 if dtype == "float32" else 24)
        np.testing.assert_array_equal(tensor.numbers(), values)
        np.testing.assert_array_equal(tensor.numbers(1), values[1])
        np.testing.assert_array_equal(tensor.numbers([2, 0], np.float64), values[[2, 0]])
        assert tensor.numbers(1, np.float64).dtype == np.float64


def test_numbers_of_a_float32_tensor_are_not_copied() -> None:
    values = np.ones((2, 2), np.float32)
    assert np.shares_memory(Tensor(values, "float32").numbers(), values)


# --- small integers in groups --------------------------------------------------------------------------------------


def quantised(dtype: str, rows: tuple[int, ...], width: int, seed: int = 0) -> tuple[Tensor, Array]:
    """Return a tensor of random integers, scales and minima, and its numbers by the formula, one by one."""
    rng = np.random.default_rng(seed)
    packing = PACKINGS[dtype]
    lowest = 0 if packing.has_minima else -packing.highest
    integers = rng.integers(lowest, packing.highest, (*rows, n_groups(width), 64), endpoint=True)
    scales, minima = (narrow(rng.normal(size=integers.shape[:-1]).astype(np.float32), "bfloat16") for _ in range(2))
    tensor = Tensor(pack(integers, packing), dtype, scales, minima if packing.has_minima else None, width)
    numbers = np.empty((*rows, width))
    for place in np.ndindex(numbers.shape):
        group = (*place[:-1], place[-1] // 64)
        scale, minimum = (float(bits.view(ml_dtypes.bfloat16)) for bits in (scales[group], minima[group]))
        numbers[place] = scale * integers[group][place[-1] % 64] + (minimum if packing.has_minima else 0)
    return tensor, numbers


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize(("rows", "width"), [((3,), 128), ((5,), 65), ((2, 3), 7), ((1,), 64)])
def test_quantised_numbers_are_scale_times_integer_plus_minimum(dtype: str, rows: tuple[int, ...], width: int) -> None:
    tensor, numbers = quantised(dtype, rows, width)
    assert tensor.shape == numbers.shape
    exact = tensor.numbers(to=np.float64)
    assert exact.dtype == np.float64
    np.testing.assert_array_equal(exact, numbers)
    single = tensor.numbers()
    assert single.dtype == np.float32
    assert single.flags.c_contiguous
    np.testing.assert_allclose(single, numbers, rtol=0, atol=2**-23 * np.abs(numbers).max())


def test_int8_numbers_are_exact_in_float32_too() -> None:
    tensor, numbers = quantised("int8", (4,), 200)
    np.testing.assert_array_equal(tensor.numbers(), numbers)


@pytest.mark.parametrize("dtype", PACKINGS)
@pytest.mark.parametrize("index", [1, slice(1, 3), [2, 0], np.array([], int), np.array([[0, 3]])])
def test_quantised_numbers_of_any_rows(dtype: str, index: Any) -> None:
    tensor, numbers = quantised(dtype, (4,), 100)
    np.testing.assert_array_equal(tensor.numbers(index, np.float64), numbers[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *PACKINGS])
def test_rows_is_a_tensor_on_the_same_memory(dtype: str) -> None:
    if dtype in PACKINGS:
        tensor, _ = quantised(dtype, (6,), 70)
    else:
        tensor = Tensor(narrow(np.arange(24, dtype=np.float32).reshape(6, 4), dtype), dtype)
    part = tensor.rows(2, 5)
    assert part.shape == (3, tensor.shape[1])
    np.testing.assert_array_equal(part.numbers(), tensor.numbers(slice(2, 5)))
    assert all(np.shares_memory(mine, whole) for mine, whole in zip(part.parts, tensor.parts, strict=True))


def test_nbytes_counts_integers_scales_and_minima() -> None:
    assert quantised("int8", (10,), 128)[0].nbytes == 10 * (128 + 2 * 2)
    assert quantised("int4", (10,), 128)[0].nbytes == 10 * (64 + 2 * 2 + 2 * 2)
    assert quantised("int4", (10,), 65)[0].nbytes == 10 * (64 + 2 * 2 + 2 * 2)


@pytest.mark.parametrize("dtype", PACKINGS)
def test_packing_is_undone_by_unpacking(dtype: str) -> None:
    packing = PACKINGS[dtype]
    lowest = 0 if packing.has_minima else -packing.highest
    integers = np.random.default_rng(0).integers(lowest, packing.highest, (3, 2, 64), endpoint=True)
    rows = pack(integers, packing)
    assert rows.dtype == STORAGE[packing.storage]
    assert rows.shape == (3, packing.row_bytes(128))
    np.testing.assert_array_equal(unpack(rows, packing), integers)


def test_a_byte_of_int4_holds_numbers_half_a_group_apart() -> None:
    integers = np.zeros((1, 64), np.int64)
    integers[0, 5], integers[0, 37] = 3, 12
    assert pack(integers, PACKINGS["int4"])[5] == 3 + 16 * 12
