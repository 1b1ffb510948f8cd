"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import pytest


@pytest.fixture
def any_threads() -> Iterator[None]:
    """Put the number of threads back behind a test that sets it."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)
