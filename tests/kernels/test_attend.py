"""Attention beside the textbook in float64 and beside torch: shapes, windows, chunks, threads, storage, batches."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numba
import numpy as np
import pytest

from npllama import kernels, ops
from npllama.dtypes import Array
from npllama.errors import ParameterError
from npllama.kernels.attend import Attending, attending
from npllama.kernels.attend_piece import exp2
from npllama.kernels.features import choose, host_features, ladder
from npllama.taps import untapped
from tools.environment import ROOT

PATHS = ladder(choose(host_features()))
HEADS = [(4, 4), (9, 3), (5, 1), (140, 1)]


def normal(*shape: int, seed: int = 3) -> Array:
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def qkv(n_new: int, n_past: int, heads: tuple[int, int], head_dim: int) -> tuple[Array, Array, Array]:
    """Return sharp queries, keys and values."""
    n_all = n_new + n_past
    return (
        3 * normal(n_new, heads[0], head_dim),
        normal(n_all, heads[1], head_dim, seed=4),
        normal(n_all, heads[1], head_dim, seed=5),
    )


def truth(q: Array, keys: Array, values: Array, **options: float | None) -> Array:
    return ops.attention(*(x.astype(np.float64) for x in (q, keys, values)), untapped, **options)


def rounded_truth(q: Array, keys: Array, values: Array, **options: float | None) -> Array:
    """Return the textbook's attention with a bfloat16 cache, which rounds, everything else in float64."""
    assert keys.dtype == values.dtype == ml_dtypes.bfloat16
    return ops.attention(q.astype(np.float64), keys, values, untapped, **options)


def assert_rounded(found: Array, q: Array, keys: Array, values: Array, **options: float | None) -> None:
    """Close to what rounding gives, and nearer to it by far than to what a float32 cache would give.

    A weight that lies between two bfloat16 may fall to either side: that is one in hundreds.
    """
    expected, exact = rounded_truth(q, keys, values, **options), truth(q, keys, values, **options)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-7 * np.abs(expected).max())
    cost, error = np.abs(expected - exact), np.abs(found - expected)
    assert np.sqrt((error**2).mean()) <= 0.2 * np.sqrt((cost**2).mean()) + 2**-22 * np.abs(expected).max()


def assert_close(found: Array, expected: Array, ulps: float = 64) -> None:
    """Equal to within some float32 rounding steps of the largest number."""
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=ulps * 2**-24 * np.abs(expected).max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 100])
def test_attention(path: str, heads: tuple[int, int], window: int | None) -> None:
    attend = attending(path).attention
    for n_new in (1, 2, 5, 33, 130):
        for n_past in (0, 50, 700):
            q, keys, values = qkv(n_new, n_past, heads, 16)
            expected = truth(q, keys, values, window=window)
            assert_close(attend(q, keys, values, untapped, window=window), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("n_new", "n_past", "window"), [(20, 500, None), (3, 511, None), (33, 1010, None), (100, 800, 450)]
)
def test_queries_on_both_sides_of_where_keys_are_divided(
    path: str, n_new: int, n_past: int, window: int | None
) -> None:
    for heads in ((4, 2), (2, 2), (6, 1)):
        q, keys, values = qkv(n_new, n_past, heads, 64)
        expected = truth(q, keys, values, window=window)
        assert_close(attending(path).attention(q, keys, values, untapped, window=window), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head_dim", [2, 10, 64, 80, 128])
@pytest.mark.parametrize("n_new", [1, 40])
def test_attention_with_heads_of_any_width(path: str, head_dim: int, n_new: int) -> None:
    q, keys, values = qkv(n_new, 90, (6, 3), head_dim)
    assert_close(attending(path).attention(q, keys, values, untapped), truth(q, keys, values))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head_dim", [22, 64, 80, 96, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
def test_few_queries_in_a_cache_with_room_for_more(path: str, dtype: type, head_dim: int, group: int) -> None:
    for n_new, n_past, window in [(1, 0, None), (1, 37, None), (1, 1100, None), (1, 700, 150), (2, 600, 70)]:
        q, keys, values = qkv(n_new, n_past, (2 * group, 2), head_dim)
        room = np.full((2, 2, n_new + n_past + 3, head_dim), np.nan, dtype)  # nobody may see what is behind
        room[:, :, : len(keys)] = np.stack([keys, values]).transpose(0, 2, 1, 3)
        stored = [part[:, : len(keys)].transpose(1, 0, 2) for part in room]
        found = attending(path).attention(q, *stored, untapped, window=window)
        if dtype == np.float32:
            assert_close(found, truth(q, *stored, window=window))
        else:
            assert_rounded(found, q, *stored, window=window)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (4, 1), (5, 1), (24, 1)])
