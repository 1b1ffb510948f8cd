"""RoPE at conversion: frequencies as Meta and transformers have them, and rows in one order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.checkpoint.rope import interleaved, inverse_frequencies
from npllama.config import RopeScaling
from npllama.dtypes import Array
from npllama.errors import CorruptDataError
from tests.checkpoint.tiny import CONFIG, ref
from tests.fixtures.loud import half_split

LLAMA3 = replace(CONFIG, dim=4096, n_heads=32, head_dim=128, rope_theta=500_000.0)
SCALINGS = {
    "3.1": RopeScaling("llama3", 8.0),
    "3.2": RopeScaling("llama3", 32.0),
    "odd": RopeScaling("llama3", 3.0, 0.5, 7.0, 4096),
}

# --- frequencies ---------------------------------------------------------------------------------------------------


def in_ulps(found: Array, expected: Array) -> Array:
    return np.abs(found.view(np.int32).astype(np.int64) - expected.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [2, 64, 96, 128])
def test_unscaled_frequencies_are_the_formula_rounded_once(theta: float, head_dim: int) -> None:
    found = inverse_frequencies(replace(CONFIG, head_dim=head_dim, rope_theta=theta))
    exact = [math.pow(theta, -2 * j / head_dim) for j in range(head_dim // 2)]
    assert found.dtype == np.float32
    assert found.shape == (head_dim // 2,)
    assert in_ulps(found, np.array(exact)).max() <= 1  # pow of the C library may differ in float64's last place


@pytest.mark.torch
@pytest.mark.parametrize("name", SCALINGS)
def test_llama3_scaling_is_that_of_transformers(name: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = SCALINGS[name]
    parameters = {
        "rope_type": "llama3",
        "rope_theta": LLAMA3.rope_theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
    config = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_theta=LLAMA3.rope_theta, rope_scaling=parameters
    )
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    found = inverse_frequencies(replace(LLAMA3, rope_scaling=scaling))
    assert attention_factor == 1.0
    # theirs is computed in float32 throughout, which costs a few units in the last place
    assert in_ulps(found, theirs.numpy()).max() <= 8
    unscaled = inverse_frequencies(LLAMA3)
    assert (found != unscaled).sum() >= 20


def test_the_three_bands_of_llama3_scaling() -> None:
    """Fast pairs stay, slow ones are divided, and between them the blend falls without a jump."""
    plain = inverse_frequencies(LLAMA3).astype(np.float64)
    scaled = inverse_frequencies(replace(LLAMA3, rope_scaling=SCALINGS["3.1"])).astype(np.float64)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-7)
    between = (wavelength >= 8192 / 4) & (wavelength <= 8192)
    assert between.sum() >= 5
    ratio = scaled[between] / plain[between]
    assert ((ratio < 1) & (ratio > 1 / 8)).all()
    assert (np.diff(ratio) < 0).all()


def test_linear_scaling_divides() -> None:
    scaled = inverse_frequencies(replace(LLAMA3, rope_scaling=RopeScaling("linear", 4.0)))
    np.testing.assert_array_equal(scaled, inverse_frequencies(LLAMA3) / 4)


def test_factors_divide_one_by_one() -> None:
    factors = np.linspace(1, 8, 64, dtype=np.float32)
    found = inverse_frequencies(replace(LLAMA3, rope_scaling=RopeScaling("factors")), factors)
    assert in_ulps(found, inverse_frequencies(LLAMA3) / factors).max() <= 1


def test_factors_of_a_gguf_reproduce_llama3_scaling() -> None:
    """What llama.cpp's converter writes as rope_freqs.weight says the same as the three constants."""
    scaling = SCALINGS["3.1"]
    plain = 500_000.0 ** (-np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / plain
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength < 2048, 1, np.where(wavelength > 8192, 8, 1 / ((1 - smooth) / 8 + smooth)))
    by_factors = inverse_frequencies(replace(LLAMA3, rope_scaling=RopeScaling("factors")), factors.astype(np.float32))
    assert in_ulps(by_factors, inverse_frequencies(replace(LLAMA3, rope_scaling=scaling))).max() <= 1


@pytest.mark.parametrize(
    "factors",
    [None, np.ones(63), np.ones((64, 1)), np.zeros(64), -np.ones(64), np.full(64, np.nan), np.full(64, np.inf)],
)
def test_impossible_factors_are_refused(factors: Any) -> None:
    with pytest.raises(CorruptDataError, match="not 64 positive numbers"):
        inverse_frequencies(replace(LLAMA3, rope_scaling=RopeScaling("factors")), factors)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_rows_by_hand() -> None:
    rows = np.array([["x0"], ["x1"], ["y0"], ["y1"], ["X0"], ["X1"], ["Y0"], ["Y1"]])
    found = interleaved(ref("wq", rows), n_heads=2, head_dim=4).read_rows(0, 8)
    assert found[:, 0].tolist() == ["x0", "y0", "x1", "y1", "X0", "Y0", "X1", "Y1"]


@given(
    heads=st.integers(1, 4),
    pairs=st.integers(1, 4),
    columns=st.integers(1, 3),
    cut=st.tuples(st.integers(0, 32), st.integers(0, 32)),
)
def test_any_block_of_rows_is_that_part_of_the_whole(
    heads: int, pairs: int, columns: int, cut: tuple[int, int]
) -> None:
    head_dim = 2 * pairs
    whole = np.arange(heads * head_dim * columns, dtype=np.float32).reshape(-1, columns)
    lazy = interleaved(ref("wk", half_split(whole, head_dim)), heads, head_dim)
    start, stop = sorted(min(position, len(whole)) for position in cut)
    found = lazy.read_rows(start, stop)
    np.testing.assert_array_equal(found, whole[start:stop])
    assert found.flags.c_contiguous
    assert lazy.shape == whole.shape


def test_vectors_are_reordered_too() -> None:
    values = np.arange(8, dtype=np.float32)
    found = interleaved(ref("bias", half_split(values, 4)), 2, 4).read_rows(0, 8)
    np.testing.assert_array_equal(found, values)


def test_rows_that_are_not_whole_heads_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="6 rows are not 2 heads of 4"):
        interleaved(ref("wq", np.zeros((6, 2), np.float32)), 2, 4)


@pytest.mark.torch
def test_attention_scores_agree_between_the_two_layouts() -> None:
    """Half-split rows turned as transformers turns them, interleaved ones as complex numbers: the same scores."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, head_dim, length = 3, 8, 5
    rng = np.random.default_rng(0)
    wq, wk = (rng.normal(size=(heads * head_dim, 16)) for _ in range(2))
    x = rng.normal(size=(length, 16))
    angles = np.arange(length)[:, None] * inverse_frequencies(replace(CONFIG, head_dim=head_dim)).astype(np.float64)

    halves = [torch.from_numpy((x @ w.T).reshape(1, length, heads, head_dim)).transpose(1, 2) for w in (wq, wk)]
    table = torch.from_numpy(np.concatenate([angles, angles], axis=1))[None]
    q, k = apply_rotary_pos_emb(*halves, table.cos(), table.sin())
    theirs = (q @ k.transpose(2, 3))[0].numpy()

    turned = []
    for w in (wq, wk):
        rows = interleaved(ref("w", w), heads, head_dim).read_rows(0, heads * head_dim)
        pairs = (x @ rows.T).reshape(length, heads, head_dim // 2, 2)
        turned.append((pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None, :])
    ours = np.einsum("thj,shj->hts", turned[0], turned[1].conj()).real
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
