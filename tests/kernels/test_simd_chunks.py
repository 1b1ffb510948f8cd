"""Instructions on chunks of keys and values, each beside what NumPy computes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import Array, widen
from npllama.kernels import simd, simd_chunks, simd_quantised, simd_sums
from npllama.kernels.features import PATHS, host_features

RNG = np.random.default_rng(8)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

VECTORS = RNG.normal(size=(16, 16)).astype(np.float32)
#: Sixteen rows of 64 numbers, float32 and bfloat16.
ROWS: dict[str, Array] = {
    "float32": RNG.normal(size=(16, 64)).astype(np.float32),
    "uint16": RNG.integers(0x3000, 0x4000, (16, 64)).astype(np.uint16),
}


def run(body: str, *arrays: Array, like: str = "float32", seen: int = -1, size: int = 256) -> Array:
    """Compile statements about addresses a, b, c of arrays and o of the output; return the output."""
    names = "abc"[: len(arrays)]
    scope: dict[str, Any] = {"s": simd, "u": simd_sums, "q": simd_quantised, "k": simd_chunks}
    lines = "\n".join(f"    {line}" for line in body.split("; "))
    exec(f"def kernel(o, like, seen, {', '.join(names)}):\n{lines}", scope)
    found = np.zeros(size, np.float32)
    numba.njit(scope["kernel"])(
        found.ctypes.data, np.empty(0, like), np.int64(seen), *(array.ctypes.data for array in arrays)
    )
    return found


def numbers(like: str, seen: int) -> Array:
    """Return the rows in float64, zeros where they are hidden."""
    rows = ROWS[like]
    there = np.array([seen >> i & 1 for i in range(64)])
    return there * (widen(rows, "bfloat16") if like == "uint16" else rows).astype(np.float64)


def by_lines(queries: Array, like: str) -> Array:
    """Lay out queries (n, 64): lines, queries, numbers with even places before those with odd ones."""
    parts = 2 if like == "uint16" else 1
    lines = queries.reshape(len(queries), -1, 16, parts)
    return np.ascontiguousarray(lines.transpose(1, 0, 3, 2))


@pytest.mark.parametrize("like", ROWS)
@pytest.mark.parametrize("n_queries", [1, 2, 4])
@pytest.mark.parametrize("seen", [-1, (1 << 40) - 1, 1])
def test_inner_products_of_rows_and_queries(like: str, n_queries: int, seen: int) -> None:
    queries, pitch = RNG.normal(size=(n_queries, 64)).astype(np.float32), ROWS[like].strides[0]
    body = f"t = k.inner_chunk(u.no_sums(16), {n_queries}, like, a, {pitch}, seen, 0, b); u.store_totals(o, t)"
    found = run(body, ROWS[like], by_lines(queries, like), like=like, seen=seen, size=16)
    expected = numbers(like, seen)[: 16 // n_queries] @ queries.T.astype(np.float64)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("like", ROWS)
@pytest.mark.parametrize("n_queries", [1, 2, 4])
@pytest.mark.parametrize("seen", [-1, (1 << 40) - 1, 1])
def test_a_row_times_a_weight_of_each_query_is_added_to_shrunk_sums(like: str, n_queries: int, seen: int) -> None:
    sums, factors = RNG.normal(size=(n_queries, 64)).astype(np.float32), VECTORS[3].copy()
    begin = f"t = k.shrunk_sums_at(like, a, {4 * n_queries}, {n_queries}, b)"
    body = f"{begin}; t = k.outer_chunk(t, {n_queries}, like, c, seen, 0, b); u.store_sums(o, t)"
    found = run(body, by_lines(sums, like), factors, ROWS[like], like=like, seen=seen, size=64 * n_queries)
    expected = factors[:n_queries, None] * (sums + numbers(like, seen)[0])
    np.testing.assert_allclose(found, by_lines(expected, like).reshape(-1), atol=1e-5)


def test_sums_of_one_line_and_some_queries_meet_that_line_alone() -> None:
    sums, factors = RNG.normal(size=(2, 32)).astype(np.float32), VECTORS[3].copy()
    body = "t = k.outer_chunk(k.shrunk_sums_at(like, a, 4, 2, b), 2, like, c + 64, seen, 0, b); u.store_sums(o, t)"
    found = run(body, by_lines(sums, "uint16"), factors, ROWS["uint16"], like="uint16", seen=-1, size=64)
    expected = factors[:2, None] * (sums + numbers("uint16", -1)[0, 32:])
    np.testing.assert_allclose(found, by_lines(expected, "uint16").reshape(-1), atol=1e-5)


@pytest.mark.parametrize("distance", [8, 4, 2, 1])
def test_lanes_change_places(distance: int) -> None:
    found = run(f"s.store(o, 0, k.exchanged(q.load_floats(a, 0), {distance}))", VECTORS, size=16)
    np.testing.assert_array_equal(found, VECTORS[0][np.arange(16) ^ distance])


def test_even_and_odd_places_are_taken_apart_and_put_together() -> None:
    pair = "q.load_floats(a, 0), q.load_floats(a, 64)"
    found = run(f"x, y = k.taken_apart({pair}); s.store(o, 0, x); s.store(o, 64, y)", VECTORS, size=32)
    np.testing.assert_array_equal(found, np.r_[VECTORS.reshape(-1)[:32:2], VECTORS.reshape(-1)[1:32:2]])
    both = run(f"x, y = k.put_together({pair}); s.store(o, 0, x); s.store(o, 64, y)", found, size=32)
    np.testing.assert_array_equal(both, VECTORS.reshape(-1)[:32])
