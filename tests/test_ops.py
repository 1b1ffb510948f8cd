"""The textbook operations against closed forms, hand-made examples and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npllama import ops
from npllama.dtypes import Array, Tensor, narrow
from npllama.taps import untapped

RNG = np.random.default_rng(7)
FLOATS = [np.float32, np.float64]


def normal(*shape: int, dtype: type = np.float64) -> Array:
    return RNG.normal(size=shape).astype(dtype)


def stored(values: Array, dtype: str = "float32") -> Tensor:
    return Tensor(narrow(values, dtype), dtype)


def test_embed_looks_up_rows_in_the_order_of_the_tokens() -> None:
    table = stored(np.arange(12).reshape(4, 3))
    np.testing.assert_array_equal(
        ops.embed(np.array([2, 0, 2]), table, np.dtype(np.float64)), [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    )


def test_rms_norm_of_a_hand_made_row() -> None:
    # mean square of (3, 4) is 12.5
    y = ops.rms_norm(np.array([[3.0, 4.0]]), stored(np.array([1.0, 2.0])), 0.0)
    np.testing.assert_allclose(y, [[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]], rtol=1e-15)


def test_rms_norm_adds_eps_inside_the_root_so_that_a_row_of_zeros_stays_zero() -> None:
    one = stored(np.ones(2))
    np.testing.assert_array_equal(ops.rms_norm(np.zeros((1, 2)), one, 1e-5), [[0, 0]])
    np.testing.assert_allclose(ops.rms_norm(np.full((1, 2), 1e-3), one, 1e-5), 1e-3 / math.sqrt(1.1e-5), rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_linear_multiplies_by_the_transpose_whatever_the_storage(dtype: type, storage: str) -> None:
    x, weight = normal(5, 7, dtype=dtype), stored(normal(11, 7), storage)
    expected = np.einsum("tn,mn->tm", x.astype(np.float64), weight.numbers(to=np.float64))
    y = ops.linear(x, weight)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 if dtype is np.float32 else 1e-13)


def test_linear_widens_a_large_matrix_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(3, 8), stored(normal(21, 8), "bfloat16")
    whole = ops.linear(x, weight)
    monkeypatch.setattr(ops, "_BLOCK_BYTES", 8 * 8 * 4)  # four rows at a time: 21 is no multiple
    np.testing.assert_allclose(ops.linear(x, weight), whole, rtol=1e-14)


def test_linears_is_linear_for_each_weight() -> None:
    x, weights = normal(2, 4), [stored(normal(3, 4)), stored(normal(5, 4))]
    for y, weight in zip(ops.linears(x, weights), weights, strict=True):
        np.testing.assert_array_equal(y, ops.linear(x, weight))


def test_rope_tables_are_float32_products_of_float32_positions_and_frequencies() -> None:
    freqs = np.array([1.0, 0.1, 1e-4], np.float32)
    cos, sin = ops.rope_tables(freqs, 100_000, 2)
    assert cos.dtype == sin.dtype == np.float32
    angles = np.float32([100_000, 100_001])[:, None] * freqs
    np.testing.assert_array_equal(cos, np.cos(angles))
    np.testing.assert_array_equal(sin, np.sin(angles))


@pytest.mark.parametrize("dtype", FLOATS)
def test_apply_rope_multiplies_interleaved_pairs_as_complex_numbers(dtype: type) -> None:
    x = normal(6, 3, 8, dtype=dtype)
    cos, sin = ops.rope_tables(np.array([1, 0.5, 0.25, 0.1], np.float32), 3, 6)
    turn = (cos.astype(np.float64) + 1j * sin)[:, None, :]
    expected = ((x[..., 0::2] + 1j * x[..., 1::2]) * turn).view(np.float64).reshape(x.shape)
    y = ops.apply_rope(x, cos, sin)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, atol=1e-6 if dtype is np.float32 else 1e-15)


def test_apply_rope_makes_products_depend_on_the_distance_alone() -> None:
    q, k = normal(1, 1, 8), normal(1, 1, 8)
    freqs = np.array([1, 0.5, 0.25, 0.125], np.float32)  # exact angles

    def product(i: int, j: int) -> float:
        return float(
            np.sum(ops.apply_rope(q, *ops.rope_tables(freqs, i, 1)) * ops.apply_rope(k, *ops.rope_tables(freqs, j, 1)))
        )

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-6)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_survives_huge_scores_and_gives_masked_ones_no_weight(dtype: type) -> None:
    probs = ops.softmax(np.array([[1000.0, 1000.0, -np.inf], [-1000.0, -1001.0, -2000.0]], dtype))
    assert probs.dtype == dtype
    np.testing.assert_allclose(probs[0], [0.5, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(probs[1], [1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0], rtol=1e-6)


def attention_by_hand(q: Array, keys: Array, values: Array) -> Array:
    """One position and one head at a time, straight from the definition."""
    n_new, n_heads, head_dim = q.shape
    n_all, n_kv_heads, _ = keys.shape
    out = np.zeros_like(q)
    for t in range(n_new):
        seen = n_all - n_new + t + 1
        for h in range(n_heads):
            kv = h // (n_heads // n_kv_heads)
            scores = [q[t, h] @ keys[s, kv] / math.sqrt(head_dim) for s in range(seen)]
            weights = np.exp(np.array(scores) - max(scores))
            out[t, h] = (weights / weights.sum()) @ values[:seen, kv]
    return out


@pytest.mark.parametrize(("n_new", "n_all"), [(5, 5), (1, 9), (4, 7)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention_is_causal_grouped_and_scaled(n_new: int, n_all: int, n_heads: int, n_kv_heads: int) -> None:
    q, keys, values = normal(n_new, n_heads, 8) * 2, normal(n_all, n_kv_heads, 8), normal(n_all, n_kv_heads, 8)
    np.testing.assert_allclose(ops.attention(q, keys, values, untapped), attention_by_hand(q, keys, values), atol=1e-13)


def test_attention_shows_scores_masked_with_minus_infinity_and_probs_that_sum_to_one() -> None:
    seen: dict[str, Array] = {}

    def tap(name: str, x: Array) -> Array:
        seen[name] = x
        return x

    ops.attention(normal(3, 2, 4), normal(5, 2, 4), normal(5, 2, 4), tap)
    future = np.arange(5) > np.arange(2, 5)[:, None]
    assert seen["scores"].shape == seen["probs"].shape == (2, 3, 5)
    np.testing.assert_array_equal(np.isneginf(seen["scores"]), np.broadcast_to(future, (2, 3, 5)))
    np.testing.assert_allclose(seen["probs"].sum(axis=-1), 1)
    assert (seen["probs"][:, future] == 0).all()


def test_attention_goes_on_with_what_the_tap_returns() -> None:
    values = normal(2, 1, 4)

    def first_only(name: str, x: Array) -> Array:
        return np.broadcast_to(np.array([1.0, 0.0]), x.shape) if name == "probs" else x

    context = ops.attention(normal(2, 1, 4), normal(2, 1, 4), values, first_only)
    np.testing.assert_allclose(context[1, 0], values[0, 0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_is_finite_and_quiet_far_below_zero(dtype: type) -> None:
    x = np.array([-2000.0, -1.0, 0.0, 1.0, 2000.0], dtype)
    y = ops.silu(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, [0, -1 / (1 + math.e), 0, math.e / (1 + math.e), 2000], rtol=1e-6)


def test_swiglu_gates_the_second_projection_by_the_first() -> None:
    gate, up = normal(2, 3), normal(2, 3)
    np.testing.assert_allclose(ops.glu(gate, up, "silu"), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.torch
def test_operations_agree_with_torch_in_float64() -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x, weight = normal(5, 16), normal(16)
    norm = functional.rms_norm(torch.from_numpy(x), (16,), torch.from_numpy(weight.astype(np.float32)).double(), 1e-5)
    np.testing.assert_allclose(ops.rms_norm(x, stored(weight), 1e-5), norm.numpy(), atol=1e-14)
    np.testing.assert_allclose(ops.silu(x), functional.silu(torch.from_numpy(x)).numpy(), atol=1e-14)
    np.testing.assert_allclose(ops.softmax(x), torch.softmax(torch.from_numpy(x), -1).numpy(), atol=1e-14)
    q, k, v = normal(6, 4, 8), normal(6, 2, 8), normal(6, 2, 8)
    q_t, k_t, v_t = (torch.from_numpy(a).transpose(0, 1)[None] for a in (q, k, v))
    context = functional.scaled_dot_product_attention(q_t, k_t, v_t, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(ops.attention(q, k, v, untapped), context[0].transpose(0, 1).numpy(), atol=1e-13)
