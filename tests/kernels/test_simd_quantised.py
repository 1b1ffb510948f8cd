"""Instructions for small integers, each beside what NumPy computes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import widen
from npllama.kernels import simd, simd_quantised
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(5)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")


def stored(expression: str, dtype: Any, *arguments: Any) -> Any:
    """Compile an expression of a, b and i, and return the 64 bytes that it gives."""
    scope: dict[str, Any] = {"s": simd, "q": simd_quantised}
    exec(f"def kernel(out, a, b, i):\n    s.store(out, 0, {expression})", scope)
    out = np.zeros(64 // np.dtype(dtype).itemsize, dtype)
    numba.njit(scope["kernel"])(out, *arguments, *(0,) * (3 - len(arguments)))
    return out


@pytest.mark.parametrize("count", [-3, 0, 1, 9, 15, 16, 40])
def test_the_first_few_bfloat16_and_zeros_behind_them(count: int) -> None:
    bits = RNG.integers(1 << 8, 1 << 14, 20).astype(np.uint16)
    expected = np.zeros(16, np.float32)
    few = min(max(count, 0), 16)
    expected[:few] = widen(bits[2 : 2 + few], "bfloat16")
    np.testing.assert_array_equal(stored("q.load_first_bfloat16(a, 2, b)", np.float32, bits, count), expected)


def test_half_a_register_and_zeros_behind_it() -> None:
    data = RNG.integers(1, 256, 40).astype(np.uint8)
    expected = np.concatenate([data[3:35], np.zeros(32, np.uint8)])
    np.testing.assert_array_equal(stored("q.load_half(a, 3)", np.uint8, data), expected)


def test_halves_of_bytes() -> None:
    data = RNG.integers(0, 256, 64).astype(np.uint8)
    np.testing.assert_array_equal(stored("q.low_nibbles(s.load_bytes(a, 0))", np.uint8, data), data & 15)
    np.testing.assert_array_equal(stored("q.high_nibbles(s.load_bytes(a, 0))", np.uint8, data), data >> 4)


def test_bytes_as_numbers_of_another_dtype() -> None:
    data = RNG.integers(0, 100, 72).astype(np.int8)
    np.testing.assert_array_equal(stored("q.load_integers(a, 4)", np.int32, data), data[4:68].view(np.int32))
    np.testing.assert_array_equal(stored("q.load_floats(a, 8)", np.float32, data), data[8:].view(np.float32))


def test_differences_of_integers() -> None:
    a, b = (RNG.integers(-(1 << 30), 1 << 30, 16).astype(np.int32) for _ in range(2))
    np.testing.assert_array_equal(stored("q.subtract(s.load(a, 0), s.load(b, 0))", np.int32, a, b), a - b)


def test_integers_shifted_with_their_signs_and_their_lowest_bytes() -> None:
    numbers = RNG.integers(-(1 << 31), 1 << 31, 16).astype(np.int32)
    np.testing.assert_array_equal(stored("q.shift_right(s.load(a, 0), 8)", np.int32, numbers), numbers >> 8)

    @numba.njit
    def kernel(out: Any, numbers: Any) -> None:
        simd_quantised.store_low_bytes(out, 3, simd.load(numbers, 0))

    out = np.zeros(20, np.int8)
    kernel(out, numbers)
    np.testing.assert_array_equal(out, np.pad(numbers.astype(np.int8), (3, 1)))


def test_numbers_as_integers_and_their_magnitudes() -> None:
    numbers = np.array([0.5, 1.5, -0.5, -2.5, 2.4999998, 126.7, -127, 1e9, *RNG.normal(size=8) * 50], np.float32)
    found = stored("q.to_integers(s.load(a, 0))", np.int32, numbers)
    np.testing.assert_array_equal(found, np.rint(numbers).astype(np.int32))
    special = np.array([-0.0, np.inf, -np.inf, np.nan, -1e-40, 3, -3, 0.1] * 2, np.float32)
    found = stored("q.magnitudes(s.load(a, 0))", np.int32, special)
    np.testing.assert_array_equal(found, special.view(np.int32) & 0x7FFFFFFF)


def test_the_larger_integer_of_two_the_largest_of_sixteen_and_their_sum() -> None:
    a, b = (RNG.integers(-(1 << 27), 1 << 27, 16).astype(np.int32) for _ in range(2))
    np.testing.assert_array_equal(stored("q.larger(s.load(a, 0), s.load(b, 0))", np.int32, a, b), np.maximum(a, b))
    found = stored("s.broadcast(q.largest_lane(s.load(a, 0)))", np.int32, a)
    np.testing.assert_array_equal(found, np.full(16, a.max()))
    found = stored("s.broadcast(q.sum_of_lanes(s.load(a, 0)))", np.int32, a)
    np.testing.assert_array_equal(found, np.full(16, a.sum()))


BESIDE_MEMORY = """
import ctypes, mmap
import numpy as np
from npllama.checkpoint.quantize import quantize
from npllama.dtypes import Tensor
from npllama.kernels.matmul import products

def alone(array, is_behind):
    '''Copy an array to the end of its pages, or to their beginning, beside one that nobody may read.'''
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(room))
    for closed in (begin, begin + mmap.PAGESIZE + size):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE + (size - array.nbytes if is_behind else 0)
    copy = np.frombuffer(room, array.dtype, array.size, offset).reshape(array.shape)
    copy[:] = array
    return copy

for dtype in ("int8", "int4"):
    for width in (64, 576, 1100):
        numbers = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
        for is_behind in (True, False):
            data, scales, *minima = (alone(part, is_behind) for part in quantize(numbers, dtype))
            weight = Tensor(data, dtype, scales, *(minima or [None]), width)
            for activations in ("float32", "bfloat16", "int8"):
                for count in (1, 5, 20):
                    y = products("avx2", activations).linear(numbers[:count], weight)
                    assert abs(y[0, 0] / (numbers[0] @ numbers[0]) - 1) < 0.05
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to protect a page")
def test_products_read_nothing_before_or_behind_their_matrices() -> None:
    run = subprocess.run([sys.executable, "-c", BESIDE_MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr)
