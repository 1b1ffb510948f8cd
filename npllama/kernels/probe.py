"""What the processor and its memory can do: the limits that a model's speed is held against.

Everything is measured on the threads that the kernels use, see `npllama.kernels.threads.use_threads`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from npllama.dtypes import Array, Tensor
from npllama.kernels import simd
from npllama.kernels.by_address import address_of, call_at
from npllama.kernels.jit import compiled
from npllama.kernels.llvm import DOTS, WIDE
from npllama.kernels.simd import add, add_lanes, broadcast, fused_multiply_add
from npllama.kernels.simd_blocks import outer_bytes, outer_nibbles, outer_pairs, outer_words, vectors_at
from npllama.kernels.simd_sums import first_sums, no_sums, store_sums
from npllama.kernels.subroutines import subroutine
from npllama.kernels.tiles import tile_shapes
from npllama.kernels.vector_products import BLOCKS

_Clock: TypeAlias = Callable[[], float]

_LANES = 16
_CHAINS = 8  # a multiply-add takes 4 cycles and two units start one in each: so many are under way at once
_ROUNDS = 1 << 20  # some milliseconds
_AHEAD = 4096  # numbers, four pages
_TILE_ROUNDS = 1 << 17  # some milliseconds, too
_PRODUCTS = 4
_TILE_ROWS, _TILE_BYTES = 16, 64
_LINE_BYTES, _LINES = 64, 64
_AT_ONCE = 8  # lines that numbers of 4 bits meet at a time
_SUMS_OF_WORDS = 16 if WIDE else 4
#: What a tile holds numbers of -> what it sums in.
_SUMS: dict[str, type] = {"uint16": np.float32, "int8": np.int32}


def read_rate(numbers: NDArray[np.float32], clock: _Clock = time.perf_counter) -> float:
    """Bytes per second that all threads together read, each streaming one contiguous part of ``numbers`` (N,)."""
    sums = np.empty(numba.get_num_threads(), np.float32)
    begin = clock()
    _stream(numbers, sums)
    return numbers.nbytes / (clock() - begin)


def multiply_add_rate(clock: _Clock = time.perf_counter) -> float:
    """Operations per second of float32 multiply-adds (two operations each) in registers, all threads together."""
    sums = np.empty(numba.get_num_threads(), np.float32)
    begin = clock()
    _multiply_add(np.float32(0.5), np.float32(1), _ROUNDS, sums)
    return 2 * _LANES * _CHAINS * _ROUNDS * len(sums) / (clock() - begin)


def tile_rate(numbers: str, clock: _Clock = time.perf_counter) -> float:
    """Operations per second of multiply-adds (two operations each) of tiles in registers, all threads together.

    Parameters
    ----------
    numbers : {"uint16", "int8"}
        What the tiles hold: bfloat16 bit patterns, or bytes.
    clock : callable
        Returns seconds.

    Notes
    -----
    The processor needs a matrix unit, see `npllama.kernels.features`.
    """
    tile = np.ones((_TILE_ROWS, _TILE_BYTES), np.uint8).view(numbers)
    sums: Array = np.empty((numba.get_num_threads(), 4, _TILE_ROWS, _TILE_ROWS), _SUMS[numbers])
    begin = clock()
    _tile_dots(tile, _TILE_ROUNDS, tile_shapes(*[_TILE_BYTES] * 8), sums)
    return 2 * sums.size * tile.shape[1] * _TILE_ROUNDS / (clock() - begin)


def word_rate(numbers: str, clock: _Clock = time.perf_counter) -> float:
    """Operations per second of products of several numbers a word in vector registers, all threads together.

    Parameters
    ----------
    numbers : {"uint16", "int16", "int8", "int4"}
        What words hold: two bfloat16 bit patterns, two int16, four bytes, or four bytes that are below 16.
    clock : callable
        Returns seconds.
    """
    lines = np.zeros((_LINES + _AT_ONCE, _LINE_BYTES), np.uint8)
    work, products = address_of_words(numbers), _WORDS[numbers][1]
    sums: Array = np.empty((numba.get_num_threads(), _SUMS_OF_WORDS, _LANES), np.float32)
    begin = clock()
    _outer_products(work, lines, _ROUNDS, sums)
    return 2 * sums.size * products * _ROUNDS / (clock() - begin)


def product_rate(
    linear: Callable[[Array, Tensor], Array], x: Array, weight: Tensor, clock: _Clock = time.perf_counter
) -> float:
    """Operations per second that a model's product reaches on x (T, N) · weight (M, N)ᵀ.

    It runs once before the clock starts: a first call waits for memory and for threads that sleep, as one of many in a
    row does not.
    """
    linear(x, weight)
    begin = clock()
    for _ in range(_PRODUCTS):
        linear(x, weight)
    seconds = clock() - begin
    return _PRODUCTS * 2 * len(x) * weight.shape[0] * weight.shape[1] / seconds


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What computes the products of many tokens.

    Attributes
    ----------
    name : str
        The unit, and in how many parts it takes its input.
    rate : callable
        Operations per second of the unit's instructions.
    parts : int
        Instructions that compute one product, each of a part of the input.
    """

    name: str
    rate: Callable[[], float]
    parts: int = 1

    def limit(self) -> float:
        """Operations of products per second that the unit allows; measured at every call."""
        return self.rate() / self.parts


