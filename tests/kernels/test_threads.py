"""Where the kernels' threads come from."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from npllama.kernels import threads

LAYER = """
import numpy as np, numba
from npllama import kernels
from npllama.dtypes import Tensor
from npllama.kernels.threads import use_threads
use_threads(numba.config.NUMBA_NUM_THREADS)
kernels.linear(np.ones((8, 256), np.float32), Tensor(np.ones((256, 256), np.float32), "float32"))
print(numba.threading_layer())
"""


def test_kernels_run_on_work_stealing_threads_where_the_package_is_installed() -> None:
    if not threads.find_tbb():
        pytest.skip("no TBB for this platform")
    done = subprocess.run([sys.executable, "-c", LAYER], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["tbb"]


def test_without_the_package_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(threads.metadata, "files", missing)
    assert threads.find_tbb.__wrapped__() is False
