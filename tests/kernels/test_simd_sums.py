"""Instructions on many sums and on the numbers in a word, each beside what NumPy computes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import Array, narrow, widen
from npllama.kernels import simd, simd_blocks, simd_quantised, simd_sums, simd_words
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(7)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

BITS = RNG.integers(0x3000, 0x4000, (40, 32)).astype(np.uint16)  # bfloat16 below 2, of either size
FLOATS = RNG.normal(size=(16, 16)).astype(np.float32)


def run(body: str, *arrays: Array, out: Any = np.float32, size: int = 256) -> Array:
    """Compile statements about addresses a, b, c of arrays and o of the output; return the output."""
    names = "abcd"[: len(arrays)]
    scope: dict[str, Any] = {"s": simd, "u": simd_sums, "w": simd_words, "q": simd_quantised, "k": simd_blocks}
    exec(f"def kernel(o, {', '.join(names)}):\n" + "\n".join(f"    {line}" for line in body.split("; ")), scope)
    found = np.zeros(size, out)
    numba.njit(scope["kernel"])(found.ctypes.data, *(array.ctypes.data for array in arrays))
    return found


def test_sums_begin_with_nothing_with_memory_or_with_numbers() -> None:
    assert not run("u.store_sums(o, u.no_sums(16))", FLOATS).any()
    np.testing.assert_array_equal(run("u.store_sums(o, u.sums_at(a, 16))", FLOATS), FLOATS.reshape(-1))
    numbers = RNG.integers(-(1 << 31), 1 << 31, 16).astype(np.int32)
    found = run("u.store_sums(o, u.first_sums(a, 16))", numbers, out=np.int32)
    np.testing.assert_array_equal(found, numbers.repeat(16))


def test_a_cache_line_past_the_caches() -> None:
    body = "line = (o + 63) // 64 * 64; u.stream(line, q.load_floats(a, 0)); u.stream(line + 64, q.load_floats(a, 64))"
    found = run(body, FLOATS, size=64)
    (start,) = np.flatnonzero(found[:16])[:1]
    np.testing.assert_array_equal(found[start : start + 32], FLOATS.reshape(-1)[:32])
    assert np.count_nonzero(found) == 32


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_totals_are_the_sums_of_lanes_in_pairs_of_halves(count: int) -> None:
    found = run(f"u.store_totals(o, u.sums_at(a, {count}))", FLOATS, size=16)
    expected = FLOATS[:count]
    while expected.shape[1] > 1:
        low, high = np.split(expected, 2, axis=1)
        expected = low + high
    np.testing.assert_array_equal(found, np.pad(expected[:, 0], (0, 16 - count)))


def test_pairs_of_the_nearest_bfloat16() -> None:
    low, high = RNG.normal(size=(2, 16)).astype(np.float32)
    body = "s.store(o, 0, w.rounded_pair(q.load_floats(a, 0), q.load_floats(b, 0)))"
    found = run(body, low, high, out=np.uint16, size=32).reshape(16, 2)
    np.testing.assert_array_equal(found, np.stack([narrow(low, "bfloat16"), narrow(high, "bfloat16")], axis=1))


def test_bytes_become_words_of_two() -> None:
    numbers = RNG.integers(-128, 128, 64).astype(np.int8)
    for name, first in (("even_bytes", 0), ("odd_bytes", 1)):
        found = run(f"s.store(o, 0, w.{name}(q.load_integers(a, 0)))", numbers, out=np.int16, size=32)
        np.testing.assert_array_equal(found, numbers[first::2])


def test_inner_products_of_float32_rows_and_tokens() -> None:
    found = run("u.store_sums(o, u.inner_lines(u.no_sums(8), 2, 0, a, 64, b))", FLOATS, FLOATS, size=128)
    np.testing.assert_array_equal(found.reshape(2, 4, 16), FLOATS[:2, None] * FLOATS[None, :4])


def test_inner_products_of_bfloat16_rows_and_tokens_add_even_and_odd_numbers() -> None:
    rows = widen(BITS, "bfloat16").reshape(-1, 32)[:2, None].astype(np.float64)
    tokens = FLOATS[:8].reshape(4, 2, 16)
    found = run("u.store_sums(o, u.inner_lines(u.no_sums(8), 2, 1, a, 64, b))", BITS, FLOATS, size=128)
    expected = rows[..., ::2] * tokens[:, 0] + rows[..., 1::2] * tokens[:, 1]
    np.testing.assert_allclose(found.reshape(2, 4, 16), expected, 1e-5, 1e-6)


def test_inner_products_of_pairs_of_rows_and_tokens() -> None:
    numbers = widen(BITS, "bfloat16").reshape(-1, 16, 2).astype(np.float64)
    found = run("u.store_sums(o, u.inner_lines(u.no_sums(8), 2, 2, a, 64, b))", BITS, BITS[8:12].copy(), size=128)
    expected = (numbers[:2, None] * numbers[None, 8:12]).sum(axis=3)
    np.testing.assert_allclose(found.reshape(2, 4, 16), expected, 1e-5)


def test_a_vector_of_each_row_times_one_of_each_token() -> None:
    body = "u.store_sums(o, u.add_products_at(u.sums_at(a, 8), 2, b, a, 64))"
    found = run(body, FLOATS, FLOATS[9:11].copy(), size=128)
    expected = FLOATS[:8].reshape(2, 4, 16) + FLOATS[9:11, None] * FLOATS[:4]
    np.testing.assert_allclose(found.reshape(2, 4, 16), expected, 1e-6, 1e-6)


def words(number: str) -> Array:
    return run(f"s.store(o, 0, w.{number.replace('words', 'q.load_integers(a, 0)')})", BITS[2], size=16)


def test_the_numbers_of_a_word() -> None:
    as_bytes = BITS[2].view(np.int8).reshape(16, 4)
    for number in range(2):
        expected = widen(BITS[2].reshape(16, 2)[:, number].copy(), "bfloat16")
        np.testing.assert_array_equal(words(f"bfloat16_of(words, {number})"), expected)
    for number in range(4):
        np.testing.assert_array_equal(words(f"int8_of(words, {number})"), as_bytes[:, number])
    for number in range(8):
        halves = (as_bytes.view(np.uint8)[:, number // 2] >> 4 * (number % 2)) & 15
        np.testing.assert_array_equal(words(f"nibble_of(words, {number})"), halves.astype(np.float32) - 8)
    body = "s.store(o, 0, w.pair_of(q.load_floats(a, 0), q.load_floats(b, 0)))"
    low, high = (widen(BITS[row, :16].copy(), "bfloat16") for row in (3, 4))
    found = run(body, low, high, out=np.uint16, size=32)
    np.testing.assert_array_equal(found.reshape(16, 2), np.stack([BITS[3, :16], BITS[4, :16]], axis=1))