_VECTORS = Arithmetic("vector registers", multiply_add_rate)
_THREE_DIGITS = Arithmetic("the matrix unit, three digits", partial(tile_rate, "int8"), 3)
_PAIRS = Arithmetic("vector registers, pairs of bfloat16", partial(word_rate, "uint16"))
_FOURS = dict.fromkeys(("int8", "int4"), Arithmetic("vector registers, four bytes a word", partial(word_rate, "int8")))
_TWOS = {
    "int8": Arithmetic("vector registers, pairs of int16", partial(word_rate, "int16")),
    "int4": Arithmetic("vector registers, sums of 16 bits", partial(word_rate, "int4")),
}
#: Path of the kernels, what activations are rounded to, storage type of the weights -> what computes more than 16
#: tokens' products where that is not multiply-adds of float32 vectors. See `npllama.kernels.matmul` for what it is.
_UNITS: dict[tuple[str, str], dict[str, Arithmetic]] = {
    ("amx", "float32"): {
        "bfloat16": Arithmetic("the matrix unit, three parts", partial(tile_rate, "uint16"), 3),
        "int8": _THREE_DIGITS,
        "int4": _THREE_DIGITS,
    },
    ("amx", "bfloat16"): dict.fromkeys(
        ("bfloat16", "int8", "int4"), Arithmetic("the matrix unit, one part", partial(tile_rate, "uint16"))
    ),
    ("avx512bf16", "bfloat16"): dict.fromkeys(("bfloat16", "int8", "int4"), _PAIRS),
    **{(path, "int8"): _FOURS for path in ("amx", "avx512bf16", "avx512")},
    ("avx2", "int8"): _FOURS if DOTS else _TWOS,
}


def arithmetic(path: str, activations: str, dtype: str) -> Arithmetic:
    """Return what computes the products of a model.

    Parameters
    ----------
    path : str
        One of `npllama.kernels.features.PATHS`.
    activations : str
        What the input of products is rounded to.
    dtype : str
        Storage type of the weights.
    """
    return _UNITS.get((path, activations), {}).get(dtype, _VECTORS)


@compiled(parallel=True)
def _stream(numbers: Array, sums: Array) -> None:
    """Fill sums, one for each thread, with the sums of as many equal parts of ``numbers`` (N,)."""
    part = numbers.shape[0] // sums.shape[0]
    for i in prange(sums.shape[0]):
        sums[i] = _read(numbers, i * part, (i + 1) * part)


@subroutine()
def _read(numbers: Array, start: int, stop: int) -> Any:
    """Return the sum of numbers; those that come some pages later are asked for meanwhile.

    By itself a processor looks no further than a page. What waits for nothing but memory reads half as fast then.
    """
    a = b = c = d = broadcast(np.float32(0))
    whole = start + (stop - start) // (4 * _LANES) * 4 * _LANES
    for j in range(start, whole, 4 * _LANES):
        simd.prefetch(numbers, j + _AHEAD)
        simd.prefetch(numbers, j + _AHEAD + 16)
        simd.prefetch(numbers, j + _AHEAD + 32)
        simd.prefetch(numbers, j + _AHEAD + 48)
        a, b = add(a, simd.load(numbers, j)), add(b, simd.load(numbers, j + 16))
        c, d = add(c, simd.load(numbers, j + 32)), add(d, simd.load(numbers, j + 48))
    total = add_lanes(add(add(a, b), add(c, d)))
    for j in range(whole, stop):
        total += numbers[j]
    return total


@compiled(parallel=True)
def _multiply_add(factor: Any, summand: Any, rounds: int, sums: Array) -> None:
    """Fill sums, one for each thread, with what `_chains` comes to."""
    for i in prange(sums.shape[0]):
        sums[i] = _chains(factor, summand, rounds)


@subroutine()
def _chains(factor: Any, summand: Any, rounds: int) -> Any:
    """Take ``c = c * factor + summand`` so often, in eight vectors of sixteen lanes that begin with 0 to 7; sum all.

    Vectors by name, because a loop over an array would measure its loads, too, and what the compiler makes of loops
    leaves half of the widest registers empty. A processor with narrower ones takes each in parts.
    """
    a, b = broadcast(factor), broadcast(summand)
    c0, c1 = broadcast(np.float32(0)), broadcast(np.float32(1))
    c2, c3 = broadcast(np.float32(2)), broadcast(np.float32(3))
    c4, c5 = broadcast(np.float32(4)), broadcast(np.float32(5))
    c6, c7 = broadcast(np.float32(6)), broadcast(np.float32(7))
    for _ in range(rounds):
        c0, c1 = fused_multiply_add(c0, a, b), fused_multiply_add(c1, a, b)
        c2, c3 = fused_multiply_add(c2, a, b), fused_multiply_add(c3, a, b)
        c4, c5 = fused_multiply_add(c4, a, b), fused_multiply_add(c5, a, b)
        c6, c7 = fused_multiply_add(c6, a, b), fused_multiply_add(c7, a, b)
    return add_lanes(add(add(add(c0, c1), add(c2, c3)), add(add(c4, c5), add(c6, c7))))


