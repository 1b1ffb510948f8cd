"""Where the kernels' threads come from."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import numba
import numpy as np
import pytest

from npllama.kernels import threads
from npllama.kernels.activation import glu
from npllama.kernels.threads import share

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


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 129, 1000])
@pytest.mark.parametrize("n_threads", [1, numba.config.NUMBA_NUM_THREADS])
def test_shared_work_is_done_once_in_parts_that_begin_at_multiples_of_the_least(count: int, n_threads: int) -> None:
    numba.set_num_threads(n_threads)
    done, begun = np.zeros(count, int), []

    def work(start: int, stop: int) -> None:
        begun.append(start)
        done[start:stop] += 1

    share(count, work, least=64)
    np.testing.assert_array_equal(done, 1)
    assert all(start % 64 == 0 for start in begun)
    assert len(begun) == max(1, min(n_threads, -(-count // 64)))


@pytest.mark.usefixtures("any_threads")
def test_a_gate_of_many_tokens_has_the_same_bits_on_any_number_of_threads() -> None:
    gate, up = np.random.default_rng(0).normal(size=(2, 1500, 1500)).astype(np.float32)
    results = []
    for n_threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(n_threads)
        results.append(glu(gate, up, "silu"))
    for result in results:
        np.testing.assert_array_equal(result, results[0])


def test_what_goes_wrong_in_another_thread_is_raised_here() -> None:
    def work(start: int, stop: int) -> None:
        if stop == 128:
            raise ValueError("the second part")

    with pytest.raises(ValueError, match="the second part"):
        share(128, work, least=64)
