"""A processor with AVX-512, BF16 and AMX, or with AVX-VNNI alone, on one that has none of these: for tests, and slow.

Python imports a module of this name when it begins, where ``PYTHONPATH`` has this folder; so does every process that a
test starts. ``NUMBA_CPU_FEATURES`` names the instructions that there are to be, which is what kernels go by: they
choose layouts, digits, wide registers and tiles as they do where it is true. The compiler is told of no more than AVX2,
and makes two registers of a wide one by itself. There remain the instructions that kernels call by their names: these
become functions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

ARCH_PRCTL = 158
LACKING = ("+avx512", "+avxvnni", "+amx")


class System(ctypes.CDLL):
    """One that hands out tiles to whoever asks."""

    def syscall(self, number: int, *arguments: int) -> int:
        """Agree to what a process asks for its threads."""
        return 0 if number == ARCH_PRCTL else super().__getattr__("syscall")(number, *arguments)


def emulate(told: str) -> None:
    """Let Numba make of kernels what a processor with less than it is told can run."""
    import llvmlite.binding as llvm
    from numba.core import cgutils
    from numba.core.codegen import JITCPUCodegen

    ctypes.CDLL = System
    real = ",".join(name for name in told.split(",") if not name.startswith(LACKING))
    JITCPUCodegen._get_host_cpu_features = lambda self: real

    import emulated_tiles  # compiles
    import emulated_vectors

    sources = b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py")))
    name = f"emulated-{hashlib.sha256(sources).hexdigest()[:16]}"
    llvm.get_host_cpu_name = lambda: name  # by which compiled kernels are kept apart
    declared = cgutils.get_or_insert_function

    def found(module: Any, kind: Any, name: str) -> Any:
        if name in emulated_tiles.INSTRUCTIONS:
            return declared(module, kind, f"emulated.{name}")
        if name in emulated_vectors.INSTRUCTIONS:
            return emulated_vectors.defined(declared(module, kind, f"emulated.{name}"), name)
        return declared(module, kind, name)

    cgutils.get_or_insert_function = found
    emulated_tiles.register()


if os.environ.get("NUMBA_CPU_FEATURES"):
    emulate(os.environ["NUMBA_CPU_FEATURES"])
