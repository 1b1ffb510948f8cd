"""The models of these tests are so small that a second thread of BLAS costs more than it gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="package", autouse=True)
def one_thread_of_blas() -> Iterator[None]:
    """Let NumPy compute with one thread."""
    with threadpool_limits(1, "blas"):
        yield
