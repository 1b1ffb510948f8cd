"""Scales, minima and integers of groups of weights: the twins of `npllama.checkpoint.fits`, to the last bit.

A **tile** is a group of many rows, turned: a line of it holds the same number of all these rows, so that loops along a
line run on whole vector registers, and a group's sums are added up in the order in which they are written down. These
functions are compiled as they stand: nothing is reordered, no product is fused into a sum. So the same numbers become
the same bytes on every processor, on however many threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npllama.dtypes import GROUP, LARGEST, PACKINGS, Array
from npllama.kernels.jit import compiled, narrowed, widened
from npllama.kernels.subroutines import subroutine
from npllama.kernels.threads import share

#: Rows of a tile, whose 64 lines are 16 KB: they stay in the first-level cache.
_ROWS = 64
#: Tiles that are worth a thread.
_LEAST = 16

_INT8, _INT4 = PACKINGS["int8"], PACKINGS["int4"]
_HIGHEST_INT8, _HIGHEST_INT4 = np.float32(_INT8.highest), np.float32(_INT4.highest)
_ZERO, _ONE, _HALF, _INFINITE = (np.float32(number) for number in (0, 1, 0.5, np.inf))
#: A bfloat16 that is none.
_NAN = np.uint16(0x7FC0)


def ray(x: Array, watched: Array, counts: Array, others: Array, n_scales: int) -> tuple[Array, Array]:
    """Fit ``x ≈ s q`` as `npllama.checkpoint.fits.ray` does."""
    data = np.empty((len(x), x.shape[1] * _INT8.group_bytes), np.int8)
    scales = np.empty(x.shape[:2], np.uint16)
    _share(x, lambda start, stop: _rays(x, watched, counts, others, n_scales, data, scales, start, stop))
    return data, scales


def line(x: Array, counts: Array, shares: Array, rounds: int) -> tuple[Array, Array, Array]:
    """Fit ``x ≈ s q + m`` as `npllama.checkpoint.fits.line` does."""
    data = np.empty((len(x), x.shape[1] * _INT4.group_bytes), np.uint8)
    scales, minima = (np.empty(x.shape[:2], np.uint16) for _ in range(2))
    _share(x, lambda start, stop: _lines(x, counts, shares, rounds, data, scales, minima, start, stop))
    return data, scales, minima


def _share(x: Array, work: Callable[[int, int], None]) -> None:
    """Share the tiles of x (R, groups, 64) between threads."""
    share(-(-len(x) // _ROWS) * x.shape[1], work, least=_LEAST)


@compiled(exact=True)
def _rays(
    x: Array,
    watched: Array,
    counts: Array,
    others: Array,
    n_scales: int,
    data: Array,
    scales: Array,
    start: int,
    stop: int,
) -> None:
    """Fill data and scales of the tiles from ``start`` to ``stop``."""
    tile, unit, sound = _tile(), _floats(), np.empty(_ROWS, np.bool_)
    scale, squared, least, bits, best = _floats(), _floats(), _floats(), _bfloats(), _bfloats()
    for number in range(start, stop):
        first, group = _ROWS * (number // x.shape[1]), number % x.shape[1]
        _turn(x, first, group, tile, unit, sound)
        for r in range(_ROWS):
            bits[r], least[r] = _least_scale(unit[r], bits), _INFINITE
            best[r] = bits[r]
        for _ in range(n_scales):
            for r in range(_ROWS):
                scale[r], squared[r] = widened(bits[r]) / unit[r], _ZERO
            for i in range(watched.shape[1]):
                j, count = watched[group, i], counts[group, i]
                for r in range(_ROWS):
                    step = tile[j, r] / scale[r]
                    step -= np.rint(step)
                    squared[r] += step * step * count
            for r in range(_ROWS):
                error = (squared[r] + others[group]) * (scale[r] * scale[r])
                better = error < least[r]
                least[r], best[r] = error if better else least[r], bits[r] if better else best[r]
                bits[r] += np.uint16(1)
        for r in range(_ROWS):
            scale[r] = widened(best[r]) / unit[r]
        for j in range(GROUP):
            for r in range(_ROWS):
                whole = np.rint(tile[j, r] / scale[r])
                tile[j, r] = min(max(whole, -_HIGHEST_INT8), _HIGHEST_INT8)
        for r in range(min(_ROWS, len(x) - first)):
            scales[first + r, group] = best[r] if sound[r] else _NAN
            for j in range(GROUP):
                data[first + r, GROUP * group + j] = np.int8(tile[j, r])


@subroutine(exact=True, inline=True)
def _least_scale(largest: np.float32, like: Array) -> np.uint16:
    """Return the bits of the least bfloat16 above 0 by which the largest number rounds to the highest integer."""
    wanted = largest / (_HIGHEST_INT8 + _HALF)
    bits = narrowed(wanted, like)
    if widened(bits) < wanted:
        bits += np.uint16(1)
    return max(bits, np.uint16(1))


@compiled(exact=True)
def _lines(
    x: Array,
    counts: Array,
    shares: Array,
    rounds: int,
    data: Array,
    scales: Array,
    minima: Array,
    start: int,
    stop: int,
) -> None:
    """Fill data, scales and minima of the tiles from ``start`` to ``stop``."""
    tile, q, best, unit, sound = _tile(), _tile(), _tile(), _floats(), np.empty(_ROWS, np.bool_)
    low, high, mean, slope, begin = _floats(), _floats(), _floats(), _floats(), _floats()
    squared, least = _floats(), _floats()
    scale, minimum, best_scale, best_minimum = _bfloats(), _bfloats(), _bfloats(), _bfloats()
    for number in range(start, stop):
        first, group = _ROWS * (number // x.shape[1]), number % x.shape[1]
        _turn(x, first, group, tile, unit, sound)
        low[:], high[:], least[:] = _INFINITE, -_INFINITE, _INFINITE
        best[:], best_scale[:], best_minimum[:] = _ZERO, np.uint16(0), np.uint16(0)
        for j in range(GROUP):
            for r in range(_ROWS):
                low[r], high[r] = min(low[r], tile[j, r]), max(high[r], tile[j, r])
        _sum(tile, counts[group], mean)
        for guess in range(len(shares)):
            for r in range(_ROWS):
                slope[r] = (high[r] - low[r]) * (shares[guess] / _HIGHEST_INT4)
                begin[r] = (low[r] + high[r]) * _HALF - slope[r] * (_HIGHEST_INT4 * _HALF)
            for _ in range(rounds):
                _nearest(tile, slope, begin, q)
                _draw(tile, q, counts[group], mean, slope, begin)
            for r in range(_ROWS):
                scale[r], minimum[r] = narrowed(slope[r] * unit[r], scale), narrowed(begin[r] * unit[r], minimum)
                slope[r], begin[r], squared[r] = widened(scale[r]) / unit[r], widened(minimum[r]) / unit[r], _ZERO
            _nearest(tile, slope, begin, q)
            for j in range(GROUP):
                for r in range(_ROWS):
                    error = tile[j, r] - (slope[r] * q[j, r] + begin[r])
                    squared[r] += counts[group, j] * error * error
            for j in range(GROUP):
                for r in range(_ROWS):
                    best[j, r] = q[j, r] if squared[r] < least[r] else best[j, r]
            for r in range(_ROWS):
                better = squared[r] < least[r]
                best_scale[r] = scale[r] if better else best_scale[r]
                best_minimum[r] = minimum[r] if better else best_minimum[r]
                least[r] = squared[r] if better else least[r]
        for r in range(min(_ROWS, len(x) - first)):
            scales[first + r, group] = best_scale[r] if sound[r] else _NAN
            minima[first + r, group] = best_minimum[r]
            for j in range(GROUP // 2):
                pair = np.uint8(best[j, r]) | np.uint8(best[j + GROUP // 2, r]) << np.uint8(4)
                data[first + r, GROUP // 2 * group + j] = pair


@subroutine(exact=True, inline=True, counted=True)
def _tile() -> Array:
    """Return room for a tile."""
    return np.empty((GROUP, _ROWS), np.float32)


@subroutine(exact=True, inline=True, counted=True)
def _floats() -> Array:
    """Return room for a float32 for each row."""
    return np.empty(_ROWS, np.float32)


@subroutine(exact=True, inline=True, counted=True)
def _bfloats() -> Array:
    """Return room for a bfloat16 for each row."""
    return np.empty(_ROWS, np.uint16)


@subroutine(exact=True, inline=True, counted=True)
def _turn(x: Array, first: int, group: int, tile: Array, unit: Array, sound: Array) -> None:
    """Fill a tile with a group of as many rows from the first one on as it has room for, the last again and again.

    Each row's numbers are in units of the largest. Where one is NaN or too large, they are zeros, and not sound.
    """
    for r in range(_ROWS):
        row = min(first + r, len(x) - 1)
        for j in range(GROUP):
            tile[j, r] = x[row, group, j]
    total = np.zeros(_ROWS, np.float32)
    unit[:] = _ZERO
    for j in range(GROUP):
        for r in range(_ROWS):
            size = abs(tile[j, r])
            unit[r] = size if size > unit[r] else unit[r]
            total[r] += size  # NaN if any of them is
    for r in range(_ROWS):
        sound[r] = unit[r] <= LARGEST and total[r] == total[r]
        unit[r] = unit[r] if sound[r] and unit[r] > _ZERO else _ONE
    for j in range(GROUP):
        for r in range(_ROWS):
            tile[j, r] = (tile[j, r] if sound[r] else _ZERO) / unit[r]


@subroutine(exact=True, inline=True)
def _sum(tile: Array, counts: Array, total: Array) -> None:
    """Fill total with the sum of a tile's lines, each as often as it counts."""
    total[:] = _ZERO
    for j in range(GROUP):
        for r in range(_ROWS):
            total[r] += counts[j] * tile[j, r]


