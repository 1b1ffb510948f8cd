"""Instructions on panels, each beside what NumPy computes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import Array, widen
from npllama.kernels import simd_panels, simd_sums
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(9)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

SUMS, LINES = RNG.normal(size=(8, 32)).astype(np.float32), RNG.normal(size=(2, 32)).astype(np.float32)


def run(body: str, *arrays: Array) -> Array:
    """Compile a statement about addresses a, b, c of arrays and o of sixteen sums; return these, row by row."""
    names = "abc"[: len(arrays)]
    scope: dict[str, Any] = {"p": simd_panels, "u": simd_sums}
    exec(f"def kernel(o, {', '.join(names)}): {body}", scope)
    found = np.zeros((8, 32), np.float32)
    numba.njit(scope["kernel"])(found.ctypes.data, *(array.ctypes.data for array in arrays))
    return found


@pytest.mark.parametrize("pitch", [4, 20])
def test_a_line_meets_a_number_of_each_row(pitch: int) -> None:
    numbers = RNG.normal(size=(8, pitch // 4)).astype(np.float32)
    found = run(f"u.store_sums(o, p.outer_rows(u.sums_at(a, 16), None, b, c, {pitch}))", SUMS, LINES, numbers)
    np.testing.assert_allclose(found, SUMS + numbers[:, :1] * LINES[0], 1e-6, 1e-6)


@pytest.mark.parametrize("pitch", [4, 20])
def test_a_line_of_pairs_meets_a_pair_of_each_row(pitch: int) -> None:
    bits = RNG.integers(0x3000, 0x4000, (2, 32, 2)).astype(np.uint16)  # bfloat16 below 2
    pairs = RNG.integers(0x3000, 0x4000, (8, pitch // 4, 2)).astype(np.uint16)
    found = run(f"u.store_sums(o, p.outer_rows(u.sums_at(a, 16), 1, b, c, {pitch}))", SUMS, bits, pairs)
    line, numbers = widen(bits[0], "bfloat16"), widen(pairs[:, 0], "bfloat16")
    np.testing.assert_allclose(found, SUMS + numbers @ line.T, 1e-5, 1e-5)


def test_rows_shrink_lane_by_lane() -> None:
    np.testing.assert_array_equal(run("u.store_sums(o, p.shrunk_rows(a, 16, b))", SUMS, LINES), SUMS * LINES[0])
