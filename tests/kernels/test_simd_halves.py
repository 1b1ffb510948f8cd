"""Sums of a line's first half, then of its other half, are those of whole lines."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from npllama.dtypes import Array
from npllama.kernels.features import PATHS, host_features
from npllama.kernels.simd_halves import halves_at, inner_halves, store_halves
from npllama.kernels.simd_sums import inner_lines, store_sums, sums_at

RNG = np.random.default_rng(8)
pytestmark = pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")

#: Words of two bfloat16 of both signs and like sizes, or of a float32.
WORDS = (RNG.integers(0x3E00, 0x4000, 4096) + 0x8000 * RNG.integers(0, 2, 4096)).astype(np.uint16).view(np.uint32)
SUMS = RNG.standard_normal((8, 16)).astype(np.float32)
_PITCH = 192


def both_ways(n_rows: int, kind: int) -> tuple[Array, Array]:
    """Return eight sums after three lines of so many rows, whole and by halves."""
    x_line = 64 * (8 // n_rows) * (2 if kind == 1 else 1)

    @numba.njit
    def whole(sums: int, rows: int, x: int) -> None:
        tile = sums_at(sums, 8)
        for n in range(3):
            tile = inner_lines(tile, n_rows, kind, rows + 64 * n, _PITCH, x + x_line * n)
        store_sums(sums, tile)

    @numba.njit
    def by_halves(sums: int, rows: int, x: int) -> None:
        for half in range(0, 64, 32):
            halves = halves_at(sums + half, 8)
            for n in range(3):
                halves = inner_halves(halves, n_rows, kind, rows + 64 * n + half, _PITCH, x + x_line * n + half)
            store_halves(sums + half, halves)

    found = SUMS.copy(), SUMS.copy()
    for function, sums in zip((whole, by_halves), found, strict=True):
        function(sums.ctypes.data, WORDS.ctypes.data, WORDS[1024:].ctypes.data)
    return found


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["float32", "bfloat16", "pairs"])
@pytest.mark.parametrize("n_rows", [1, 2, 8])
def test_two_halves_are_the_whole_to_the_last_bit(n_rows: int, kind: int) -> None:
    whole, by_halves = both_ways(n_rows, kind)
    np.testing.assert_array_equal(by_halves, whole)
    assert (whole != SUMS).all()
