"""What is compiled for AVX2 alone, on a processor that has more: kernels' tests again, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from npllama.kernels.features import PATHS, host_features
from npllama.kernels.llvm import WIDE

HERE = Path(__file__).parent
#: Those of kernels that do something else where registers are narrow.
FILES = [
    "test_attend.py",
    "test_byte_columns.py",
    "test_byte_rows.py",
    "test_probe.py",
    "test_simd.py",
    "test_simd_bytes.py",
    "test_simd_chunks.py",
    "test_simd_columns.py",
    "test_simd_groups.py",
    "test_simd_panels.py",
    "test_simd_quantised.py",
    "test_simd_sums.py",
    "test_vector_blocks.py",
    "test_vector_rows.py",
]
#: What the first processors with AVX2 had, under LLVM's names.
HASWELL = (
    "64bit avx avx2 bmi bmi2 cmov cx16 cx8 f16c fma fxsr lzcnt mmx movbe pclmul popcnt sahf sse sse2 sse3 sse4.1 "
    "sse4.2 ssse3 xsave xsaveopt"
)
NARROW = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in HASWELL.split())}


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, *arguments], {**os.environ, **NARROW}
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


@pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")
def test_what_numba_is_told_to_compile_for_has_narrow_registers() -> None:
    script = (
        "from npllama.kernels.llvm import WIDE; from npllama.kernels.features import choose, host_features;"
        "print(WIDE, choose(host_features()))"
    )
    assert in_a_process("-c", script).stdout.split() == ["False", "avx2"]


@pytest.mark.skipif(not WIDE, reason="registers are narrow: the files themselves test that")
def test_kernels_pass_their_tests_when_they_are_compiled_for_narrow_registers() -> None:
    done = in_a_process("-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
