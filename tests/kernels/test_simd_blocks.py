"""Instructions on the sums of blocks of rows, each beside what NumPy computes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from npllama.dtypes import Array, widen
from npllama.kernels import simd, simd_blocks, simd_sums
from npllama.kernels.features import PATHS, host_features
from tests.kernels.test_simd_sums import BITS, FLOATS, RNG, run

pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")


def test_sums_and_vectors_of_several_blocks() -> None:
    found = run("u.store_sums(o, k.repeated(u.sums_at(a, 4), 2))", FLOATS, size=128)
    np.testing.assert_array_equal(found.reshape(2, 4, 16), [FLOATS[:4]] * 2)
    found = run("u.store_sums(o, k.vectors_at(a, 192, 3))", FLOATS, size=48)
    np.testing.assert_array_equal(found.reshape(3, 16), FLOATS[:9:3])


#: Tokens 0 to 3 of two blocks, whose places are nine lines apart.
PLACES = np.array([[0, 1, 2, 3], [9, 10, 11, 12]])


def added(body: str, *arrays: Array) -> Array:
    """Run statements that add to 13 lines of what an array ``a`` has; return what they added."""
    found = run("u.store_sums(o, u.sums_at(a, 13)); " + body, FLOATS, *arrays, size=208).reshape(13, 16)
    return found - FLOATS[:13]


def test_sums_are_added_to_memory_scaled_or_not() -> None:
    expected = np.zeros((13, 16), np.float32)
    expected[PLACES.reshape(-1)] = FLOATS[8:]
    found = added("k.add_to_memory(o, 576, 4, u.sums_at(b, 8))", FLOATS[8:].copy())
    np.testing.assert_allclose(found, expected, 1e-6, 1e-6)
    expected[PLACES] = FLOATS[8:].reshape(2, 4, 16) * FLOATS[:2, None]
    found = added("k.add_scaled_to_memory(o, 576, u.sums_at(b, 8), k.vectors_at(a, 64, 2))", FLOATS[8:].copy())
    np.testing.assert_allclose(found, expected, 1e-6, 1e-6)
    expected[PLACES] = FLOATS[:2, None] * FLOATS[3, :4, None]
    found = added("k.add_outer_to_memory(o, 576, 4, k.vectors_at(a, 64, 2), b)", FLOATS[3].copy())
    np.testing.assert_allclose(found, expected, 1e-6, 1e-6)


def floating(numbers: Array) -> Array:
    return (numbers + simd_blocks.NOTHING).astype(np.int32)


@pytest.mark.parametrize("limit", [1 << 20, (1 << 22) - 1])
def test_integers_are_added_with_their_blocks_scale_and_their_tokens_step(limit: int) -> None:
    numbers = RNG.integers(-limit, limit, 8).astype(np.int32)
    numbers[:2] = -limit, limit
    body = "t = k.add_stepped(u.sums_at(a, 8), u.first_sums(b, 8), k.vectors_at(c, 64, 2), d); u.store_sums(o, t)"
    found = run(body, FLOATS, floating(numbers), FLOATS[8:10].copy(), FLOATS[10].copy(), size=128)
    scaled = FLOATS[8:10, None] * numbers.reshape(2, 4, 1).astype(np.float64) * FLOATS[10, :4, None]
    np.testing.assert_allclose(found, (FLOATS[:8] + scaled.reshape(8, 16)).reshape(-1), 1e-5)


def test_integers_of_three_digits_are_added_with_scale_and_step() -> None:
    """The two lower digits' sums make one integer, to which more is added at the place of the lowest."""
    digits = RNG.integers(-(1 << 21), 1 << 21, (3, 8)).astype(np.int32)
    body = "lower = k.at_next_place(u.first_sums(b + 32, 8), u.first_sums(b + 64, 8)); t = u.sums_at(a, 8)"
    body += "; u.store_sums(o, k.add_digits(t, u.first_sums(b, 8), lower, k.vectors_at(c, 64, 2), d))"
    numbers = np.concatenate([floating(digits[0]), digits[1], digits[2]])
    found = run(body, FLOATS, numbers, FLOATS[8:10].copy(), FLOATS[10].copy(), size=128)
    integers = (digits.astype(np.float64) * [[65536], [256], [1]]).sum(0)
    scaled = FLOATS[8:10, None] * integers.reshape(2, 4, 1) * FLOATS[10, :4, None]
    np.testing.assert_allclose(found, (FLOATS[:8] + scaled.reshape(8, 16)).reshape(-1), 1e-6)
    body = "u.store_sums(o, k.at_next_place(u.first_sums(a, 8), u.first_sums(a + 32, 8)))"
    found = run(body, digits, out=np.int32, size=128)
    np.testing.assert_array_equal(found, (256 * digits[0] + digits[1]).repeat(16))


