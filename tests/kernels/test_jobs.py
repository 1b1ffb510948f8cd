"""Blocks of several matrices are dealt out to threads: each once, and nobody waits for a thread that is slow."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from npllama.dtypes import Array
from npllama.kernels.by_address import address_of
from npllama.kernels.jobs import FIRST, ROWS, deal_out
from npllama.kernels.simd_atomic import fetch_add, load_acquire, pause

SIZE = 16


def jobs_with(*rows: int) -> Array:
    """Return a table of matrices with so many rows each."""
    jobs = np.zeros((len(rows), 6), np.int64)
    jobs[:, ROWS] = rows
    jobs[1:, FIRST] = np.cumsum([-(-m // SIZE) for m in rows])[:-1]
    return jobs


@numba.njit
def count(arguments: Any, jobs: Array, start: int, stop: int) -> None:
    for block in range(start, stop):
        fetch_add(arguments[0], block, 1)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [(16,), (1, 17), (300, 40, 40), (20_000, 5)])
def test_every_block_is_done_once(rows: tuple[int, ...], n_threads: int) -> None:
    jobs, blocks = jobs_with(*rows), sum(-(-m // SIZE) for m in rows)
    done = np.zeros(blocks + 1, np.int64)
    deal_out((done,), jobs, SIZE, n_threads, address_of(count, (done,), jobs, 1, 1))
    assert done.tolist() == [1] * blocks + [0]


@numba.njit
def wait_in_the_first(arguments: Any, jobs: Array, start: int, stop: int) -> None:
    done, patience = arguments
    if start == 0:
        while load_acquire(done, 0) < 3 * len(done) // 4 and load_acquire(patience, 0) > 0:
            fetch_add(patience, 0, -1)
            pause()
    fetch_add(done, 0, stop - start)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread has nobody to wait for")
def test_others_do_what_a_slow_thread_leaves_of_its_part() -> None:
    jobs, done, patience = jobs_with(SIZE * 640), np.zeros(640, np.int64), np.full(1, 1 << 26, np.int64)
    deal_out((done, patience), jobs, SIZE, 2, address_of(wait_in_the_first, (done, patience), jobs, 1, 1))
    assert done[0] == 640
    assert patience[0] > 0  # three quarters were done while the first block took its time
