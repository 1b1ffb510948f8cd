"""What the processor can do, and which kernels that lets run.

A **path** is a family of kernels that needs certain instructions. The paths are a ladder: who can run one can run all
below it, and a storage type without kernels on a step is served by the next one down that has them. Kernels of AVX2
are compiled for registers as wide as the processor has them, and with AVX-VNNI where it has that: so there neither
AVX-512 nor this is a family of its own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection
from functools import cache

import llvmlite.binding as llvm
import numba

from npllama.errors import ParameterError, UnsupportedError

_AVX2 = frozenset({"avx2", "fma"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vnni"}
#: Path -> the processor features that it needs, under LLVM's names; the best one first.
PATHS: dict[str, frozenset[str]] = {
    "amx": _AVX512 | {"avx512bf16", "amx-tile", "amx-bf16", "amx-int8"},
    "avx512bf16": _AVX512 | {"avx512bf16"},
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": frozenset(),
}

_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


@cache
def host_features() -> frozenset[str]:
    """Features of this processor that this process may use, under LLVM's names.

    Where Numba is told what to compile for (``NUMBA_CPU_FEATURES``), it is those. The matrix unit's tiles are large, so
    Linux hands them out on request only; this is the request. See https://docs.kernel.org/arch/x86/xstate.html.
    """
    told: str | None = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if told is None:
        features = frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    else:
        features = frozenset(name[1:] for name in told.split(",") if name.startswith("+"))
    if "amx-tile" in features and not _may_use_tiles():
        return frozenset(name for name in features if not name.startswith("amx"))
    return features


def _may_use_tiles() -> bool:
    """Ask the kernel for the tile registers, for every thread of this process; tell whether it agreed."""
    if sys.platform != "linux":
        return False
    refused: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)
    return refused == 0


def choose(features: Collection[str], forced: str | None = None) -> str:
    """Return the best path for a processor's features, or the forced one if it can run.

    Parameters
    ----------
    features : collection of str
        From `host_features`.
    forced : str, optional
        One of `PATHS`.

    Raises
    ------
    ParameterError
        There is no such path.
    UnsupportedError
        The processor lacks a feature that the forced path needs.
    """
    if forced is None:
        return next(path for path, needs in PATHS.items() if needs.issubset(features))
    if forced not in PATHS:
        raise ParameterError(f"the kernels are {forced!r}, expected one of {', '.join(PATHS)}")
    missing = PATHS[forced].difference(features)
    if missing:
        raise UnsupportedError(
            f"the kernels {forced!r} need {', '.join(sorted(missing))}, which this processor does not offer",
            remedy="Choose 'portable', or none.",
        )
    return forced


def ladder(path: str) -> tuple[str, ...]:
    """Return a path and those below it, the best one first."""
    paths = tuple(PATHS)
    return paths[paths.index(path) :]
