"""The machine itself: how fast all threads together read memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from serving import serve

from npllama.kernels.probe import read_rate
from npllama.kernels.threads import use_threads

_NUMBERS = 1 << 28  # 1 GiB: there are caches of hundreds of MB


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Take the memory; every order is answered by one read of it."""
    use_threads(settings["threads"])
    numbers = np.ones(_NUMBERS, np.float32)
    read_rate(numbers)
    return {}, lambda order: {"read": read_rate(numbers)}


if __name__ == "__main__":
    serve(load)
