"""The pytest plugin: `npllama.check.testing.assert_taps_close` as a fixture, imported when a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_taps_close() -> Callable[..., Any]:
    """Return `npllama.check.testing.assert_taps_close`."""
    from npllama.check import testing

    return testing.assert_taps_close