@subroutine(exact=True, inline=True, counted=True)
def _draw(tile: Array, q: Array, counts: Array, mean: Array, slope: Array, begin: Array) -> None:
    """Fill slope and begin with those of the lines of least squares through the points (q, number)."""
    middle, spread, together = _floats(), _floats(), _floats()
    _sum(q, counts, middle)
    spread[:], together[:] = _ZERO, _ZERO
    for j in range(GROUP):
        for r in range(_ROWS):
            weighted = counts[j] * (q[j, r] - middle[r])
            spread[r] += weighted * (q[j, r] - middle[r])
            together[r] += weighted * (tile[j, r] - mean[r])
    for r in range(_ROWS):
        slope[r] = together[r] / (spread[r] if spread[r] > _ZERO else _ONE)
        begin[r] = mean[r] - slope[r] * middle[r]


@subroutine(exact=True, inline=True)
def _nearest(tile: Array, scale: Array, minimum: Array, q: Array) -> None:
    """Fill q with the integers from 0 on for which ``scale * q + minimum`` comes closest to a tile's numbers."""
    for j in range(GROUP):
        for r in range(_ROWS):
            whole = np.rint((tile[j, r] - minimum[r]) / (scale[r] if scale[r] > _ZERO else _ONE))
            q[j, r] = min(max(whole, _ZERO), _HIGHEST_INT4)
