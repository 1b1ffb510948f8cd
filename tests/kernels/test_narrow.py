"""What is compiled for AVX2 alone, on a processor that has more: kernels' tests again, in a process of their own."""

from __future__ import annotations

import pytest

from npllama.kernels.features import PATHS, host_features
from npllama.kernels.llvm import WIDE
from tests.kernels.processors import NARROW, OF_REGISTERS, kernels_of, run_tests


@pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2")
def test_what_numba_is_told_to_compile_for_has_narrow_registers() -> None:
    assert kernels_of(NARROW) == ("avx2", "False", "False")


@pytest.mark.skipif(not WIDE, reason="registers are narrow: the files themselves test that")
def test_kernels_pass_their_tests_when_they_are_compiled_for_narrow_registers() -> None:
    run_tests(NARROW, *OF_REGISTERS)
