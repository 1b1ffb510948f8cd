"""Instructions on many sums and on the numbers in a word, each beside what NumPy computes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

from npllama.dtypes import Array, narrow, widen
from npllama.kernels import simd, simd_quantised, simd_sums, simd_words
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(7)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

BITS = RNG.integers(0x3000, 0x4000, (40, 32)).astype(np.uint16)  # bfloat16 below 2, of either size
FLOATS = RNG.normal(size=(16, 16)).astype(np.float32)


def run(body: str, *arrays: Array, out: Any = np.float32, size: int = 256) -> Array:
    """Compile statements about addresses a, b, c of arrays and o of the output; return the output."""
    names = "abcd"[: len(arrays)]
    scope: dict[str, Any] = {"s": simd, "u": simd_sums, "w": simd_words, "q": simd_quantised}
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


def test_sums_are_added_to_memory_scaled_or_not() -> None:
    body = "u.store_sums(o, u.sums_at(a, 16)); u.add_to_memory(o, u.sums_at(b, 16))"
    np.testing.assert_array_equal(run(body, FLOATS, FLOATS[::-1].copy()), (FLOATS + FLOATS[::-1]).reshape(-1))
    body = "u.store_sums(o, u.sums_at(a, 16)); u.add_scaled_to_memory(o, u.sums_at(a, 16), q.load_floats(b, 0))"
    np.testing.assert_allclose(
        run(body, FLOATS, FLOATS[3].copy()), (FLOATS + FLOATS * FLOATS[3]).reshape(-1), 1e-6, 1e-6
    )
    body = "u.add_outer_to_memory(o, q.load_floats(a, 0), b)"
    np.testing.assert_array_equal(run(body, FLOATS[0], FLOATS[1].copy()), np.outer(FLOATS[1], FLOATS[0]).reshape(-1))


def test_integers_are_added_with_scale_and_step() -> None:
    numbers = RNG.integers(-(1 << 20), 1 << 20, 8).astype(np.int32)
    body = "t = u.add_stepped(u.sums_at(a, 8), u.first_sums(b, 8), q.load_floats(c, 0), d); u.store_sums(o, t)"
    found = run(body, FLOATS, numbers, FLOATS[8].copy(), FLOATS[9].copy(), size=128)
    expected = FLOATS[:8] + FLOATS[8] * numbers[:, None].astype(np.float64) * FLOATS[9, :8, None]
    np.testing.assert_allclose(found, expected.reshape(-1), 1e-5)


def test_integers_of_three_digits_are_added_with_scale_and_step() -> None:
    """The two lower digits' sums make one integer, to which more is added at the place of the lowest."""
    digits = RNG.integers(-(1 << 21), 1 << 21, (3, 8)).astype(np.int32)
    body = "lower = u.at_next_place(u.first_sums(b + 32, 8), b + 64); t = u.sums_at(a, 8)"
    body += "; u.store_sums(o, u.add_digits(t, u.first_sums(b, 8), lower, q.load_floats(c, 0), d))"
    padded = np.concatenate([digits.reshape(-1), np.zeros(8, np.int32)])
    found = run(body, FLOATS, padded, FLOATS[8].copy(), FLOATS[9].copy(), size=128)
    integers = (digits.astype(np.float64) * [[65536], [256], [1]]).sum(0)
    expected = FLOATS[:8] + FLOATS[8] * integers[:, None] * FLOATS[9, :8, None]
    np.testing.assert_allclose(found, expected.reshape(-1), 1e-6)
    found = run("u.store_sums(o, u.at_next_place(u.first_sums(a, 8), a + 32))", padded, out=np.int32, size=128)
    np.testing.assert_array_equal(found, (256 * digits[0] + digits[1]).repeat(16))


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_totals_are_the_sums_of_lanes_in_pairs_of_halves(count: int) -> None:
    found = run(f"u.store_totals(o, u.sums_at(a, {count}))", FLOATS, size=16)
    expected = FLOATS[:count]
    while expected.shape[1] > 1:
        low, high = np.split(expected, 2, axis=1)
        expected = low + high
    np.testing.assert_array_equal(found, np.pad(expected[:, 0], (0, 16 - count)))


def test_an_outer_product_of_floats() -> None:
    found = run("u.store_sums(o, u.outer_floats(u.sums_at(a, 16), b, c))", FLOATS, FLOATS[3].copy(), FLOATS[4].copy())
    np.testing.assert_allclose(found.reshape(16, 16), FLOATS + np.outer(FLOATS[4], FLOATS[3]), 1e-6, 1e-6)


def expected_pairs(weights: Array, x: Array) -> Array:
    a, b = (widen(bits, "bfloat16", np.float64).reshape(16, 2) for bits in (weights, x))
    return b @ a.T