@compiled(parallel=True)
def _tile_dots(tile: Array, rounds: int, shapes: Array, sums: Array) -> None:
    """Fill sums (threads, 4, 16, 16) with so many products of a tile (16, K) with itself, four for each thread."""
    for i in prange(sums.shape[0]):
        simd.tile_configure(shapes)
        simd.tile_load(4, tile, 0, _TILE_BYTES)
        simd.tile_load(5, tile, 0, _TILE_BYTES)
        simd.tile_load(6, tile, 0, _TILE_BYTES)
        simd.tile_load(7, tile, 0, _TILE_BYTES)
        simd.tile_zero(0)
        simd.tile_zero(1)
        simd.tile_zero(2)
        simd.tile_zero(3)
        if tile.itemsize == 1:
            _add_dots_of_bytes(rounds)
        else:
            _add_dots(rounds)
        simd.tile_store(0, sums[i], 0, _TILE_BYTES)
        simd.tile_store(1, sums[i, 1], 0, _TILE_BYTES)
        simd.tile_store(2, sums[i, 2], 0, _TILE_BYTES)
        simd.tile_store(3, sums[i, 3], 0, _TILE_BYTES)
        simd.tile_release()


@subroutine()
def _add_dots(rounds: int) -> None:
    """Add so often the products of tiles 4 and 5 with 6 and 7 to tiles 0 to 3."""
    for _ in range(rounds):
        simd.tile_dot_bfloat16(0, 4, 6)
        simd.tile_dot_bfloat16(1, 5, 6)
        simd.tile_dot_bfloat16(2, 4, 7)
        simd.tile_dot_bfloat16(3, 5, 7)


@subroutine()
def _add_dots_of_bytes(rounds: int) -> None:
    """Do the same with tiles of bytes."""
    for _ in range(rounds):
        simd.tile_dot_int8(0, 4, 6)
        simd.tile_dot_int8(1, 5, 6)
        simd.tile_dot_int8(2, 4, 7)
        simd.tile_dot_int8(3, 5, 7)


@compiled(parallel=True)
def _outer_products(work: int, lines: Array, rounds: int, sums: Array) -> None:
    """Fill sums (threads, n, 16) with so many products of a line with words of it, or of eight with theirs, added up.

    A line is 64 bytes; ``work`` is the address of one of `_WORDS`. See `npllama.kernels.vector_blocks`. Each product is
    of the next line: the compiler would compute one that is always the same only once.
    """
    for i in prange(sums.shape[0]):
        call_at(work, (lines, rounds, sums[i]))


@subroutine(inline=True)
def _line(lines: int, i: int) -> int:
    """Return the address of the line whose turn it is."""
    return lines + _LINE_BYTES * (i % _LINES)


@compiled()
def _add_pairs(lines: Array, rounds: int, sums: Array) -> None:
    at, tile = np.int64(lines.ctypes.data), no_sums(_SUMS_OF_WORDS)
    for i in range(rounds):
        line = _line(at, i)
        tile = outer_pairs(tile, vectors_at(line, _LINE_BYTES, BLOCKS), line)
    store_sums(np.int64(sums.ctypes.data), tile)


@compiled()
def _add_shorts(lines: Array, rounds: int, sums: Array) -> None:
    at = np.int64(lines.ctypes.data)
    tile = first_sums(at, _SUMS_OF_WORDS)
    for i in range(rounds):
        line = _line(at, i)
        tile = outer_words(tile, vectors_at(line, _LINE_BYTES, BLOCKS), line)
    store_sums(np.int64(sums.ctypes.data), tile)


@compiled()
def _add_bytes(lines: Array, rounds: int, sums: Array) -> None:
    at = np.int64(lines.ctypes.data)
    tile = first_sums(at, _SUMS_OF_WORDS)
    for i in range(rounds):
        line = _line(at, i)
        tile = outer_bytes(tile, vectors_at(line, _LINE_BYTES, BLOCKS), line)
    store_sums(np.int64(sums.ctypes.data), tile)


@compiled()
def _add_nibbles(lines: Array, rounds: int, sums: Array) -> None:
    at = np.int64(lines.ctypes.data)
    tile = first_sums(at, _SUMS_OF_WORDS)
    for i in range(rounds):
        line = _line(at, i)
        tile = outer_nibbles(tile, line, line)
    store_sums(np.int64(sums.ctypes.data), tile)


#: What words of vectors hold -> what multiplies them, and how many products that adds to a lane.
_WORDS: dict[str, tuple[Any, int]] = {
    "uint16": (_add_pairs, 2),
    "int16": (_add_shorts, 2),
    "int8": (_add_bytes, 4),
    "int4": (_add_nibbles, 4 * _AT_ONCE),
}


@cache
def address_of_words(numbers: str) -> int:
    """Return the address of what multiplies words, compiled when it is first asked for."""
    return address_of(_WORDS[numbers][0], np.empty((1, 1), np.uint8), 1, np.empty((1, 1), np.float32))
