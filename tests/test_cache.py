"""The key/value cache: its length, its limits and its views."""

from __future__ import annotations

import errno
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from npllama.cache import KVCache
from npllama.errors import ContextOverflowError, ParameterError
from tests.fixtures.loud import loud_config
from tools.environment import ROOT

CONFIG = loud_config(max_seq_len=32)


def rows(n_new: int, value: float, dtype: type = np.float32) -> np.ndarray:
    return np.full((n_new, CONFIG.n_kv_heads, CONFIG.head_dim), value, dtype)


def test_append_returns_every_position_so_far_and_advance_counts_them_once() -> None:
    cache = KVCache(CONFIG, 8)
    for layer in range(CONFIG.n_layers):
        cache.append(layer, rows(3, 1 + layer), rows(3, -1 - layer))
    assert cache.length == 0
    cache.advance(3)
    keys, values = cache.append(1, rows(2, 9), rows(2, -9))
    assert keys.shape == (5, CONFIG.n_kv_heads, CONFIG.head_dim)
    np.testing.assert_array_equal(keys[:, 0, 0], [2, 2, 2, 9, 9])
    np.testing.assert_array_equal(values[:, 0, 0], [-2, -2, -2, -9, -9])
    assert cache.length == 3


def test_memory_is_taken_at_the_first_append_in_its_dtype() -> None:
    cache = KVCache(CONFIG, 8)
    assert cache.nbytes == 0
    cache.append(0, rows(1, 0, np.float64), rows(1, 0, np.float64))
    assert cache.nbytes == 2 * CONFIG.n_layers * 8 * CONFIG.n_kv_heads * CONFIG.head_dim * 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell what memory is taken")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_room_for_a_long_text_takes_memory_only_for_what_is_there(dtype: str) -> None:
    config = loud_config(max_seq_len=1 << 19)
    before = resident_bytes()
    cache = KVCache(config, 1 << 19, dtype)
    for layer in range(config.n_layers):
        cache.append(layer, rows(1, 1), rows(1, 1))
    rows_written = 2 * config.n_layers * config.n_kv_heads
    assert cache.nbytes > 64 << 20
    assert resident_bytes() - before < (4 << 20) + rows_written * mmap.PAGESIZE


FORKED = """
import os
import numpy as np
from npllama.pages import untouched_zeros
zeros = untouched_zeros((1000,), np.dtype(np.float32))
child = os.fork()
if child == 0:
    zeros[:] = 1
    os._exit(0)
os.waitpid(child, 0)
print(zeros.sum())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_a_process_that_is_forked_off_writes_to_memory_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "0.0\n", done.stderr


def test_a_system_without_huge_pages_has_room_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("npllama.pages.mmap.mmap", Pages)
    keys, _ = KVCache(CONFIG, 8).append(0, rows(3, 1), rows(3, -1))
    np.testing.assert_array_equal(keys[:, 0, 0], [1, 1, 1])


def resident_bytes() -> int:
    """Return how much memory of its own this process holds."""
    (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def test_a_full_cache_names_both_numbers_and_what_to_do() -> None:
    cache = KVCache(CONFIG, 4)
    cache.advance(3)
    with pytest.raises(ContextOverflowError, match=r"3 cached and 2 new positions .* cache of 4\. .*truncate"):
        cache.reserve(2)
    cache.reserve(1)


def test_a_capacity_beyond_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextOverflowError, match=r"33 positions .* context is 32"):
        KVCache(CONFIG, 33)
    with pytest.raises(ParameterError, match="capacity is 0"):
        KVCache(CONFIG, 0)


def test_truncate_forgets_the_tail_and_refuses_to_grow() -> None:
    cache = KVCache(CONFIG, 8)
    cache.advance(5)
    cache.truncate(2)
    assert cache.length == 2
    for length in (3, -1):
        with pytest.raises(ParameterError, match="the cache holds 2"):
            cache.truncate(length)


def filled(dtype: str = "float32", n_new: int = 3, capacity: int = 8) -> KVCache:
    """Return a cache that holds some positions, each layer's keys and values different."""
    cache = KVCache(CONFIG, capacity, dtype)
    for layer in range(CONFIG.n_layers):
        cache.append(layer, rows(n_new, 1 + layer), rows(n_new, -1 - layer))
    cache.advance(n_new)
    cache.remember(np.arange(10, 10 + n_new))
    return cache


def test_each_heads_positions_lie_in_a_row() -> None:
    keys, values = filled().append(0, rows(1, 0), rows(1, 0))
    for view in (keys, values):
        assert view.strides == (4 * CONFIG.head_dim, 4 * CONFIG.head_dim * 8, 4)


def test_a_bfloat16_cache_rounds_to_the_nearest_and_takes_half_the_memory() -> None:
    cache = KVCache(CONFIG, 8, "bfloat16")
    k = np.random.default_rng(0).normal(size=rows(5, 0).shape).astype(np.float32)
    k[0, 0, :4] = 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.nan  # two ties, one too large
    keys, values = cache.append(0, k, -k)
    np.testing.assert_array_equal(keys.astype(np.float32), k.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(values[0, 0, :4].astype(np.float32), [-1, -1 - 2**-6, -np.inf, np.nan])
    assert 2 * cache.nbytes == filled().nbytes


def test_a_cache_of_another_dtype_is_refused() -> None:
    with pytest.raises(ParameterError, match="'float8', expected one of float32, bfloat16"):
        KVCache(CONFIG, 8, "float8")


def test_the_cache_remembers_the_ids_of_its_positions() -> None:
    cache = filled()
    np.testing.assert_array_equal(cache.tokens, [10, 11, 12])
    cache.advance(2)
    np.testing.assert_array_equal(cache.tokens, [10, 11, 12, 0, 0])
    cache.remember(np.array([7, 8]))
    np.testing.assert_array_equal(cache.tokens, [10, 11, 12, 7, 8])
    assert cache.tokens.dtype == np.int64
    cache.truncate(2)
    np.testing.assert_array_equal(cache.tokens, [10, 11])
    cache.advance(2)
    np.testing.assert_array_equal(cache.tokens, [10, 11, 0, 0])
    with pytest.raises(ParameterError, match=r"5 ids .* 4 positions"):
        cache.remember(np.arange(5))


def test_the_horizon_is_nothing_until_it_is_set_and_goes_with_the_last_position() -> None:
    cache = KVCache(CONFIG, 8)
    assert cache.horizon == 0
    cache.advance(3)
    cache.horizon = 6
    cache.truncate(1)
    assert cache.horizon == 6
    cache.truncate(0)
    assert cache.horizon == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fork_goes_its_own_way(dtype: str) -> None:
    cache = filled(dtype)
    cache.horizon = 6
    twin = cache.fork()
    assert (twin.length, twin.capacity, twin.horizon, twin.dtype) == (3, 8, 6, dtype)
    np.testing.assert_array_equal(twin.tokens, cache.tokens)
    mine, _ = cache.append(1, rows(1, 5), rows(1, 5))
    its, _ = twin.append(1, rows(1, 6), rows(1, 6))
    assert mine.dtype == its.dtype
    np.testing.assert_array_equal(mine[:, 0, 0].astype(np.float32), [2, 2, 2, 5])
    np.testing.assert_array_equal(its[:, 0, 0].astype(np.float32), [2, 2, 2, 6])
    twin.truncate(0)
    assert (cache.length, len(cache.tokens)) == (3, 3)


def test_an_empty_cache_forks_into_an_empty_one() -> None:
    assert KVCache(CONFIG, 8).fork().nbytes == 0
