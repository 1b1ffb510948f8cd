"""Errors of a tensor token by token: one number for each row, computed block by block in float64.

A row is everything that belongs to one new token. Judging rows and not whole tensors matters: the first token of many
models is a hundred times larger than the others, and its rounding alone would hide a mistake in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.dtypes import Array

Rows = NDArray[np.float64]

_BLOCK = 1 << 20  # numbers that are widened at a time
_HEADS_FIRST = ("scores", "probs")


def token_axis(name: str) -> int:
    """Axis of the new tokens in a tap: the first, but for scores and probs (H, T, S)."""
    return 1 if name.rpartition(".")[2] in _HEADS_FIRST else 0


def row_count(name: str, shape: tuple[int, ...]) -> int:
    """Return how many tokens a tap of this shape has."""
    return shape[token_axis(name)]


def blocks(name: str, *arrays: Array) -> Iterator[tuple[slice, list[NDArray[Any]]]]:
    """Yield float64 matrices (tokens, everything else) of the same tokens of arrays of one shape.

    Positions at which the last array is not finite (masked scores) are zero in all of them.
    """
    moved = [array.swapaxes(0, token_axis(name)) for array in arrays]
    count = moved[0].shape[0]
    width = max(1, moved[0].size // max(1, count))
    step = max(1, _BLOCK // width)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        wide = [array[part].astype(np.float64).reshape(part.stop - start, -1) for array in moved]
        hidden = ~np.isfinite(wide[-1])
        if hidden.any():
            for x in wide:
                x[hidden] = 0
        yield part, wide


def energy(name: str, x: Array) -> Rows:
    """Sum of squares of each row, shape (T,); masked positions count nothing."""
    found = np.empty(row_count(name, x.shape))
    for part, (wide,) in blocks(name, x):
        found[part] = np.einsum("ij,ij->i", wide, wide)
    return found


def squared_error(name: str, x: Array, base: Array) -> Rows:
    """Sum of squared differences of each row, shape (T,); positions that the base masks count nothing."""
    found = np.empty(row_count(name, base.shape))
    for part, (a, b) in blocks(name, x, base):
        a -= b
        found[part] = np.einsum("ij,ij->i", a, a)
    return found


def relative_error(name: str, x: Array, base: Array) -> float:
    """Squared error of the worst row, relative to its energy or, for a row that is small, that of the median one."""
    energies = energy(name, base)
    scales = np.maximum(energies, np.median(energies))
    errors = squared_error(name, x, base)
    if not errors.any():
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nanmax(np.where(errors == 0, 0.0, errors / scales)))
