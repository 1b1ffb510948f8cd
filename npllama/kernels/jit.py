"""How kernels are compiled: fast floating point where it is safe, and a disk cache that cannot go stale."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from npllama.kernels.references import Compiler

_config: Any = numba.config
_njit: Any = numba.njit  # it takes options that its stubs do not name
_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Sums may be reordered, which is what lets them run in vector registers, and products may be fused into them.
#: NaN, infinities and signed zeros keep their meaning.
_FAST = {"reassoc", "contract", "arcp"}

#: Options of everything that is compiled. Nobody calls kernels from C: what that takes is 5 % of the time to compile.
OPTIONS = {"fastmath": _FAST, "error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
#: The same for what must come out bit by bit as it is written down.
EXACT = OPTIONS | {"fastmath": False}


@cache
def cache_folder() -> Path | None:
    """Folder of the compiled kernels, or None where nothing can be written.

    Its name is a digest of every kernel's source and of the processor: Numba alone does not notice an edit in a file
    that a kernel only calls into, and a home folder may be shared between machines.
    """
    digest = hashlib.sha256()
    told = _config.CPU_NAME, _config.CPU_FEATURES
    for part in (numba.__version__, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), repr(told)):
        digest.update(part.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    home = _config.CACHE_DIR or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "npllama/kernels")
    folder = Path(home, digest.hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def compiled(*, parallel: bool = False, exact: bool = False, counted: bool = True) -> Callable[[_Function], _Function]:
    """Decorate a function to be compiled on its first call with each combination of dtypes, and kept on disk.

    Parameters
    ----------
    parallel : bool
        Share the rounds of its ``prange`` loops between threads, in contiguous runs.
    exact : bool
        Leave sums in their order, and fuse no product into one.
    counted : bool
        Count references to arrays, as whatever makes an array must. Threads that count those to one array wait for each
        other, for longer than a few rows of a matrix take: what they call often, with arrays of others, counts none.
        See `npllama.kernels.references` for what that must not do.
    """

    def decorate(function: _Function) -> _Function:
        folder = cache_folder()
        options = {**(EXACT if exact else OPTIONS), "_nrt": counted, "pipeline_class": Compiler}
        jit = _njit(parallel=parallel, cache=folder is not None, **options)
        before, _config.CACHE_DIR = _config.CACHE_DIR, str(folder or "")
        try:
            kernel: _Function = jit(function)
        finally:
            _config.CACHE_DIR = before
        return kernel

    return decorate


def _widened(context: Any, value: Any) -> Any:
    """Turn one stored number into a float32: a float32 as it is, a bfloat16 from its bits (uint16).

    A bfloat16 is the upper half of a float32. Said to the compiler as one 32-bit shift, since loops of that vectorise;
    Numba's own integer arithmetic would widen to 64 bits.
    """

    def from_float32(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    def from_bfloat16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(value), from_bfloat16 if value == types.uint16 else from_float32


#: ``widened(number)``, for use inside kernels.
widened: Any = intrinsic(_widened)


def _narrowed(context: Any, value: Any, like: Any) -> Any:
    """Turn a float32 into a stored number of the dtype of the array ``like``: float32, or the bits of a bfloat16.

    That is the nearest one, ties to even, as ml_dtypes has it: half of what is cut off is added before, less one bit
    where the result would otherwise be odd, and a NaN keeps nothing but its sign.
    """

    def to_float32(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    def to_bfloat16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        nearest = builder.lshr(builder.add(bits, builder.add(odd, word(0x7FFF))), word(16))
        nan = builder.or_(builder.lshr(builder.and_(bits, word(1 << 31)), word(16)), word(0x7FC0))
        is_nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(is_nan, nan, nearest), ir.IntType(16))

    return like.dtype(types.float32, like), to_bfloat16 if like.dtype == types.uint16 else to_float32


#: ``narrowed(number, like)``, for use inside kernels: the opposite of `widened`.
narrowed: Any = intrinsic(_narrowed)

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that n * _LN2_HIGH is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87.0)
_LARGEST = np.float32(88.0)


@compiled()
def exp(x: Any) -> Any:
    """Exponential of a float32 that the compiler can run on whole vector registers.

    ``exp(x) = 2**n * exp(r)`` with ``r = x - n ln 2`` in [-0.35, 0.35], where a Taylor polynomial of degree 7 is exact
    to float32. Below -87 the result is 0 (float32's normal numbers end there), above 88 it is infinite.
    """
    clipped = min(max(x, _SMALLEST), _LARGEST)
    n = np.floor(clipped * _LOG2_E + np.float32(0.5))
    r = clipped - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(1 / 2)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    power = np.uint32((np.int32(n) + 127) << 23).view(np.float32)  # 2**n, by its exponent bits
    if x < _SMALLEST:
        return np.float32(0)
    return p * power if x <= _LARGEST else np.float32(np.inf)
