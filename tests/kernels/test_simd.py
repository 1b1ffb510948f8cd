"""Every instruction beside what NumPy computes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest

from npllama.kernels import simd
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(5)
F32, I32, U8 = np.float32, np.int32, np.uint8

pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")
needs_amx = pytest.mark.skipif(not PATHS["amx"] <= host_features(), reason="this processor has no matrix unit")


def floats(count: int = 16) -> Any:
    return RNG.normal(size=count).astype(F32)


def compiled(body: str, arguments: str) -> Any:
    """Compile ``body``, statements or an expression that goes into ``out``, with 1 in hand for indices."""
    scope: dict[str, Any] = {"s": simd, "np": np}
    line = body if body.startswith("s.store") else f"s.store(out, 0, {body})"
    exec(f"def kernel(out, {arguments}):\n    {line}", scope)
    return numba.njit(scope["kernel"])


@pytest.mark.parametrize(
    ("body", "numpy"),
    [
        ("s.load(a, 1)", lambda a, b: a[1:17]),
        ("s.add(s.load(a, 0), s.load(b, 2))", lambda a, b: a[:16] + b[2:18]),
        ("s.multiply(s.load(a, 0), s.load(b, 0))", lambda a, b: a[:16] * b[:16]),
        ("s.maximum(s.load(a, 0), s.load(b, 0))", lambda a, b: np.maximum(a[:16], b[:16])),
        ("s.nearest(s.multiply(s.load(a, 0), s.broadcast(np.float32(9))))", lambda a, b: np.round(a[:16] * F32(9))),
        ("s.power_of_two(s.nearest(s.load(a, 0)))", lambda a, b: np.exp2(np.round(a[:16]))),
        ("s.broadcast(a[3])", lambda a, b: np.repeat(a[3], 16)),
        ("s.broadcast(s.add_lanes(s.broadcast(np.float32(1.5))))", lambda a, b: np.repeat(F32(24), 16)),
    ],
)
def test_float32_vectors(body: str, numpy: Any) -> None:
    a, b, out = floats(20), floats(20), np.zeros(16, F32)
    compiled(body, "a, b")(out, a, b)
    np.testing.assert_array_equal(out, numpy(a, b))


def test_a_multiply_add_rounds_once() -> None:
    a, b, c, out = floats(), floats(), floats(), np.zeros(16, F32)
    compiled("s.fused_multiply_add(s.load(a, 0), s.load(b, 0), s.load(c, 0))", "a, b, c")(out, a, b, c)
    np.testing.assert_array_equal(out, (a.astype(np.float64) * b + c).astype(F32))


def test_adding_lanes() -> None:
    a, out = floats(), np.zeros(16, F32)
    compiled("s.broadcast(s.add_lanes(s.load(a, 0)))", "a")(out, a)
    np.testing.assert_allclose(out, a.astype(np.float64).sum(), rtol=1e-6)


def test_bfloat16_is_widened_from_its_bits() -> None:
    bits, out = floats(20).astype(ml_dtypes.bfloat16), np.zeros(16, F32)
    compiled("s.load_bfloat16(a, 2)", "a")(out, bits.view(np.uint16))
    np.testing.assert_array_equal(out, bits[2:18].astype(F32))
    compiled("s.broadcast(s.load_one_bfloat16(a, 7))", "a")(out, bits.view(np.uint16))
    np.testing.assert_array_equal(out, bits[7].astype(F32))


def test_int32_vectors() -> None:
    a, out = RNG.integers(-(2**20), 2**20, 16).astype(I32), np.zeros(16, I32)
    compiled("s.add(s.shift_left(s.load(a, 0), 8), s.broadcast(np.int32(-5)))", "a")(out, a)
    np.testing.assert_array_equal(out, (a << 8) - 5)
    wide = np.zeros(16, F32)
    compiled("s.to_float(s.load(a, 0))", "a")(wide, a)
    np.testing.assert_array_equal(wide, a)


def test_bytes_and_their_halves() -> None:
    a, out = RNG.integers(0, 256, 80).astype(U8), np.zeros(64, U8)
    compiled("s.load_bytes(a, 3)", "a")(out, a)
    np.testing.assert_array_equal(out, a[3:67])
    compiled("s.load_nibbles(a, 1)", "a")(out, a)
    np.testing.assert_array_equal(out, np.concatenate([a[1:33] & 15, a[1:33] >> 4]))


def test_a_dot_product_of_bytes_adds_four_at_a_time() -> None:
    unsigned, signed = RNG.integers(0, 256, 64).astype(U8), RNG.integers(-128, 128, 64).astype(np.int8)
    out = np.zeros(16, I32)
    compiled("s.dot_bytes(s.broadcast(np.int32(7)), s.load(a, 0), s.load(b, 0))", "a, b")(out, unsigned, signed)
    np.testing.assert_array_equal(out, 7 + (unsigned.astype(int) * signed).reshape(16, 4).sum(1))


def test_a_square_is_transposed_between_any_strides() -> None:
    source, target = floats(16 * 20).reshape(16, 20), np.zeros((16, 24), F32)
    compiled("s.store(out, 0, s.load(a, 0)); s.transpose(a, 4, 80, b, 8, 96)", "a, b")(floats(), source, target)
    np.testing.assert_array_equal(target[:, 8:], source[:, 4:].T)
    assert not target[:, :8].any()


def test_a_square_of_int8_is_transposed_to_uint8_that_are_128_larger() -> None:
    source, target = RNG.integers(-128, 128, (16, 16, 4)).astype(np.int8), np.zeros((16, 16, 4), U8)
    kernel = compiled("s.store(out, 0, s.load(a, 0)); s.transpose_flipped(a, 0, 64, b, 0, 64)", "a, b")
    kernel(np.zeros(64, np.int8), source, target)
    np.testing.assert_array_equal(target, source.transpose(1, 0, 2).astype(int) + 128)


def test_a_narrow_transpose_ends_with_the_columns_that_are_wanted() -> None:
    source, target = floats(256).reshape(16, 16), np.zeros(16 * 3 + 16, F32)
    compiled("s.store(out, 0, s.load(a, 0)); s.transpose(a, 0, 64, b, 0, 12)", "a, b")(floats(), source, target)
    np.testing.assert_array_equal(target[:48].reshape(16, 3), source[:3].T)


def test_an_address_stands_for_bytes_and_a_prefetch_may_miss() -> None:
    a, out = floats(32), np.zeros(20, F32)
    kernel = compiled(
        "s.store(a, 8, s.load(b, 0)); s.prefetch(a, 1 << 40); s.prefetch_near(a, 1 << 40); s.store_one(a, 0, b[1])",
        "a, b",
    )
    kernel(out, out.ctypes.data, a)
    np.testing.assert_array_equal(out[2:18], a[:16])
    assert out[0] == a[1]


def shapes(**rows_and_bytes: int) -> Any:
    configuration = np.zeros(64, U8)
    configuration[0] = 1
    configuration[16:32:2] = rows_and_bytes["bytes"]
    configuration[48:56] = rows_and_bytes["rows"]
    return configuration


@numba.njit
def _bfloat16_product(configuration, a, b, c):
    simd.tile_configure(configuration)
    simd.tile_load(0, c, 0, 64)
    simd.tile_load(1, a, 0, 64)
    simd.tile_load(2, b, 0, 64)
    simd.tile_dot_bfloat16(0, 1, 2)
    simd.tile_store(0, c, 0, 64)
    simd.tile_zero(0)
    simd.tile_store(0, b, 0, 64)
    simd.tile_release()


@numba.njit
def _int8_product(configuration, a, b, c):
    simd.tile_configure(configuration)
    simd.tile_zero(0)
    simd.tile_load(1, a, 0, 64)
    simd.tile_load(2, b, 0, 64)
    simd.tile_dot_int8(0, 1, 2)
    simd.tile_store(0, c, 0, 64)
    simd.tile_release()


@needs_amx
def test_tiles_of_bfloat16() -> None:
    a, b = (floats(512).astype(ml_dtypes.bfloat16) for _ in range(2))
    start = floats(256).reshape(16, 16)
    c = start.copy()
    pairs = b.astype(F32).reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    expected = start + a.astype(np.float64).reshape(16, 32) @ pairs
    b_bits = b.view(np.uint16).copy()
    _bfloat16_product(shapes(rows=16, bytes=64), a.view(np.uint16), b_bits, c)
    np.testing.assert_allclose(c, expected, atol=1e-5)
    assert not b_bits.any()


@needs_amx
def test_tiles_of_int8() -> None:
    a, b = (RNG.integers(-128, 128, 1024).astype(np.int8) for _ in range(2))
    c = np.zeros((16, 16), I32)
    fours = b.astype(int).reshape(16, 16, 4).transpose(0, 2, 1).reshape(64, 16)
    _int8_product(shapes(rows=16, bytes=64), a, b, c)
    np.testing.assert_array_equal(c, a.astype(int).reshape(16, 64) @ fours)
