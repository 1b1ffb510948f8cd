"""The scale, minimum and integers of a group of weights: the textbook, in plain NumPy.

Its twins, which conversion runs, are in `npllama.kernels.fits`, and give the same bytes. Sums are added up number by
number, as `_sum` spells it, since the order decides the last bits. What is fitted, and why, is told in
`npllama.checkpoint.quantize`.
"""

from __future__ import annotations

import numpy as np

from npllama.dtypes import LARGEST, PACKINGS, SCALE, Array, Packing, narrow, pack, widen

_INT8, _INT4 = PACKINGS["int8"], PACKINGS["int4"]
#: A bfloat16 that is none.
_NAN = np.uint16(0x7FC0)


def ray(x: Array, watched: Array, counts: Array, others: Array, n_scales: int) -> tuple[Array, Array]:
    """Fit ``x ≈ s q`` (int8): of the first bfloat16 scales that cut nothing off, the one with the least error.

    Parameters
    ----------
    x : ndarray of shape (R, groups, 64), float32
        A group that holds NaN, or a number beyond `npllama.dtypes.LARGEST`, gets NaN for a scale.
    watched : ndarray of shape (groups, W)
        The numbers of a group whose errors are looked at.
    counts : ndarray of shape (groups, W), float32
        How much the squared error of each counts.
    others : ndarray of shape (groups,), float32
        What the numbers that are not watched add, in squared steps of the scale.
    n_scales : int
        Scales to try.

    Returns
    -------
    data : ndarray of shape (R, groups * 64), int8
    scales : ndarray of shape (R, groups), uint16
        bfloat16 bit patterns.
    """
    tile, unit, sound = _in_units(x)
    seen = np.take_along_axis(tile, watched.T[:, None], axis=0)  # (W, R, groups)
    first = _least_scales(unit)  # (R, groups)
    best, least = first, np.full_like(unit, np.inf)
    for bits in (first + np.uint16(k) for k in range(n_scales)):
        scale = widen(bits, SCALE) / unit
        steps = seen / scale
        steps -= np.rint(steps)
        error = (_sum(steps * steps * counts.T[:, None]) + others) * (scale * scale)
        best, least = np.where(error < least, bits, best), np.minimum(error, least)
    q = _nearest(tile, widen(best, SCALE) / unit, np.zeros_like(unit), -_INT8.highest, _INT8.highest)
    return _rows(q, _INT8), np.where(sound, best, _NAN)


def line(x: Array, counts: Array, shares: Array, rounds: int) -> tuple[Array, Array, Array]:
    """Fit ``x ≈ s q + m`` (int4): lines of least squares from several first guesses, and the best of these.

    Parameters
    ----------
    x : ndarray of shape (R, groups, 64), float32
        As for `ray`.
    counts : ndarray of shape (groups, 64), float32
        How much the squared error of each number of a group counts; of a group, they add up to 1.
    shares : ndarray, float32
        Of the range of a group, what first guesses share out between the integers.
    rounds : int
        Lines that are drawn from each.

    Returns
    -------
    data : ndarray of shape (R, groups * 32), uint8
        Two integers each.
    scales, minima : ndarray of shape (R, groups), uint16
        bfloat16 bit patterns.
    """
    tile, unit, sound = _in_units(x)
    counts = counts.T[:, None]  # (64, 1, groups)
    low, high, mean = tile.min(axis=0), tile.max(axis=0), _sum(counts * tile)
    best_q = np.zeros_like(tile)
    best_scale = best_minimum = np.zeros(unit.shape, np.uint16)
    least = np.full_like(unit, np.inf)
    highest = np.float32(_INT4.highest)
    for part in shares:
        slope = (high - low) * (part / highest)
        begin = (low + high) / 2 - slope * (highest / 2)
        for _ in range(rounds):
            q = _nearest(tile, slope, begin, 0, _INT4.highest)
            slope, begin = _draw(tile, q, counts, mean)
        scale, minimum = narrow(slope * unit, SCALE), narrow(begin * unit, SCALE)
        slope, begin = widen(scale, SCALE) / unit, widen(minimum, SCALE) / unit
        q = _nearest(tile, slope, begin, 0, _INT4.highest)
        error = tile - (slope * q + begin)
        squared = _sum(counts * error * error)
        better = squared < least
        best_q, least = np.where(better, q, best_q), np.where(better, squared, least)
        best_scale, best_minimum = np.where(better, scale, best_scale), np.where(better, minimum, best_minimum)
    return _rows(best_q, _INT4), np.where(sound, best_scale, _NAN), best_minimum


def _in_units(x: Array) -> tuple[Array, Array, Array]:
    """Return numbers (64, R, groups) in units of each group's largest, these units, and which groups are sound.

    In such units nothing can overflow, whatever the weights' size. A group that is not sound becomes zeros.
    """
    largest = np.abs(x).max(axis=-1)
    sound = largest <= LARGEST
    unit = np.where(sound & (largest > 0), largest, np.float32(1))
    numbers = np.where(sound[..., None], x, np.float32(0)) / unit[..., None]
    return np.ascontiguousarray(np.moveaxis(numbers, -1, 0)), unit, sound


def _least_scales(largest: Array) -> Array:
    """Return the bits of the least bfloat16 above 0 by which the largest number rounds to the highest integer."""
    wanted = largest / np.float32(_INT8.highest + 0.5)
    bits = narrow(wanted, SCALE)
    bits += widen(bits, SCALE) < wanted
    bits[bits == 0] = 1
    return bits


def _draw(tile: Array, q: Array, counts: Array, mean: Array) -> tuple[Array, Array]:
    """Return slope and begin of the lines of least squares through the points (q, number)."""
    middle = _sum(counts * q)
    weighted = counts * (q - middle)
    spread, together = _sum(weighted * (q - middle)), _sum(weighted * (tile - mean))
    slope = together / np.where(spread > 0, spread, np.float32(1))
    return slope, mean - slope * middle


def _nearest(x: Array, scale: Array, minimum: Array, lowest: int, highest: int) -> Array:
    """Return the integers within bounds for which ``scale * q + minimum`` comes closest to x."""
    q = (x - minimum) / np.where(scale > 0, scale, np.float32(1))
    return np.clip(np.rint(q, out=q), lowest, highest, out=q)


def _sum(lines: Array) -> Array:
    """Add up along the first axis, one after the other. NumPy's own sum has other orders, too."""
    total: Array = np.zeros_like(lines[0])
    for numbers in lines:
        total += numbers
    return total


def _rows(q: Array, packing: Packing) -> Array:
    """Store integers (64, R, groups) as rows of bytes."""
    return pack(np.moveaxis(q, 0, -1), packing)
