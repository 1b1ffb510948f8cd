"""Rows of an int8 or int4 matrix times one token, by dot products of bytes (Intel VNNI).

A group of 64 int8 weights is a vector register; so are two groups of int4, unpacked to low and high halves. With the
three digits of the input (`npllama.kernels.digits`) it takes three instructions, each 64 multiplications whose sums are
exact; a float32 multiplication by ``scale · step`` then adds the group to the row's sum. Nothing is widened to float32,
which is what lets a core keep up with its memory.

The instruction wants its first operand unsigned, so the weights are taken larger than they are: int8 by 128, which
makes them uint8, and int4, which is stored unsigned, by 8, so that they lie around zero. What that adds, 128 or 8 times
the sum of a lane's digits, is known before any weight is: each lane begins with its negative. For int4 there remains
``(minimum + 8 scale) · sum of the input``, with which the row's sum begins.

A row's result is one sum in one order, whatever rows are computed with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.digits import _split
from npllama.kernels.jit import compiled
from npllama.kernels.simd_quantised import (
    broadcast_at,
    broadcast_two_at,
    high_nibbles,
    load_first_bfloat16,
    load_floats,
    load_half,
    load_integers,
    low_nibbles,
    subtract,
)

#: Bytes of a group of int8, and of two groups of int4, in `Token.digits`.
_ONE, _TWO = 5 * GROUP, 8 * GROUP
_INT8_OFFSET, _INT4_OFFSET = 0x80808080 - (1 << 32), 0x08080808  # 128 and 8 in each byte of an int32
_LANES = 16


class Token(NamedTuple):
    """Addresses of what the input of one token is for the rows of one storage type.

    Arrays would be counted for every row, by whoever has them in hand: that takes longer than a short row.

    Attributes
    ----------
    digits : int
        Of 64 bytes each. For int8 and each group: high, middle and low digits; what a lane of high digits begins with,
        and one of the others (16 int32). For int4 and each two groups: digits of their first 32 numbers, and of their
        last 32, high, middle and low; and the same two beginnings. A group that is missing is zeros.
    steps, sums : int
        float32: step of each group, and the sum of the numbers that its digits stand for; zeros up to a multiple of 16.
    factors : int
        Room for as many float32: ``scale · step`` of one row.
    """

    digits: int
    steps: int
    sums: int
    factors: int


class Rows(NamedTuple):
    """Addresses of the first of some rows: of integers, scales, and minima, if there are any."""

    data: int
    scales: int
    minima: int


@compiled(inline=True)
def _sizes(groups: int, is_int4: bool) -> Any:
    """Return the bytes of a token's digits, and those of a number for each group."""
    return (groups + 1) // 2 * _TWO if is_int4 else groups * _ONE, (groups + _LANES - 1) // _LANES * _LANES * 4


@compiled()
def token_bytes(groups: int, is_int4: bool) -> Any:
    """Return how many bytes a token of so many groups takes: whole cache lines."""
    digits, floats = _sizes(groups, is_int4)
    return digits + 3 * floats


@compiled()
def token_at(address: int, groups: int, is_int4: bool) -> Token:
    """Return where the parts of a token are that lies at an address."""
    digits, floats = _sizes(groups, is_int4)
    steps = address + digits
    return Token(address, steps, steps + floats, steps + 2 * floats)


