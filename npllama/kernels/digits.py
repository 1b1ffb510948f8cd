"""Activations as small integers that lose nothing: what the units for bytes multiply quantised weights with.

A processor multiplies bytes several times faster than floats, and sums them exactly, as int32. So the 64 numbers of an
input that meet one group of weights get a **step** in common and become integers of 24 bits, and these three **digits**
to the base 256, each an int8::

    x ≈ step · (65536 h + 256 m + l)        step = max |x| / (127 · 65536)

The largest number of a group keeps the 24 bits that a float32 has. What the others lose, relative to that one, is what
a sum of float32 products loses anyway: against float64 the results are as close as those of float32 arithmetic.

A group that holds NaN or an infinity gets the step NaN, so that nothing computed from it is a number. One whose
numbers are all below 2**-100 counts as zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from npllama.dtypes import GROUP, Array, n_groups
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.memory import aligned
from npllama.kernels.rounded import divided
from npllama.kernels.simd_quantised import (
    larger,
    largest_lane,
    load_floats,
    magnitudes,
    shift_right,
    store_low_bytes,
    sum_of_lanes,
    to_integers,
)
from npllama.kernels.subroutines import subroutine

#: Bytes of the digits of a group of one token.
GROUP_BYTES = 3 * GROUP
#: Numbers behind the steps and sums that whoever loads 16 at once may touch.
_MARGIN = 16
#: Numbers below which waking the other threads costs more than it saves.
_SMALL = 1 << 15
_BYTES = np.empty(0, np.int8)
_LARGEST = np.float32(127 * 65536)
_SMALLEST = np.float32(2.0**-100)
_ONES = np.int32(0x01010101)  # four times one


def pack(x: Array, columns: int) -> tuple[Array, Array, Array]:
    """Take an input apart.

    Parameters
    ----------
    x : ndarray of shape (T, N), float32
    columns : int
        Tokens of a panel, C: 1, or as many as a matrix tile takes. The last panel is filled up with zeros.

    Returns
    -------
    digits : ndarray, int8
        Of shape (panels, groups, 3, 16, C, 4), flat: for each panel, group and digit, the highest first, 16 rows; in a
        row four digits in a sequence for each token. With C = 1, the digits of 64 numbers in order.
    steps : ndarray, float32
        Of shape (panels, groups, C), flat, with 16 more numbers behind.
    sums : ndarray, float32
        Sums of the numbers that the digits stand for; same shape.
    """
    n_new, width = x.shape
    panels, groups = -(-n_new // columns), n_groups(width)
    digits = aligned(panels * groups * GROUP_BYTES * columns, _BYTES)
    steps, sums = (np.zeros(panels * groups * columns + _MARGIN, np.float32) for _ in range(2))
    (_pack if n_new * width < _SMALL else _pack_shared)(x, columns, panels, groups, digits, steps, sums)
    return digits, steps, sums


@compiled()
def _pack(x: Array, columns: int, panels: int, groups: int, digits: Array, steps: Array, sums: Array) -> None:
    for panel in range(panels):
        _pack_panel(x, columns, panel, groups, digits, steps, sums)


@compiled(parallel=True)
def _pack_shared(x: Array, columns: int, panels: int, groups: int, digits: Array, steps: Array, sums: Array) -> None:
    """Do what `_pack` does, the panels shared between threads."""
    for panel in prange(panels):
        _pack_panel(x, columns, panel, groups, digits, steps, sums)


@subroutine(counted=True)
def _pack_panel(x: Array, columns: int, panel: int, groups: int, digits: Array, steps: Array, sums: Array) -> None:
    group = np.zeros(GROUP, np.float32)
    words, packed = np.empty((3, 16), np.int32), digits.view(np.int32)  # four digits a word
    for c in range(columns):
        t = panel * columns + c
        for g in range(groups):
            first = GROUP * g
            count = min(GROUP, x.shape[1] - first) if t < x.shape[0] else 0
            for j in range(count):
                group[j] = x[t, first + j]
            group[count:] = 0
            place = (panel * groups + g) * columns
            steps[place + c], sums[place + c] = _split(group, words.view(np.int8))
            at = GROUP_BYTES // 4 * place + c
            for digit in range(3):
                for k in range(16):
                    packed[at + columns * (16 * digit + k)] = words[digit, k]


@subroutine(counted=True)
def _split(group: Array, digits: Array) -> tuple[np.float32, np.float32]:
    """Fill the digits (3, 64) of 64 numbers; return their step and the sum of what the digits stand for."""
    integers = np.empty(GROUP, np.int32)
    step, total = integers_of(group, integers)
    for j in range(GROUP):
        low = np.int8(integers[j])
        upper = np.int32(integers[j] - np.int32(low)) >> np.int32(8)
        middle = np.int8(upper)
        digits[0, j] = np.int8(np.int32(upper - np.int32(middle)) >> np.int32(8))
        digits[1, j] = middle
        digits[2, j] = low
    return step, np.float32(total) * step


@compiled()
def integers_of(group: Array, integers: Array) -> tuple[np.float32, np.int32]:
    """Fill integers (64,), int32, with 64 numbers in units of their step; return the step and the integers' sum.

    The step is NaN for a group that is not finite, and 0 for one of tiny numbers; the integers are zeros then.
    """
    bits, top = group.view(np.int32), np.int32(0)
    for j in range(GROUP):  # as integers, without their signs, floats have the same order, with NaN on top
        top = max(top, np.int32(bits[j] & np.int32(0x7FFFFFFF)))
    top_bits = np.int32(top)
    largest = top_bits.view(np.float32)
    if not _SMALLEST < largest < np.float32(np.inf):
        integers[:] = 0
        return largest * np.float32(0), np.int32(0)  # NaN where it is not finite
    scale, total = _LARGEST / largest, np.int32(0)
    for j in range(GROUP):
        integer = np.int32(np.rint(group[j] * scale))
        total += integer
        integers[j] = integer
    return largest / _LARGEST, total


@subroutine()
def digit_lanes(numbers: int, lines: int, apart: int) -> Any:
    """Take 64 float32 at an address apart, in vector registers by name.

    Their digits, the highest first, are written as lines of 64 bytes, ``apart`` bytes from one to the next. Return the
    step, and the sum of each line's digits.
    """
    a, b, c, d = load_floats(numbers, 0), load_floats(numbers, 64), load_floats(numbers, 128), load_floats(numbers, 192)
    top = np.int32(largest_lane(larger(larger(magnitudes(a), magnitudes(b)), larger(magnitudes(c), magnitudes(d)))))
    largest, ones, nothing = top.view(np.float32), simd.broadcast(_ONES), simd.broadcast(np.int32(0))
    if not _SMALLEST < largest < np.float32(np.inf):
        simd.store(lines, 0, nothing), simd.store(lines, apart, nothing), simd.store(lines, 2 * apart, nothing)
        return largest * np.float32(0), np.int32(0), np.int32(0), np.int32(0)  # NaN where it is not finite
    scale = simd.broadcast(divided(_LARGEST, largest))
    i, j = to_integers(simd.multiply(a, scale)), to_integers(simd.multiply(b, scale))
    k, m = to_integers(simd.multiply(c, scale)), to_integers(simd.multiply(d, scale))
    for digit in range(2, -1, -1):
        line = lines + apart * digit
        store_low_bytes(line, 0, i), store_low_bytes(line, 16, j)
        store_low_bytes(line, 32, k), store_low_bytes(line, 48, m)
        i, j, k, m = _upper(i), _upper(j), _upper(k), _upper(m)
    high = sum_of_lanes(simd.dot_bytes(nothing, ones, simd.load_bytes(lines, 0)))
    middle = sum_of_lanes(simd.dot_bytes(nothing, ones, simd.load_bytes(lines, apart)))
    low = sum_of_lanes(simd.dot_bytes(nothing, ones, simd.load_bytes(lines, 2 * apart)))
    return divided(largest, _LARGEST), high, middle, low


@subroutine(inline=True)
def _upper(integers: Any) -> Any:
    """Return what is left of integers without their lowest digit, -128 to 127."""
    return shift_right(simd.add(integers, simd.broadcast(np.int32(128))), 8)
