"""Products of some blocks of rows and a panel of tokens, laid out as squares: the loops of `vector_blocks`.

Sums are in registers as long as there are products of one kind to be added, for as many blocks and tokens as there is
room for. A processor adds two products in the time that it takes to load two words: each word of a token meets two
blocks, or three. And it writes a sum in the time that it takes to add one: only what must be is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from npllama.kernels.llvm import DOTS, WIDE
from npllama.kernels.simd_blocks import (
    add_digits,
    add_outer_to_memory,
    add_scaled_to_memory,
    add_stepped,
    add_to_memory,
    at_next_place,
    outer_bytes,
    outer_floats,
    outer_nibbles,
    outer_pairs,
    outer_words,
    repeated,
    vectors_at,
)
from npllama.kernels.simd_sums import first_sums, no_sums, store_sums, sums_at
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_fields import SIDE
from npllama.kernels.vector_squares import (
    BEGIN,
    BYTES,
    DIGITS,
    FLOATS,
    INPUT_LINES,
    LINE,
    MIDDLE,
    PAIRS,
    SCALE,
    SQUARE,
    STEP,
    SUM,
    WEIGHT_LINES,
    WORDS,
    are_integers,
    has_minima,
    input_bytes,
    squares,
    weight_bytes,
)

#: Blocks of rows that are multiplied at once, and those of bytes.
BLOCKS, BLOCKS_OF_BYTES = (2, 3) if WIDE else (1, 1)
#: Tokens whose sums are in registers at a time: where there are some of one kind, and where there are those of a group,
#: of digits, and of all groups.
_MOST, _FEWER = (8, 4) if WIDE else (4, 4)


def blocks_at_once(kind: int) -> int:
    """Return how many blocks of rows are multiplied at once in products of a kind."""
    return BLOCKS_OF_BYTES if kind == BYTES else BLOCKS


class Blocks(NamedTuple):
    """Where the weights of some blocks are, the first one's, and its sums; how far the next one's are from these.

    ``totals`` is where there is room for the sums of a panel, which narrow registers ask for.
    """

    weights: int
    pitch: int
    sums: int
    sums_pitch: int
    totals: int


@subroutine(inline=True)
def add_products(blocks: Blocks, x: int, groups: int, kind: int, form: int) -> None:
    """Add some groups' products of blocks and a panel to their sums."""
    if are_integers(form) and kind != FLOATS:
        _add_integers(blocks, x, groups, kind, form)
    else:
        _add_numbers(blocks, x, groups, kind)


@subroutine()
def _add_numbers(blocks: Blocks, x: int, groups: int, kind: int) -> None:
    """Do it for floating-point weights, for so many tokens at a time."""
    for t in range(0, SIDE, _MOST):
        if WIDE and kind == PAIRS:
            _add_groups(PAIRS, blocks, x + 4 * t, groups, LINE * t)
        else:
            _add_groups(FLOATS, blocks, x + 4 * t, groups, LINE * t)


@subroutine(pasted=True)
def _add_groups(kind: int, blocks: Blocks, x: int, groups: int, place: int) -> None:
    """Do it for some tokens, whose sums begin at a place, and a literal kind."""
    tile, weights = repeated(no_sums(_MOST), BLOCKS), blocks.weights
    for _ in range(groups):
        tile = _add_words(kind, BLOCKS, tile, weights, blocks.pitch, x)
        weights += weight_bytes(kind)
        x += input_bytes(kind)
    add_to_memory(blocks.sums + place, blocks.sums_pitch, _MOST, tile)


@subroutine()
def _add_integers(blocks: Blocks, x: int, groups: int, kind: int, form: int) -> None:
    """Do it for integers, group by group."""
    if WIDE and kind == PAIRS:
        for t in range(0, SIDE, _MOST):
            _add_scaled(blocks, x + 4 * t, groups, form, LINE * t)
    elif WIDE and kind == DIGITS:
        for t in range(0, SIDE, _FEWER):
            _add_digits(blocks, x + 4 * t, groups, form, LINE * t)
    elif WIDE:
        for t in range(0, SIDE, _FEWER):
            _add_bytes(blocks, x + 4 * t, groups, form, LINE * t)
    elif not DOTS and kind == WORDS:
        _add_stepped(WORDS, blocks, x, groups, form)
    else:
        _add_stepped(BYTES, blocks, x, groups, form)


@subroutine(pasted=True)
def _add_scaled(blocks: Blocks, x: int, groups: int, form: int, place: int) -> None:
    """Do it for pairs, whose sums of a group are all that registers hold."""
    weights, pitch, sums = blocks.weights, blocks.pitch, blocks.sums + place
    for _ in range(groups):
        tile = _add_words(PAIRS, BLOCKS, repeated(no_sums(_MOST), BLOCKS), weights, pitch, x)
        scales, steps = weights + 2 * SQUARE, x + 2 * SQUARE
        add_scaled_to_memory(sums, blocks.sums_pitch, tile, vectors_at(scales + SCALE, pitch, BLOCKS))
        if has_minima(form):
            middles = vectors_at(scales + MIDDLE, pitch, BLOCKS)
            add_outer_to_memory(sums, blocks.sums_pitch, _MOST, middles, steps + SUM)
        weights, x = scales + WEIGHT_LINES, steps + INPUT_LINES


