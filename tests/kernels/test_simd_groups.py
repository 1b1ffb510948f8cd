"""Groups of a row times those of tokens, beside what NumPy computes."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.kernels import simd
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.simd_groups import (
    add_first_to_memory,
    add_row,
    products_of_bytes,
    products_of_nibbles,
    widen_bytes,
)
from npllama.kernels.simd_sums import store_totals

RNG = np.random.default_rng(6)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

#: A row of bytes, each value of which comes at least once, and sixteen groups of a token, 70 bytes apart.
ROW = np.concatenate([np.arange(256), RNG.integers(0, 256, 800)]).astype(np.uint8)
TOKEN = RNG.integers(-127, 128, (16, 70)).astype(np.int8)
#: The largest products that there are.
EDGE = np.full((16, 70), -127, np.int8), np.full(1056, 0x80, np.uint8)


def sums(instruction: object, count: int, row: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Return the sums of groups that begin at the fourth byte of a row; the last number is not touched."""

    @numba.njit
    def kernel(out: int, row: int, x: int) -> None:
        store_totals(out, instruction(count, row, x, 70))

    found = np.zeros(count + 1, np.int32)
    kernel(found.ctypes.data, row.ctypes.data + 3, token.ctypes.data)
    assert found[count] == 0
    return found[:count]


@pytest.mark.parametrize(("token", "row"), [(TOKEN, ROW), EDGE], ids=["random", "largest"])
@pytest.mark.parametrize("count", [1, 2, 8, 16])
def test_a_sum_of_int8_is_exact_with_weights_128_larger(count: int, token: np.ndarray, row: np.ndarray) -> None:
    weights = row[3 : 3 + 64 * count].view(np.int8).reshape(count, 64).astype(np.int64) + 128
    expected = (weights * token[:count, :64]).sum(1)
    np.testing.assert_array_equal(sums(products_of_bytes, count, row, token), expected)


@pytest.mark.parametrize(("token", "row"), [(TOKEN, ROW), (EDGE[0], ~EDGE[1] | 0xF0)], ids=["random", "largest"])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_a_sum_of_int4_meets_low_halves_of_bytes_first(count: int, token: np.ndarray, row: np.ndarray) -> None:
    pairs = row[3 : 3 + 32 * count].reshape(count, 32).astype(np.int64)
    expected = (np.hstack([pairs & 15, pairs >> 4]) * token[:count, :64]).sum(1)
    np.testing.assert_array_equal(sums(products_of_nibbles, count, row, token), expected)


@pytest.mark.parametrize(("tokens", "row"), [(TOKEN, ROW), EDGE], ids=["random", "largest"])
@pytest.mark.parametrize("count", [4, 8])
def test_totals_of_tokens_grow_by_exact_sums_of_int8_times_scale_and_step(
    count: int, tokens: np.ndarray, row: np.ndarray
) -> None:
    x = tokens[:count, :64].astype(np.int16)
    scale, steps = np.array([0.37], np.float32), np.geomspace(1e-3, 1e3, count, dtype=np.float32)
    found = np.arange(10, dtype=np.float32)

    @numba.njit
    def kernel(out: int, row: int, x: int, scale: int, steps: int) -> None:
        totals = add_row(count, simd.broadcast(np.float32(7)), row, x, scale, steps)
        add_first_to_memory(count, out, totals)

    kernel(found.ctypes.data, row.ctypes.data + 3, x.ctypes.data, scale.ctypes.data, steps.ctypes.data)
    exact = x.astype(np.int64) @ row[3:67].view(np.int8).astype(np.int64)
    scaled = (exact.astype(np.float32) * scale).astype(np.float64)  # rounded, then multiplied and added at once
    expected = np.arange(count, dtype=np.float32) + (7 + scaled * steps).astype(np.float32)
    np.testing.assert_array_equal(found, [*expected, *range(count, 10)])


def test_int8_become_int16_where_they_are() -> None:
    numbers = TOKEN[0, :64]
    found = np.full(66, 9, np.int16)
    found[:32] = numbers.view(np.int16)

    @numba.njit
    def kernel(place: int) -> None:
        widen_bytes(place)

    kernel(found.ctypes.data)
    np.testing.assert_array_equal(found, [*numbers, 9, 9])
