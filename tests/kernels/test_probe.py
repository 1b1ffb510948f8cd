"""The limits of the machine: the right work is counted, whatever the clock says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numba
import numpy as np
import pytest

from npllama.dtypes import Array, Tensor
from npllama.kernels import matmul, probe
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.llvm import DOTS
from npllama.kernels.tiles import tile_shapes
from npllama.kernels.vector_products import BLOCKS
from npllama.rounding import ACTIVATIONS

needs_vectors = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")
needs_amx = pytest.mark.skipif(not PATHS["amx"] <= host_features(), reason="this processor has no matrix unit")


def clock(seconds: float) -> Callable[[], float]:
    """Return a clock on which everything takes so long."""
    times = iter([10.0, 10.0 + seconds])
    return lambda: next(times)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_number_is_read_once(parts: int) -> None:
    numbers = np.arange(996, dtype=np.float32)
    sums = np.empty(parts, np.float32)
    probe._stream(numbers, sums)
    assert sums.tolist() == numbers.reshape(parts, -1).sum(axis=1).tolist()


def test_the_chains_multiply_and_add_as_often_as_they_are_counted() -> None:
    sums = np.empty(2, np.float32)
    probe._multiply_add(np.float32(0.5), np.float32(1), 3, sums)
    expected = sum(16 * (((first * 0.5 + 1) * 0.5 + 1) * 0.5 + 1) for first in range(8))
    assert sums.tolist() == [expected, expected]


def test_rates_are_work_by_time() -> None:
    assert probe.read_rate(np.zeros(1000, np.float32), clock(0.5)) == 8000
    threads = numba.get_num_threads()
    assert probe.multiply_add_rate(clock(0.25)) == 4 * threads * (1 << 20) * 2 * 8 * 16


@pytest.mark.parametrize("count", [1, 63, 64, 100, 1000])
def test_a_part_of_any_length_is_read_to_its_end(count: int) -> None:
    numbers, sums = np.arange(count, dtype=np.float32), np.empty(1, np.float32)
    probe._stream(numbers, sums)
    assert sums.tolist() == [numbers.sum()]


@needs_vectors
@pytest.mark.parametrize("numbers", ["uint16", "int16", "int8", "int4"])
def test_words_are_multiplied_and_added_as_often_as_they_are_counted(numbers: str) -> None:
    work, n_lines = probe.address_of_words(numbers), 8 if numbers == "int4" else 1
    integers = np.array([1, 2, 4, 1, 2, 8, 4, 1, 2, 4, *[0] * 62])  # each line has its own, and rounds begin with three
    kind = "<i2" if numbers == "int16" else "<i1"
    values = integers.astype(np.float32).view(np.uint32) >> 16 if numbers == "uint16" else integers
    lines = np.repeat(values.astype("<u2" if numbers == "uint16" else kind)[:, None], 64, axis=1).view(np.uint8)[:, :64]
    found = np.empty((2, probe._SUMS_OF_WORDS, 16), np.float32)
    probe._outer_products(work, np.ascontiguousarray(lines), 3, found)
    per_line = 2 if numbers.endswith("16") else 4
    blocks = 1 if numbers == "int4" else BLOCKS  # each with a line of its own, too
    expected = [sum(per_line * integers[i + j] * integers[i + j + b] for i in range(3) for j in range(n_lines))
                for b in range(blocks)]  # fmt: skip
    begun = 0 if numbers == "uint16" else lines[0, :4].copy().view(np.int32)[0]  # sums of integers begin with a word
    sums = found if numbers == "uint16" else found.view(np.int32)
    for b, one in enumerate(np.split(sums, blocks, axis=1)):
        assert np.unique(one).tolist() == [begun + expected[b]]


@needs_vectors
@pytest.mark.parametrize(("numbers", "products"), [("uint16", 2), ("int16", 2), ("int8", 4), ("int4", 32)])
def test_the_rate_of_words_counts_two_operations_for_every_product(numbers: str, products: int) -> None:
    operations = 2 * 16 * probe._SUMS_OF_WORDS * products * (1 << 20) * numba.get_num_threads()
    assert probe.word_rate(numbers, clock(0.5)) == 2 * operations


@needs_amx
@pytest.mark.parametrize(("numbers", "sums", "products"), [("uint16", np.float32, 32), ("int8", np.int32, 64)])
def test_the_matrix_unit_multiplies_and_adds_as_often_as_it_is_counted(numbers: str, sums: type, products: int) -> None:
    tile = np.full((16, products), 0x4000 if numbers == "uint16" else 2).astype(numbers)  # 2, in either
    found = np.full((2, 4, 16, 16), -1, sums)
    probe._tile_dots(tile, 3, tile_shapes(*[64] * 8), found)
    assert np.unique(found).tolist() == [3 * products * 2 * 2]


@needs_amx
@pytest.mark.parametrize(("numbers", "products"), [("uint16", 32), ("int8", 64)])
def test_the_rate_of_the_matrix_unit_counts_two_operations_for_every_product(numbers: str, products: int) -> None:
    operations = 2 * 16 * 16 * products * 4 * (1 << 17) * numba.get_num_threads()
    assert probe.tile_rate(numbers, clock(0.5)) == 2 * operations


def test_the_product_is_the_one_that_is_given_and_runs_once_before_four_that_are_timed() -> None:
    asked = []

    def linear(x: Array, weight: Tensor) -> Array:
        asked.append((x.shape, weight.shape))
        return x

    weight = Tensor(np.ones((5, 6), np.float32), "float32")
    assert probe.product_rate(linear, np.ones((4, 6), np.float32), weight, clock(8.0)) == 4 * 5 * 6
    assert asked == [((4, 6), (5, 6))] * 5


def test_whatever_runs_in_tiles_is_held_against_the_matrix_unit_and_nothing_else() -> None:
    exact = {(path, "float32", dtype) for dtype, by_path in matmul.PRODUCTS.items() for path in by_path}
    rounding = {
        (path, activations, dtype)
        for activations, by_path in matmul.ROUNDED.items()
        for path, by_dtype in by_path.items()
        for dtype in by_dtype
    }
    in_tiles = {key for key in exact | rounding if key[0] == "amx"}
    every = {(path, kind, dtype) for path in PATHS for kind in ACTIVATIONS for dtype in matmul.PRODUCTS}
    assert {key for key in every if "matrix unit" in probe.arithmetic(*key).name} == in_tiles


@pytest.mark.parametrize(
    ("key", "name", "rate"),
    [
        (("amx", "float32", "bfloat16"), "the matrix unit, three parts", 2e12),
        (("amx", "float32", "int4"), "the matrix unit, three digits", 4e12),
        (("amx", "bfloat16", "int4"), "the matrix unit, one part", 6e12),
        (("amx", "float32", "float32"), "vector registers", 4e11),
        (("avx512bf16", "bfloat16", "bfloat16"), "vector registers, pairs of bfloat16", 6e12),
        (("avx512", "bfloat16", "bfloat16"), "vector registers", 4e11),
        (("avx512", "int8", "int4"), "vector registers, four bytes a word", 6e12),
        (("avx2", "int8", "int8"), f"vector registers, {'four bytes a word' if DOTS else 'pairs of int16'}", 6e12),
        (("avx2", "int8", "int4"), f"vector registers, {'four bytes a word' if DOTS else 'sums of 16 bits'}", 6e12),
        (("avx2", "float32", "int8"), "vector registers", 4e11),
        (("portable", "bfloat16", "bfloat16"), "vector registers", 4e11),
    ],
)
def test_a_product_in_three_parts_is_allowed_a_third_of_the_unit(
    key: tuple[str, str, str], name: str, rate: float
) -> None:
    unit = probe.arithmetic(*key)
    measured = {"vector registers": 4e11, "the matrix unit, three digits": 12e12}.get(name, 6e12)
    assert unit.name == name
    assert replace(unit, rate=lambda: measured).limit() == rate
