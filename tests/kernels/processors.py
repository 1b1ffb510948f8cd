"""Other processors than this one, as far as kernels can tell: what a process of their own finds in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: Tests of kernels that do something else where bytes are multiplied by one instruction, and where registers are wide.
OF_DOTS = [
    "test_byte_columns.py",
    "test_probe.py",
    "test_simd.py",
    "test_simd_blocks.py",
    "test_simd_columns.py",
    "test_simd_groups.py",
    "test_simd_sums.py",
    "test_vector_blocks.py",
]
OF_REGISTERS = [
    *OF_DOTS,
    "test_attend.py",
    "test_byte_rows.py",
    "test_simd_bytes.py",
    "test_simd_chunks.py",
    "test_simd_panels.py",
    "test_simd_quantised.py",
    "test_vector_rows.py",
]


def told(*names: str) -> dict[str, str]:
    """Return what tells Numba to compile for features of these names, which are LLVM's."""
    features = " ".join(names).split()
    return {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features)}


#: What the first processors with AVX2 had.
HASWELL = (
    "64bit avx avx2 bmi bmi2 cmov cx16 cx8 f16c fma fxsr lzcnt mmx movbe pclmul popcnt sahf sse sse2 sse3 sse4.1 "
    "sse4.2 ssse3 xsave xsaveopt"
)
NARROW = told(HASWELL)
#: What makes up for features that there are not: see `tests/kernels/emulation/sitecustomize.py`.
EMULATION = {"PYTHONPATH": os.pathsep.join([str(HERE / "emulation"), *filter(None, [os.environ.get("PYTHONPATH")])])}
#: Those that have all that kernels know.
EVERYTHING = {**told(HASWELL, "avx512f avx512bw avx512vnni avx512bf16 amx-tile amx-bf16 amx-int8"), **EMULATION}
#: Those with narrow registers that have an instruction for bytes.
NARROW_WITH_DOTS = {**told(HASWELL, "avxvnni"), **EMULATION}


def in_a_process(processor: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments, in the project's folder."""
    command, environment = [sys.executable, *arguments], {**os.environ, **processor}
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


def kernels_of(processor: dict[str, str]) -> tuple[str, ...]:
    """Return which path is chosen there, whether registers are wide, and whether an instruction multiplies bytes."""
    script = (
        "from npllama.kernels.llvm import DOTS, WIDE; from npllama.kernels.features import choose, host_features;"
        "print(choose(host_features()), WIDE, DOTS)"
    )
    return tuple(in_a_process(processor, "-c", script).stdout.split())


def run_tests(processor: dict[str, str], *names: str) -> None:
    """Run files with tests of kernels, and fail if one of their tests fails.

    Plain loops are left out: they are the same on every processor.
    """
    files = [str(HERE / name) for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not portable and not plain_loops"]
    done = in_a_process(processor, "-m", "pytest", *options, *files)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