@pytest.mark.skipif("avx512bf16" not in host_features(), reason="this processor has no BF16")
def test_an_outer_product_of_pairs() -> None:
    found = run("u.store_sums(o, u.outer_pairs(u.no_sums(16), a, b))", BITS[0], BITS[1])
    np.testing.assert_allclose(found.reshape(16, 16), expected_pairs(BITS[0], BITS[1]), 1e-6)


def test_pairs_and_roundings_on_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = host_features() - {"avx512bf16"}
    for module in (simd, simd_sums):
        monkeypatch.setattr(module, "host_features", lambda: lacking)
    found = run("u.store_sums(o, u.outer_pairs(u.no_sums(16), a, b))", BITS[0], BITS[1])
    np.testing.assert_allclose(found.reshape(16, 16), expected_pairs(BITS[0], BITS[1]), 1e-6)
    numbers = RNG.integers(0, 1 << 32, 32, dtype=np.uint32).view(np.float32)
    numbers[:6] = [np.nan, np.inf, -np.inf, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]
    numbers[6] = np.uint32(0x7F800001).view(np.float32)  # a NaN that half of what is cut off would make infinite
    body = "s.store(o, 0, s.to_bfloat16(q.load_floats(a, 0), q.load_floats(a, 64)))"
    found = run(body, numbers, out=np.uint16, size=32)
    with np.errstate(invalid="ignore"):
        expected = numbers.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(widen(found, "bfloat16"), expected.astype(np.float32))
    body = "s.store(o, 0, w.rounded_pair(q.load_floats(a, 0), q.load_floats(a, 64)))"
    found = run(body, numbers, out=np.uint16, size=32).reshape(16, 2).T.reshape(-1)
    np.testing.assert_array_equal(widen(found, "bfloat16"), expected.astype(np.float32))


def test_pairs_of_the_nearest_bfloat16() -> None:
    low, high = RNG.normal(size=(2, 16)).astype(np.float32)
    body = "s.store(o, 0, w.rounded_pair(q.load_floats(a, 0), q.load_floats(b, 0)))"
    found = run(body, low, high, out=np.uint16, size=32).reshape(16, 2)
    np.testing.assert_array_equal(found, np.stack([narrow(low, "bfloat16"), narrow(high, "bfloat16")], axis=1))


def test_an_outer_product_of_bytes() -> None:
    weights = RNG.integers(0, 256, 64).astype(np.uint8)
    x = RNG.integers(-128, 128, 64).astype(np.int8)
    begin = np.arange(16, dtype=np.int32)
    body = "u.store_sums(o, u.outer_bytes(u.first_sums(c, 16), a, b))"
    found = run(body, weights, x, begin, out=np.int32)
    products = x.reshape(16, 4).astype(np.int64) @ weights.reshape(16, 4).astype(np.int64).T
    np.testing.assert_array_equal(found.reshape(16, 16), begin[:, None] + products)


def test_an_outer_product_of_pairs_of_integers() -> None:
    weights, x = (RNG.integers(-(1 << 15), 1 << 15, 32).astype(np.int16) // 2 for _ in range(2))
    begin = np.arange(16, dtype=np.int32)
    found = run("u.store_sums(o, u.outer_words(u.first_sums(c, 16), a, b))", weights, x, begin, out=np.int32)
    products = x.reshape(16, 2).astype(np.int64) @ weights.reshape(16, 2).astype(np.int64).T
    np.testing.assert_array_equal(found.reshape(16, 16), begin[:, None] + products)


@pytest.mark.parametrize("extreme", [None, -128, 127])
def test_an_outer_product_of_nibbles_over_eight_lines(extreme: int | None) -> None:
    weights, x = RNG.integers(0, 16, (8, 64)).astype(np.uint8), RNG.integers(-128, 128, (8, 64)).astype(np.int8)
    if extreme is not None:
        weights[:], x[:] = 15, extreme
    begin = np.arange(16, dtype=np.int32)
    found = run("u.store_sums(o, u.outer_nibbles(u.first_sums(c, 16), a, b))", weights, x, begin, out=np.int32)
    lines = (numbers.reshape(8, 16, 4).astype(np.int64) for numbers in (x, weights))
    products = np.einsum("ltk,lrk->tr", *lines)
    np.testing.assert_array_equal(found.reshape(16, 16), begin[:, None] + products)


@pytest.mark.parametrize(("weight", "number"), [(255, -128), (255, 127), (128, -128), (127, 127)])
def test_no_product_of_bytes_is_too_large(weight: int, number: int) -> None:
    weights, x, begin = np.full(64, weight, np.uint8), np.full(64, number, np.int8), np.zeros(16, np.int32)
    found = run("u.store_sums(o, u.outer_bytes(u.first_sums(c, 16), a, b))", weights, x, begin, out=np.int32)
    assert np.unique(found).tolist() == [4 * weight * number]


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