@compiled()
def take_apart(x: Array, is_int4: bool, room: Array) -> None:
    """Write a token's numbers x (N,) to its room, as many int8 as it takes bytes, aligned to cache lines."""
    group, digits = np.zeros(GROUP, np.float32), np.zeros((3, GROUP), np.int8)
    groups = (x.shape[0] + GROUP - 1) // GROUP
    size, floats = _sizes(groups, is_int4)
    steps, sums = room[size : size + floats].view(np.float32), room[size + floats : size + 2 * floats].view(np.float32)
    room[:] = 0
    for g in range(groups):
        count = min(GROUP, x.shape[0] - GROUP * g)
        for j in range(count):
            group[j] = x[GROUP * g + j]
        group[count:] = 0
        steps[g], sums[g] = _split(group, digits)
        if is_int4:
            at = g // 2 * _TWO + g % 2 * GROUP // 2
            for line in range(6):
                for j in range(GROUP // 2):
                    room[at + GROUP * line + j] = digits[line // 2, line % 2 * GROUP // 2 + j]
        else:
            for digit in range(3):
                simd.store(room, g * _ONE + GROUP * digit, simd.load(digits, GROUP * digit))
            _begin_int8(room, g * _ONE)
    if is_int4:
        for at in range(0, size, _TWO):
            _begin_int4(room, at)


@compiled(inline=True)
def _begin_int8(digits: Array, at: int) -> None:
    """Write what the lanes of a group begin with, behind its digits: ``-128 h``, and ``-128 (256 m + l)``."""
    nothing, offset = simd.broadcast(np.int32(0)), simd.broadcast(np.int32(_INT8_OFFSET))
    high = simd.dot_bytes(nothing, offset, simd.load(digits, at))
    middle = simd.dot_bytes(nothing, offset, simd.load(digits, at + GROUP))
    lower = simd.dot_bytes(simd.shift_left(middle, 8), offset, simd.load(digits, at + 2 * GROUP))
    simd.store(digits, at + 3 * GROUP, subtract(nothing, high))
    simd.store(digits, at + 4 * GROUP, subtract(nothing, lower))


@compiled(inline=True)
def _begin_int4(digits: Array, at: int) -> None:
    """Write what the lanes of two groups begin with, behind their digits: ``-8 h``, and ``-8 (256 m + l)``."""
    nothing, offset = simd.broadcast(np.int32(0)), simd.broadcast(np.int32(_INT4_OFFSET))
    high = _dot_two(nothing, offset, offset, digits, at)
    middle = _dot_two(nothing, offset, offset, digits, at + 2 * GROUP)
    lower = _dot_two(simd.shift_left(middle, 8), offset, offset, digits, at + 4 * GROUP)
    simd.store(digits, at + 6 * GROUP, subtract(nothing, high))
    simd.store(digits, at + 7 * GROUP, subtract(nothing, lower))


@compiled(inline=True)
def _dot_two(total: Any, low: Any, high: Any, digits: Any, at: int) -> Any:
    """Add the products of two vectors of weights with the digits at one place and behind it."""
    total = simd.dot_bytes(total, low, simd.load_bytes(digits, at))
    return simd.dot_bytes(total, high, simd.load_bytes(digits, at + GROUP))


@compiled(inline=True)
def rows_at(weights: Rows, row: int, groups: int, is_int4: bool) -> Rows:
    """Return the rows from ``row`` on."""
    data, scales = GROUP // 2 * groups if is_int4 else GROUP * groups, 2 * groups
    return Rows(weights.data + data * row, weights.scales + scales * row, weights.minima + scales * row)


@compiled()
def multiply_rows(
    weights: Rows, count: int, groups: int, is_int4: bool, token: Token, ahead: Rows, output: int
) -> None:
    """Write the products of ``count`` rows with a token to an address, as float32.

    Meanwhile as many rows at ``ahead`` are fetched from memory: the processor by itself looks no further than a page.
    """
    for row in range(count):
        here, there = rows_at(weights, row, groups, is_int4), rows_at(ahead, row, groups, is_int4)
        total = _weigh(here, groups, is_int4, token, there)
        if is_int4:
            number = _row_int4(here.data, groups, token, total, there.data)
        else:
            number = _row_int8(here.data, groups, token, there.data)
        simd.store_one(output, 4 * row, number)


@compiled(inline=True)
def _weigh(row: Rows, groups: int, is_int4: bool, token: Token, ahead: Rows) -> Any:
    """Fill ``token.factors`` with ``scale · step``; return lanes whose sum is that of ``(minimum + 8 scale) · sum``."""
    total, eight = simd.broadcast(np.float32(0)), simd.broadcast(np.float32(8))
    for g in range(0, groups, _LANES):
        simd.prefetch(ahead.scales, 2 * g)
        scale = load_first_bfloat16(row.scales, 2 * g, groups - g)
        simd.store(token.factors, 4 * g, simd.multiply(scale, load_floats(token.steps, 4 * g)))
        if is_int4:
            simd.prefetch(ahead.minima, 2 * g)
            middle = simd.fused_multiply_add(scale, eight, load_first_bfloat16(row.minima, 2 * g, groups - g))
            total = simd.fused_multiply_add(middle, load_floats(token.sums, 4 * g), total)
    return total


@compiled(inline=True)
def _row_int8(data: int, groups: int, token: Token, ahead: int) -> Any:
    """Return the sum of ``scale · step · sum(q · integer)`` over the groups of a row.

    The two high digits share an accumulator: four products of 8 and 16 bits fit 32 bits, of 8 and 24 they do not.
    """
    upper = lower = simd.broadcast(np.float32(0))
    for g in range(groups):
        simd.prefetch(ahead, GROUP * g)
        here, factor = token.digits + _ONE * g, broadcast_at(token.factors, 4 * g)
        weights = simd.flip_signs(simd.load_bytes(data, GROUP * g))
        two = simd.dot_bytes(load_integers(here, 3 * GROUP), weights, simd.load_bytes(here, 0))
        two = simd.dot_bytes(simd.shift_left(two, 8), weights, simd.load_bytes(here, GROUP))
        one = simd.dot_bytes(load_integers(here, 4 * GROUP), weights, simd.load_bytes(here, 2 * GROUP))
        upper = simd.fused_multiply_add(simd.to_float(two), factor, upper)
        lower = simd.fused_multiply_add(simd.to_float(one), factor, lower)
    return simd.add_lanes(simd.fused_multiply_add(upper, simd.broadcast(np.float32(256)), lower))


@compiled(inline=True)
def _row_int4(data: int, groups: int, token: Token, total: Any, ahead: int) -> Any:
    """Return the sum of ``scale · step · sum((q - 8) · integer)`` over the groups of a row, and of what is there."""
    for g in range(0, groups - 1, 2):
        simd.prefetch(ahead, GROUP // 2 * g)
        total = _add_int4(simd.load_bytes(data, GROUP // 2 * g), token, g, total)
    if groups % 2:
        total = _add_int4(load_half(data, GROUP // 2 * (groups - 1)), token, groups - 1, total)
    return simd.add_lanes(total)


@compiled(inline=True)
def _add_int4(weights: Any, token: Token, group: int, total: Any) -> Any:
    """Add two groups to a row's sum: all three digits in one accumulator."""
    low, high, at = low_nibbles(weights), high_nibbles(weights), _TWO // 2 * group
    sums = _dot_two(load_integers(token.digits, at + 6 * GROUP), low, high, token.digits, at)
    sums = _dot_two(simd.shift_left(sums, 8), low, high, token.digits, at + 2 * GROUP)
    sums = simd.add(simd.shift_left(sums, 8), load_integers(token.digits, at + 7 * GROUP))
    sums = _dot_two(sums, low, high, token.digits, at + 4 * GROUP)
    return simd.fused_multiply_add(simd.to_float(sums), broadcast_two_at(token.factors, 4 * group), total)
