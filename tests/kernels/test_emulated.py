"""What is compiled for AVX-512 and AMX, on a processor that lacks them: kernels' tests again, on an emulated one.

Whoever changes kernels on one processor sees at once what they no longer do on another.
"""

from __future__ import annotations

import sys

import pytest

from npllama.kernels.features import PATHS, host_features
from tests.kernels.processors import EVERYTHING, NARROW_WITH_DOTS, OF_DOTS, OF_REGISTERS, kernels_of, run_tests

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="its threads keep what they have to themselves in another way"),
    pytest.mark.skipif(not PATHS["avx2"] <= host_features(), reason="this processor has no AVX2"),
]
needs_less = pytest.mark.skipif(PATHS["amx"] <= host_features(), reason="this processor has everything itself")
#: Files beside those of kernels that do something else where registers are wide.
OF_TILES = ["test_matmul.py", "test_quantised.py", "test_through_layers.py", "test_tile_blocks.py"]


def test_kernels_find_what_they_know_on_emulated_processors() -> None:
    assert kernels_of(EVERYTHING) == ("amx", "True", "True")
    assert kernels_of(NARROW_WITH_DOTS) == ("avx2", "False", "True")


@needs_less
def test_kernels_pass_their_tests_with_wide_registers_and_tiles() -> None:
    run_tests(EVERYTHING, *OF_REGISTERS, *OF_TILES)


def test_kernels_pass_their_tests_with_narrow_registers_and_an_instruction_for_bytes() -> None:
    run_tests(NARROW_WITH_DOTS, *OF_DOTS)
