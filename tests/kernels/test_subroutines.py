"""Subroutines are part of the kernels that call them, and are nothing without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.simd_sums import no_sums
from npllama.kernels.subroutines import subroutine


@subroutine()
def half(x: Any) -> Any:
    return x / 2


@subroutine()
def quarter(x: Any) -> Any:
    return half(half(x))


@subroutine(inline=True)
def sums(count: int) -> int:
    return len(no_sums(count))  # which takes a literal number alone


@subroutine(pasted=True)
def one_or_text(kind: int) -> Any:
    if kind == FIRST:
        return 1
    return "one"  # of another type: whoever types both branches fails


@subroutine()
def raises(x: int) -> int:
    if x > 1:
        raise ValueError("too large")
    return x


FIRST = 0


def test_a_kernel_calls_subroutines_that_call_others_with_any_types() -> None:
    @compiled()
    def kernel(x: Any) -> Any:
        return quarter(x), quarter(2)

    assert kernel(np.float64(3)) == (0.75, 0.5)
    assert kernel(np.complex128(4j)) == (1j, 0.5)


def test_an_inlined_one_knows_the_literal_numbers_that_it_is_called_with() -> None:
    @compiled()
    def kernel() -> Any:
        return sums(3), sums(16)

    assert kernel() == (3, 16)


def test_others_are_compiled_once_for_all_numbers() -> None:
    @subroutine()
    def twice(x: int) -> int:
        return 2 * x

    @compiled()
    def kernel() -> Any:
        return twice(3), twice(4)

    assert kernel() == (6, 8)
    assert len(twice.overloads) == 1  # type: ignore[attr-defined]


def test_a_pasted_one_has_no_branches_that_a_constant_closes() -> None:
    @compiled()
    def kernel() -> Any:
        return one_or_text(FIRST)

    assert kernel() == 1


def test_what_it_raises_reaches_python() -> None:
    @compiled()
    def kernel(x: int) -> int:
        return raises(x)

    assert kernel(1) == 1
    with pytest.raises(ValueError, match="too large"):
        kernel(2)


def test_python_cannot_call_one_even_after_a_kernel_did() -> None:
    @compiled()
    def kernel(x: float) -> Any:
        return half(x)

    assert kernel(1.0) == 0.5
    with pytest.raises(TypeError, match="half is a subroutine of kernels: only these can call it"):
        half(1.0)


def test_its_code_is_in_the_kernel_and_nowhere_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "doubling.py").write_text(
        "import sys\n"
        "from npllama.kernels.jit import compiled\n"
        "from npllama.kernels.subroutines import subroutine\n\n\n"
        "@subroutine()\ndef twice(x):\n    return 2 * x\n\n\n"
        "@compiled()\ndef kernel(x):\n    return twice(x)\n\n\n"
        "print(kernel(21), sum(kernel.stats.cache_hits.values()))\n"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)])}

    def run() -> str:
        command = [sys.executable, "-c", "import doubling"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run().split() == ["42", "0"]
    assert run().split() == ["42", "1"]
    names = [path.name for path in tmp_path.rglob("*.nb[ic]")]
    assert any("kernel" in name for name in names)
    assert not any("twice" in name for name in names)


def test_kernels_of_vectors_are_made_of_them() -> None:
    """What the rest of the tests stand on: a subroutine may hand vectors on."""

    @subroutine(inline=True)
    def doubled(vector: Any) -> Any:
        return simd.add(vector, vector)

    @compiled()
    def kernel(x: Any, y: Any) -> None:
        simd.store(y, 0, doubled(simd.load(x, 0)))

    x, y = np.arange(16, dtype=np.float32), np.empty(16, np.float32)
    kernel(x, y)
    np.testing.assert_array_equal(y, 2 * x)