@subroutine()
def _add_bytes(blocks: Blocks, x: int, groups: int, form: int, place: int) -> None:
    """Do it for what is rounded to int8: registers hold the sums of a group, and those of all groups."""
    totals, weights, pitch = repeated(no_sums(_FEWER), BLOCKS_OF_BYTES), blocks.weights, blocks.pitch
    for _ in range(groups):
        steps, factors = x + SQUARE, weights + SQUARE
        tile = repeated(first_sums(steps + BEGIN, _FEWER), BLOCKS_OF_BYTES)
        tile = _add_words(BYTES, BLOCKS_OF_BYTES, tile, weights, pitch, x)
        totals = add_stepped(totals, tile, vectors_at(factors + SCALE, pitch, BLOCKS_OF_BYTES), steps + STEP)
        if has_minima(form):
            totals = outer_floats(totals, vectors_at(factors + MIDDLE, pitch, BLOCKS_OF_BYTES), steps + SUM)
        weights = factors + WEIGHT_LINES
        x += input_bytes(BYTES)
    add_to_memory(blocks.sums + place, blocks.sums_pitch, _FEWER, totals)


@subroutine(pasted=True)
def _add_stepped(kind: int, blocks: Blocks, x: int, groups: int, form: int) -> None:
    """Do the same with narrow registers, for a literal kind, WORDS or BYTES.

    The sums of a group are all that these hold, those of all groups are added up in the first-level cache.
    """
    weights, pitch, size = blocks.weights, blocks.pitch, squares(kind) * SQUARE
    for t in range(0, SIDE, _MOST):
        store_sums(blocks.totals + LINE * t, no_sums(_MOST))
    for _ in range(groups):
        factors = weights + size
        for t in range(0, SIDE, _MOST):
            steps, place = x + 4 * t + size, blocks.totals + LINE * t
            tile = _add_words(kind, BLOCKS, first_sums(steps + BEGIN, _MOST), weights, pitch, x + 4 * t)
            totals = add_stepped(sums_at(place, _MOST), tile, vectors_at(factors + SCALE, pitch, BLOCKS), steps + STEP)
            if has_minima(form):
                totals = outer_floats(totals, vectors_at(factors + MIDDLE, pitch, BLOCKS), steps + SUM)
            store_sums(place, totals)
        weights += weight_bytes(kind)
        x += input_bytes(kind)
    for t in range(0, SIDE, _MOST):
        add_to_memory(blocks.sums + LINE * t, blocks.sums_pitch, _MOST, sums_at(blocks.totals + LINE * t, _MOST))


@subroutine()
def _add_digits(blocks: Blocks, x: int, groups: int, form: int, place: int) -> None:
    """Do it for three digits: the two lower ones have a sum in common, which 32 bits hold.

    The higher ones are added up together: a processor begins several products before it has ended one, and those of a
    single digit are too few for that.
    """
    totals, weights, pitch = repeated(no_sums(_FEWER), BLOCKS), blocks.weights, blocks.pitch
    for _ in range(groups):
        steps, factors = x + 3 * SQUARE, weights + SQUARE
        high, lower = _first_of_digit(steps + BEGIN), _first_of_digit(steps + BEGIN + LINE)
        for at in range(0, SQUARE, LINE):
            words = vectors_at(weights + at, pitch, BLOCKS)
            high, lower = outer_bytes(high, words, x + at), outer_bytes(lower, words, x + SQUARE + at)
        lower = at_next_place(lower, _first_of_digit(steps + BEGIN + 2 * LINE))
        lower = _add_words(BYTES, BLOCKS, lower, weights, pitch, x + 2 * SQUARE)
        totals = add_digits(totals, high, lower, vectors_at(factors + SCALE, pitch, BLOCKS), steps + STEP)
        if has_minima(form):
            totals = outer_floats(totals, vectors_at(factors + MIDDLE, pitch, BLOCKS), steps + SUM)
        weights = factors + WEIGHT_LINES
        x += input_bytes(DIGITS)
    add_to_memory(blocks.sums + place, blocks.sums_pitch, _FEWER, totals)


@subroutine(inline=True)
def _first_of_digit(numbers: int) -> Any:
    """Return what sums of a digit begin with, for each block: a number of each token at an address."""
    return repeated(first_sums(numbers, _FEWER), BLOCKS)


@subroutine(pasted=True)
def _add_words(kind: int, count: int, tile: Any, weights: int, pitch: int, x: int) -> Any:
    """Add the products of a group's squares to sums, for a literal kind and number of blocks."""
    if kind == FLOATS:
        for at in range(0, 4 * SQUARE, LINE):
            tile = outer_floats(tile, vectors_at(weights + at, pitch, count), x + at)
    elif kind == PAIRS:
        for at in range(0, 2 * SQUARE, LINE):
            tile = outer_pairs(tile, vectors_at(weights + at, pitch, count), x + at)
    elif kind == WORDS:
        for at in range(0, 2 * SQUARE, LINE):
            tile = outer_words(tile, vectors_at(weights + at, pitch, count), x + at)
    elif not DOTS:  # BYTES are int4 alone
        for at in range(0, SQUARE, SQUARE // 2):
            tile = outer_nibbles(tile, weights + at, x + at)
    else:
        for at in range(0, SQUARE, LINE):
            tile = outer_bytes(tile, vectors_at(weights + at, pitch, count), x + at)
    return tile