def test_an_outer_product_of_floats() -> None:
    body = "u.store_sums(o, k.outer_floats(u.sums_at(a, 16), k.vectors_at(b, 64, 1), c))"
    found = run(body, FLOATS, FLOATS[3].copy(), FLOATS[4].copy())
    np.testing.assert_allclose(found.reshape(16, 16), FLOATS + np.outer(FLOATS[4], FLOATS[3]), 1e-6, 1e-6)


def test_an_outer_product_of_several_blocks() -> None:
    body = "u.store_sums(o, k.outer_floats(u.sums_at(a, 8), k.vectors_at(b, 64, 2), c))"
    found = run(body, FLOATS, FLOATS[8:10].copy(), FLOATS[10].copy(), size=128).reshape(2, 4, 16)
    expected = FLOATS[:8].reshape(2, 4, 16) + FLOATS[8:10, None] * FLOATS[10, :4, None]
    np.testing.assert_allclose(found, expected, 1e-6, 1e-6)


def expected_pairs(weights: Array, x: Array) -> Array:
    a, b = (widen(bits, "bfloat16", np.float64).reshape(16, 2) for bits in (weights, x))
    return b @ a.T


@pytest.mark.skipif("avx512bf16" not in host_features(), reason="this processor has no BF16")
def test_an_outer_product_of_pairs() -> None:
    found = run("u.store_sums(o, k.outer_pairs(u.no_sums(16), k.vectors_at(a, 64, 1), b))", BITS[0], BITS[1])
    np.testing.assert_allclose(found.reshape(16, 16), expected_pairs(BITS[0], BITS[1]), 1e-6)


def test_pairs_and_roundings_on_a_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = host_features() - {"avx512bf16"}
    for module in (simd, simd_sums):
        monkeypatch.setattr(module, "host_features", lambda: lacking)
    found = run("u.store_sums(o, k.outer_pairs(u.no_sums(16), k.vectors_at(a, 64, 1), b))", BITS[0], BITS[1])
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


def test_an_outer_product_of_bytes() -> None:
    weights = RNG.integers(0, 256, 64).astype(np.uint8)
    x = RNG.integers(-128, 128, 64).astype(np.int8)
    begin = np.arange(16, dtype=np.int32)
    body = "u.store_sums(o, k.outer_bytes(u.first_sums(c, 16), k.vectors_at(a, 64, 1), b))"
    found = run(body, weights, x, begin, out=np.int32)
    products = x.reshape(16, 4).astype(np.int64) @ weights.reshape(16, 4).astype(np.int64).T
    np.testing.assert_array_equal(found.reshape(16, 16), begin[:, None] + products)


def test_an_outer_product_of_pairs_of_integers() -> None:
    weights, x = (RNG.integers(-(1 << 15), 1 << 15, 32).astype(np.int16) // 2 for _ in range(2))
    begin = np.arange(16, dtype=np.int32)
    found = run(
        "u.store_sums(o, k.outer_words(u.first_sums(c, 16), k.vectors_at(a, 64, 1), b))",
        weights,
        x,
        begin,
        out=np.int32,
    )
    products = x.reshape(16, 2).astype(np.int64) @ weights.reshape(16, 2).astype(np.int64).T
    np.testing.assert_array_equal(found.reshape(16, 16), begin[:, None] + products)


@pytest.mark.parametrize("extreme", [None, -128, 127])
def test_an_outer_product_of_nibbles_over_eight_lines(extreme: int | None) -> None:
    weights, x = RNG.integers(0, 16, (8, 64)).astype(np.uint8), RNG.integers(-128, 128, (8, 64)).astype(np.int8)
    if extreme is not None:
        weights[:], x[:] = 15, extreme
    begin = np.arange(16, dtype=np.int32)
    found = run("u.store_sums(o, k.outer_nibbles(u.first_sums(c, 16), a, b))", weights, x, begin, out=np.int32)
    lines = (numbers.reshape(8, 16, 4).astype(np.int64) for numbers in (x, weights))
    products = np.einsum("ltk,lrk->tr", *lines)
    np.testing.assert_array_equal(found.reshape(16, 16), begin[:, None] + products)


@pytest.mark.parametrize(("weight", "number"), [(255, -128), (255, 127), (128, -128), (127, 127)])
def test_no_product_of_bytes_is_too_large(weight: int, number: int) -> None:
    weights, x, begin = np.full(64, weight, np.uint8), np.full(64, number, np.int8), np.zeros(16, np.int32)
    found = run(
        "u.store_sums(o, k.outer_bytes(u.first_sums(c, 16), k.vectors_at(a, 64, 1), b))",
        weights,
        x,
        begin,
        out=np.int32,
    )
    assert np.unique(found).tolist() == [4 * weight * number]
