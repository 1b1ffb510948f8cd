"""A few tokens as small integers, laid out for the rows of int8 and int4 weights (`npllama.kernels.byte_rows`).

The 64 numbers of a token that meet one group of weights get a step in common and become integers of three digits to
the base 256, which lose nothing that sums of float32 products would keep (`npllama.kernels.digits`)::

    x ≈ step · (65536 h + 256 m + l)

Weights come in lines of 64 bytes: a group of int8, or two groups of int4. What a token is to a line lies together: its
digits, the highest first, and what the sums of the line's products begin with (`npllama.kernels.byte_rows` says why).
Up to eight tokens are a **party**; those of a party follow one another, line by line.

A processor with narrow registers lacks the instruction that makes this fast (`npllama.kernels.llvm.WIDE`). There the
tokens stay float32, and the step is 1. Those that meet int4 lie in the order in which words of eight come apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.digits import integers_of
from npllama.kernels.jit import compiled
from npllama.kernels.llvm import WIDE
from npllama.kernels.simd_quantised import shift_right, store_low_bytes, subtract
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_rows import tokens_of

#: Tokens of a party, at most.
PARTY = 8

_LANES = 16
_LINE = 64
_SIXTEENTH = np.float32(1 / 16)
#: Digits of an integer, and int4 in a word of 32 bits.
_DIGITS, NIBBLES = 3, 8
#: Lines that a token is to one of int8, and to one of int4.
LINES_OF_INT8, LINES_OF_INT4 = (_DIGITS + 1, 2 * _DIGITS + 1) if WIDE else (4, NIBBLES + 1)
#: By how much int8 and int4 are taken larger than they are, in each byte of an int32.
_INT8_OFFSET, _INT4_OFFSET = 0x80808080 - (1 << 32), 0x08080808


class Tokens(NamedTuple):
    """Addresses of what a party is to the rows of one storage type.

    Attributes
    ----------
    lines : int
        For each line of weights and each token: for int8, a line of each digit; for int4, of each digit a line for the
        first halves of both groups and one for the last halves; behind them 16 int32, with which sums begin.
    steps, sums : int
        float32, for each token and group: the step, and the sum of the numbers that its integers stand for.
    pitch : int
        Bytes from a token's steps, or sums, to the next one's.
    """

    lines: int
    steps: int
    sums: int
    pitch: int


@subroutine(inline=True)
def line_bytes(is_int4: bool) -> int:
    """Return the bytes of what a token is to a line of weights."""
    return _LINE * (LINES_OF_INT4 if is_int4 else LINES_OF_INT8)


@subroutine(inline=True)
def count_lines(groups: int, is_int4: bool) -> int:
    """Return how many lines a row of so many groups has; the last one may be half of one."""
    return (groups + 1) // 2 if is_int4 else groups


@subroutine(inline=True)
def _pitch(groups: int) -> int:
    return (groups + _LANES) // _LANES * _LANES * 4  # one number more at least: the second group of a half line


@subroutine(inline=True)
def _party_bytes(groups: int, is_int4: bool, count: int) -> int:
    return count * (count_lines(groups, is_int4) * line_bytes(is_int4) + 2 * _pitch(groups))


@compiled()
def tokens_bytes(groups: int, is_int4: bool, n_new: int) -> int:
    """Return how many bytes so many tokens take, in whole cache lines; one more may be read."""
    whole = n_new // PARTY
    rest = n_new - PARTY * whole
    size = whole * _party_bytes(groups, is_int4, PARTY)
    return size + (_party_bytes(groups, is_int4, tokens_of(rest)) if rest > 0 else 0) + _LINE


@subroutine()
def party_at(address: int, groups: int, is_int4: bool, first: int, n_new: int) -> Tokens:
    """Return where the parts of the party are that begins with the token ``first`` of ``n_new``."""
    address += first // PARTY * _party_bytes(groups, is_int4, PARTY)
    count, pitch = tokens_of(min(PARTY, n_new - first)), _pitch(groups)
    steps = address + count * count_lines(groups, is_int4) * line_bytes(is_int4)
    return Tokens(address, steps, steps + count * pitch, pitch)


@compiled()
def take_apart(x: Array, is_int4: bool, room: Array) -> None:
    """Write what tokens x (T, N) are to lines to a room of as many int8 as `tokens_bytes` says, aligned to lines."""
    n_new, groups = x.shape[0], (x.shape[1] + GROUP - 1) // GROUP
    group, integers = np.zeros(GROUP, np.float32), np.zeros(GROUP, np.int32)
    size = line_bytes(is_int4)
    room[:] = 0
    for t in range(n_new):
        first = t // PARTY * PARTY
        count = tokens_of(min(PARTY, n_new - first))
        party = party_at(np.int64(room.ctypes.data), groups, is_int4, first, n_new)
        for g in range(groups):
            width = min(GROUP, x.shape[1] - GROUP * g)
            for j in range(width):
                group[j] = x[t, GROUP * g + j]
            group[width:] = 0
            number, line = (t - first) * party.pitch + 4 * g, count_lines(g + 1, is_int4) - 1
            address = party.lines + (line * count + t - first) * size
            if WIDE:
                step, total = integers_of(group, integers)
                simd.store_one(party.steps, number, step)
                simd.store_one(party.sums, number, np.float32(total) * step)
                _write_digits(integers, g % 2 if is_int4 else 0, is_int4, address)
                if g % 2 == 1 or g + 1 == groups or not is_int4:
                    _write_begin(is_int4, address)
            else:
                simd.store_one(party.steps, number, np.float32(1))
                simd.store_one(party.sums, number, _write_numbers(group, g % 2 if is_int4 else 0, is_int4, address))


@subroutine(inline=True)
def _write_numbers(group: Array, half: int, is_int4: bool, address: int) -> Any:
    """Write 64 numbers as they are, for int4 to one half of each line; return their sum.

    A word of eight int4 comes apart by masks: what stands at place k counts 16**k as much, and its number so much less.
    The highest is shifted down. Behind them stands -8 times the sum of a word's numbers, since int4 is taken around 0.
    """
    total = np.float32(0)
    if not is_int4:
        for j in range(GROUP):
            simd.store_one(address, 4 * j, group[j])
        return total
    for word in range(NIBBLES):
        place, of_word, weight = half * _LINE // 2 + 4 * word, np.float32(0), np.float32(1)
        for k in range(NIBBLES):
            number = group[4 * word + k // 2 + GROUP // 2 * (k % 2)]
            of_word += number
            simd.store_one(address, _LINE * k + place, number if k == NIBBLES - 1 else number * weight)
            weight *= _SIXTEENTH
        simd.store_one(address, _LINE * NIBBLES + place, np.float32(-8) * of_word)
        total += of_word
    return total


@subroutine(inline=True)
def _write_digits(integers: Array, half: int, is_int4: bool, address: int) -> None:
    """Write the digits of a group's integers (64,) to lines, for int4 to one half of each.

    They are int8. Below the highest, those for int8 weights are uint8: these weights are signed themselves then. So a
    digit of 128 to 255 leaves 1 more to the next place for int4.
    """
    carry = simd.broadcast(np.int32(128 if is_int4 else 0))
    for first in range(0, GROUP, _LANES):
        numbers = simd.load(integers, first)
        for digit in range(_DIGITS - 1, -1, -1):
            place = _LINE * digit + first
            if is_int4:
                place = _LINE * (2 * digit + first // (GROUP // 2)) + half * GROUP // 2 + first % (GROUP // 2)
            store_low_bytes(address, place, numbers)
            numbers = shift_right(simd.add(numbers, carry), 8)


@subroutine(inline=True)
def _write_begin(is_int4: bool, address: int) -> None:
    """Write what the sums of a line begin with behind its digits: less what the weights are taken too large by."""
    nothing, size = simd.broadcast(np.int32(0)), line_bytes(is_int4) - _LINE
    if is_int4:
        offset, total = simd.broadcast(np.int32(_INT4_OFFSET)), nothing
        for line in range(0, size, 2 * _LINE):
            total = simd.dot_bytes(simd.shift_left(total, 8), offset, simd.load_bytes(address, line))
            total = simd.dot_bytes(total, offset, simd.load_bytes(address, line + _LINE))
    else:
        total = simd.dot_bytes(nothing, simd.broadcast(np.int32(_INT8_OFFSET)), simd.load_bytes(address, 0))
    simd.store(address, size, subtract(nothing, total))
