"""Who counts no references neither keeps nor returns an array: the compiler says so before memory is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba.core.errors import TypingError

from npllama.dtypes import Array
from npllama.kernels.jit import compiled
from npllama.kernels.subroutines import subroutine


@compiled()
def made(count: int) -> Any:
    return np.ones(count)


@compiled()
def number_of(x: Array) -> Any:
    return x[0]


@subroutine(counted=True)
def made_too(count: int) -> Any:
    return 1, np.ones(count)


@subroutine()
def second_half(x: Array) -> Any:
    return x[len(x) // 2 :], 1


@pytest.mark.parametrize("maker", [made, made_too])
@pytest.mark.parametrize("decorate", [compiled, subroutine])
def test_who_counts_none_gets_no_array_of_one_who_does(decorate: Callable[..., Any], maker: Any) -> None:
    @decorate(counted=False)  # type: ignore[untyped-decorator]
    def keeps(count: int) -> int:
        return len(maker(count))

    @compiled()
    def kernel(count: int) -> Any:
        return keeps(count)

    with pytest.raises(TypingError, match=f"keeps counts no references, but calls {maker.__name__}, which does"):
        kernel(3)


@pytest.mark.parametrize("counted", [False, True])
def test_who_counts_none_returns_no_array_whoever_asks(counted: bool) -> None:
    @compiled(counted=counted)
    def kernel(x: Array) -> Any:
        return second_half(x)[1]

    with pytest.raises(TypingError, match="second_half counts no references, but returns Tuple"):
        kernel(np.ones(4))


def test_who_counts_none_looks_at_arrays_and_gets_numbers_of_whoever_counts() -> None:
    @subroutine()
    def total(x: Array) -> Any:
        half = x[len(x) // 2 :]
        return half.sum() + number_of(x)

    @compiled()
    def kernel(count: int) -> Any:
        return total(made(count))

    assert kernel(4) == 3.0
