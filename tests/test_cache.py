"""The key/value cache: its length, its limits and its views."""

from __future__ import annotations

import numpy as np
import pytest

from npllama.cache import KVCache
from npllama.errors import ContextOverflowError, ParameterError
from tests.fixtures.loud import loud_config

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