@pytest.mark.parametrize(
    ("n_new", "n_past", "window"), [(2, 0, None), (9, 505, None), (16, 60, None), (16, 1020, None), (9, 700, 150)]
)
def test_up_to_16_tokens_get_the_bits_that_each_gets_after_the_other(
    path: str, heads: tuple[int, int], n_new: int, n_past: int, window: int | None
) -> None:
    q, keys, values = qkv(n_new, n_past, heads, 64)
    attend = attending(path).attention
    together = attend(q, keys, values, untapped, window=window)
    for t in range(n_new):
        seen = n_past + t + 1
        alone = attend(q[t : t + 1], keys[:seen], values[:seen], untapped, window=window)
        np.testing.assert_array_equal(together[t], alone[0])


AT_THE_END = """
import ctypes, mmap
import ml_dtypes
import numpy as np
from npllama.kernels import attention
pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
for dtype in (np.float32, ml_dtypes.bfloat16):
    for head_dim in (22, 40, 64):
        for n_all in (1, 5, 7):
            size = n_all * head_dim
            room = np.frombuffer(pages, np.uint8, mmap.PAGESIZE)[-size * np.dtype(dtype).itemsize:].view(dtype)
            keys = room.reshape(n_all, 1, head_dim)
            for group in (1, 2, 3):
                attention(np.ones((1, group, head_dim), np.float32), keys, keys, None)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected as Linux does it")
def test_nothing_behind_the_last_position_is_read() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("n_new", [1, 40])
def test_scores_are_divided_by_what_is_asked_for(n_new: int) -> None:
    q, keys, values = qkv(n_new, 9, (4, 2), 16)
    found = kernels.attention(q, keys, values, untapped, divisor=7.5)
    assert_close(found, truth(q, keys, values, divisor=7.5))
    assert np.abs(found - kernels.attention(q, keys, values, untapped)).max() > 0.01


@pytest.mark.torch
@pytest.mark.parametrize("n_new", [1, 5, 200])
def test_attention_is_what_torch_computes(n_new: int) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, keys, values = qkv(n_new, 600 if n_new == 1 else 0, (8, 2), 64)
    tensors = (torch.from_numpy(x).double().transpose(0, 1)[None] for x in (q, keys, values))
    expected = scaled_dot_product_attention(*tensors, is_causal=n_new > 1, enable_gqa=True)
    assert_close(kernels.attention(q, keys, values, untapped), expected[0].transpose(0, 1).numpy())


@pytest.mark.parametrize("n_new", [1, 3, 50])
def test_keys_and_values_are_read_wherever_they_lie(n_new: int) -> None:
    q, keys, values = qkv(n_new, 60, (4, 2), 16)
    expected = kernels.attention(q, keys, values, untapped)
    room = np.full((2, 2, 200, 16), np.nan, np.float32)
    room[:, :, : len(keys)] = np.stack([keys, values]).transpose(0, 2, 1, 3)
    by_heads = (part[:, : len(keys)].transpose(1, 0, 2) for part in room)
    np.testing.assert_array_equal(kernels.attention(q, *by_heads, untapped), expected)
    columns = (np.asfortranarray(x) for x in (keys, values))
    np.testing.assert_array_equal(kernels.attention(q, *columns, untapped), expected)
    apart = keys, np.repeat(values, 2, axis=0)[::2]
    np.testing.assert_array_equal(kernels.attention(q, *apart, untapped), expected)
    for x in (keys, values):
        x.setflags(write=False)
    np.testing.assert_array_equal(kernels.attention(q, keys, values, untapped), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_new", [1, 3, 17, 50, 130])
@pytest.mark.parametrize("head_dim", [22, 64, 80])
@pytest.mark.parametrize(("heads", "window"), [((8, 2), None), ((3, 3), 100), ((5, 1), None)])
def test_what_meets_a_bfloat16_cache_is_rounded_to_it(
    path: str, n_new: int, head_dim: int, heads: tuple[int, int], window: int | None
) -> None:
    for n_past in (0, 601):
        q, keys, values = qkv(n_new, n_past, heads, head_dim)
        narrow = [x.astype(ml_dtypes.bfloat16) for x in (keys, values)]
        found = attending(path).attention(q, *narrow, untapped, window=window)
        assert_rounded(found, q, *narrow, window=window)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_new", [1, 3, 50])
def test_a_cache_of_which_only_the_keys_are_bfloat16_is_widened(path: str, n_new: int) -> None:
    q, keys, values = qkv(n_new, 600, (8, 2), 64)
    mixed = keys.astype(ml_dtypes.bfloat16), values
    assert_close(attending(path).attention(q, *mixed, untapped), truth(q, *mixed))


@pytest.mark.parametrize("backend", [ops, kernels])
def test_both_backends_read_a_bfloat16_cache(backend: object) -> None:
    q, keys, values = qkv(4, 9, (4, 2), 16)
    narrow = [x.astype(ml_dtypes.bfloat16) for x in (keys, values)]
    assert_rounded(backend.attention(q, *narrow, untapped), q, *narrow)


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("chunk", [1, 3, 64, 100, 250])
def test_in_chunks_the_numbers_are_those_of_one_call_to_within_rounding(chunk: int, window: int | None) -> None:
    q, keys, values = qkv(300, 0, (6, 2), 16)
    expected = truth(q, keys, values, window=window)
    ends = [*range(chunk, 300, chunk), 300]
    starts = [0, *ends[:-1]]
    parts = [
        kernels.attention(q[start:end], keys[:end], values[:end], untapped, window=window)
        for start, end in zip(starts, ends, strict=True)
    ]
    assert_close(np.concatenate(parts), expected)


@pytest.mark.parametrize("n_new", [1, 5, 700])
def test_the_numbers_do_not_depend_on_the_number_of_threads(any_threads: None, n_new: int) -> None:
    q, keys, values = qkv(n_new, 1500, (9, 3), 64)
    numba.set_num_threads(1)
    alone = kernels.attention(q, keys, values, untapped)
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor")
    numba.set_num_threads(2)
    np.testing.assert_array_equal(kernels.attention(q, keys, values, untapped), alone)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 40])
def test_sequences_end_to_end_get_what_each_gets_alone(path: str, window: int | None) -> None:
    attend = attending(path)
    lanes = [qkv(n_new, n_past, (6, 2), 16) for n_new, n_past in [(1, 0), (1, 1300), (5, 600), (70, 3), (200, 9)]]
    together = attend.attentions(
        np.concatenate([q for q, _, _ in lanes]),
        [len(q) for q, _, _ in lanes],
        [(keys, values) for _, keys, values in lanes],
        window=window,
    )
    alone = [attend.attention(*lane, untapped, window=window) for lane in lanes]
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("path", PATHS)
def test_what_lies_ahead_or_behind_the_window_makes_no_difference(path: str) -> None:
    q, keys, values = qkv(150, 80, (4, 2), 16)
    before = attending(path).attention(q, keys, values, untapped, window=20)
    keys[:150], values[:150] = 9, -9  # positions 130 to 149 are seen by rows up to 88
    keys[200:], values[200:] = 9, -9  # seen from row 120 on
    after = attending(path).attention(q, keys, values, untapped, window=20)
    np.testing.assert_array_equal(after[89:120], before[89:120])
    assert not np.array_equal(after[88], before[88])
    assert not np.array_equal(after[120], before[120])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_new", [1, 40])
def test_a_key_that_is_no_number_spoils_all_who_see_it_and_nobody_else(path: str, n_new: int) -> None:
    q, keys, values = qkv(n_new, 50, (4, 2), 16)
    seer = n_new // 2
    keys[50 + seer, 1] = np.nan
    context = attending(path).attention(q, keys, values, untapped)
    assert np.isnan(context[seer:, 2:]).all()
    assert np.isfinite(context[:seer]).all()
    assert np.isfinite(context[:, :2]).all()


@pytest.mark.parametrize("n_new", [1, 40])
def test_scores_far_apart_pick_one_value(n_new: int) -> None:
    q, keys, values = qkv(n_new, 50, (2, 2), 16)
    assert_close(kernels.attention(1e4 * q, keys, values, untapped), truth(1e4 * q, keys, values))


def test_exp2_is_right_to_float32s_last_bit_and_ends_in_zero() -> None:
    x = np.linspace(-126, 0, 20_001, dtype=np.float32)
    np.testing.assert_allclose([exp2(value) for value in x], np.exp2(x.astype(np.float64)), rtol=2**-23)
    assert exp2(np.float32(0)) == 1
    assert exp2(np.float32(-np.inf)) == exp2(np.float32(-128)) == 0
    assert np.isnan(exp2(np.float32(np.nan)))


def test_the_best_path_is_chosen_once_and_another_can_be_forced() -> None:
    assert attending("portable") == Attending("portable")
    assert attending() is attending()
    with pytest.raises(ParameterError, match="'fastest'"):
        attending("fastest")


LONG = """
import resource
import numpy as np
from npllama.kernels import attention
def run(n):
    x = np.ones((n, 2, 16), np.float32)
    attention(x, x, x, None)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(64)
print(run(8192) - before)
"""


def test_a_long_prompt_takes_no_memory_for_its_scores() -> None:
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", LONG], check=True, capture_output=True, text=True, cwd=ROOT)
    one_head_of_scores = 8192 * 8192 * 4 // 1024  # kilobytes, as ru_maxrss is on Linux
    assert int(done.stdout) < one_head_of_scores / 10
