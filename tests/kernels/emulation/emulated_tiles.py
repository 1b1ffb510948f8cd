"""The instructions on tiles, for `sitecustomize`: what Intel's manual says that a matrix unit does.

A thread's tiles are memory of its own: 64 bytes that say their shapes (`npllama.kernels.simd.tile_configure`), and
behind them eight tiles of 16 rows of 64 bytes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

SHAPES, TILE, ROW, ROWS = 64, 1024, 64, 16
SIZE = SHAPES + 8 * TILE
SMALLEST = np.float32(2.0**-126)

_libc = ctypes.CDLL(None)
_memory_of_thread, _remember, _clean_memory = _libc.pthread_getspecific, _libc.pthread_setspecific, _libc.calloc
_memory_of_thread.argtypes, _memory_of_thread.restype = [ctypes.c_uint], ctypes.c_size_t
_remember.argtypes, _remember.restype = [ctypes.c_uint, ctypes.c_size_t], ctypes.c_int
_clean_memory.argtypes, _clean_memory.restype = [ctypes.c_size_t, ctypes.c_size_t], ctypes.c_size_t
_key = ctypes.c_uint()
_libc.pthread_key_create(ctypes.byref(_key), None)
KEY = _key.value


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """``pointer(address)``: what `numba.carray` takes."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.uintp), code


@numba.njit
def state() -> Any:
    """Return this thread's memory."""
    place = _memory_of_thread(KEY)
    if place == 0:
        place = _clean_memory(1, SIZE)
        _remember(KEY, place)
    return numba.carray(pointer(place), SIZE, np.uint8)


@numba.njit
def tile(number: int) -> Any:
    """Return a tile (16, 64), and how many of its rows and bytes a row its shape says."""
    memory = state()
    begin = SHAPES + TILE * number
    row_bytes = memory[16 + 2 * number] + 256 * memory[17 + 2 * number]
    return memory[begin : begin + TILE].reshape((ROWS, ROW)), np.int64(memory[48 + number]), np.int64(row_bytes)


@numba.njit
def flushed(number: np.float32) -> Any:
    """Return zero for what is too small to be normal."""
    return number if abs(number) >= SMALLEST or number != number else np.float32(0) * number


@numba.njit
def bfloat16(low: int, high: int) -> Any:
    """Return the float32 that a bfloat16's two bytes stand for."""
    return flushed(np.uint32((np.uint32(high) << 24) | (np.uint32(low) << 16)).view(np.float32))


@numba.cfunc(types.void(types.voidptr))
def ldtilecfg(shapes: Any) -> None:
    """Give this thread's tiles their shapes, and fill them with zeros."""
    memory = state()
    memory[:] = 0
    memory[:SHAPES] = numba.carray(shapes, SHAPES, np.uint8)


@numba.cfunc(types.void())
def tilerelease() -> None:
    """Take the shapes back."""
    state()[:] = 0


@numba.cfunc(types.void(types.uint8))
def tilezero(number: int) -> None:
    """Fill a tile with zeros."""
    tile(number)[0][:] = 0


@numba.cfunc(types.void(types.uint8, types.voidptr, types.int64))
def tileloadd64(number: int, place: Any, stride: int) -> None:
    """Fill a tile from memory; what is outside its shape becomes zero."""
    target, rows, row_bytes = tile(number)
    source = numba.carray(place, (rows - 1) * stride + row_bytes, np.uint8)
    target[:] = 0
    for r in range(rows):
        target[r, :row_bytes] = source[r * stride : r * stride + row_bytes]


@numba.cfunc(types.void(types.uint8, types.voidptr, types.int64))
def tilestored64(number: int, place: Any, stride: int) -> None:
    """Write a tile to memory."""
    source, rows, row_bytes = tile(number)
    target = numba.carray(place, (rows - 1) * stride + row_bytes, np.uint8)
    for r in range(rows):
        target[r * stride : r * stride + row_bytes] = source[r, :row_bytes]


@numba.cfunc(types.void(types.uint8, types.uint8, types.uint8))
def tdpbf16ps(total: int, a: int, b: int) -> None:
    """Add the products of bfloat16: those of even and of odd k apart, then their sum."""
    (sums, rows, row_bytes), (left, _, k_bytes), right = tile(total), tile(a), tile(b)[0]
    numbers = sums.view(np.float32)
    for m in range(rows):
        for n in range(row_bytes // 4):
            even, odd = np.float32(0), np.float32(0)
            for k in range(k_bytes // 4):
                x, y = left[m, 4 * k : 4 * k + 4], right[k, 4 * n : 4 * n + 4]
                even = flushed(even + bfloat16(x[0], x[1]) * bfloat16(y[0], y[1]))
                odd = flushed(odd + bfloat16(x[2], x[3]) * bfloat16(y[2], y[3]))
            numbers[m, n] = flushed(flushed(numbers[m, n]) + flushed(even + odd))


@numba.cfunc(types.void(types.uint8, types.uint8, types.uint8))
def tdpbssd(total: int, a: int, b: int) -> None:
    """Add the products of int8."""
    (sums, rows, row_bytes), (left, _, k_bytes), right = tile(total), tile(a), tile(b)[0]
    numbers, x, y = sums.view(np.int32), left.view(np.int8), right.view(np.int8)
    for m in range(rows):
        for n in range(row_bytes // 4):
            for k in range(k_bytes):
                numbers[m, n] += np.int32(x[m, k]) * np.int32(y[k // 4, 4 * n + k % 4])


#: By the names of LLVM's.
INSTRUCTIONS = {
    f"llvm.x86.{each.__name__}": each
    for each in (ldtilecfg, tilerelease, tilezero, tileloadd64, tilestored64, tdpbf16ps, tdpbssd)
}


def register() -> None:
    """Let compiled code find them by the names that `sitecustomize` gives them."""
    for name, instruction in INSTRUCTIONS.items():
        llvm.add_symbol(f"emulated.{name}", instruction.address)
