"""The oracle against implementations that nobody here wrote: transformers' Llama, and Meta's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.check.trace import MemoryTrace
from npllama.checkpoint.store import Store
from npllama.config import ModelConfig
from npllama.errors import UnsupportedError
from npllama.taps import tap_names
from tests.fixtures.loud import LOUD_TOKENS, loud_config, loud_tokens
from tests.oracle.sources import SHAPES, Loud, nmse_by_tap, recorded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from oracle.llama import TorchLlama  # noqa: E402
from oracle.meta_reference import MetaLlama, single_process  # noqa: E402

PREFILL, DECODED = LOUD_TOKENS, 3
FLOAT32_NOISE = 1e-10
SMOLLM2_TOKENS = [504, 3575, 282, 4649, 314, 7042, 30, 378, 2210, 5345, 314, 253, 3075]
#: What stays inside transformers' eager attention and inside Meta's.
HIDDEN_BY_TRANSFORMERS = {"scores"}
HIDDEN_BY_META = {"q_rope", "scores", "probs"}

META_SHAPES = {name: config for name, config in SHAPES.items() if config.head_dim * config.n_heads == config.dim}


@pytest.fixture
def meta(meta_model: None) -> Iterator[type[MetaLlama]]:
    with single_process():
        yield MetaLlama


def transformers_llama(source: Any, dtype: str = "float32") -> Any:
    from oracle.transformers_reference import TransformersLlama

    return TransformersLlama(source, dtype)


def loud_run(reference: Any) -> MemoryTrace:
    tokens = loud_tokens(reference.config, PREFILL + DECODED).tolist()
    return recorded(reference, tokens, PREFILL)


def all_taps(without: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in tap_names(1)} - without


def equal_bits(found: MemoryTrace, wanted: MemoryTrace) -> dict[str, float]:
    """Smallest share of equal numbers over steps and layers, by the tap's name without its layer."""
    shares: dict[str, float] = {}
    for entry in found.taps:
        name = entry.name.rpartition(".")[2]
        share = float(np.mean(found.read(entry.name, entry.step) == wanted.read(entry.name, entry.step)))
        shares[name] = min(shares.get(name, 1.0), share)
    return shares


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_transformers_agrees_at_every_tap_that_it_shows(config: ModelConfig) -> None:
    errors = nmse_by_tap(loud_run(transformers_llama(Loud(config))), loud_run(TorchLlama(Loud(config))))
    assert set(errors) == all_taps(without=HIDDEN_BY_TRANSFORMERS)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_transformers_in_float64_is_not_held_back_by_float32_norms_and_softmax(config: ModelConfig) -> None:
    found, wanted = (loud_run(make(Loud(config), "float64")) for make in (transformers_llama, TorchLlama))
    errors = nmse_by_tap(found, wanted)
    assert set(errors) == all_taps(without=set())
    assert max(errors.values()) < 1e-12  # the float32 cosines and sines differ in the last bit
    first = nmse_by_tap(only(found, "attention_norm", layer=0), wanted)
    assert max(first.values()) < 1e-28


def only(trace: MemoryTrace, tap: str, layer: int) -> MemoryTrace:
    """Return the part of a trace that holds one tap."""
    part = MemoryTrace(tokens=trace.tokens, prefill=trace.prefill, dtype=trace.dtype)
    for entry in trace.taps:
        if entry.name == f"layers.{layer}.{tap}":
            part.add(entry.step, entry.name, trace.read(entry.name, entry.step))
    return part


@pytest.mark.real
@pytest.mark.parametrize("config", META_SHAPES.values(), ids=META_SHAPES)
def test_meta_agrees_at_every_tap_that_it_shows(config: ModelConfig, meta: type[MetaLlama]) -> None:
    errors = nmse_by_tap(loud_run(meta(Loud(config))), loud_run(TorchLlama(Loud(config))))
    assert set(errors) == all_taps(without=HIDDEN_BY_META)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.real
@pytest.mark.parametrize("config", META_SHAPES.values(), ids=META_SHAPES)
def test_in_bfloat16_the_bits_are_meta_s(config: ModelConfig, meta: type[MetaLlama]) -> None:
    source = Loud(config, "bfloat16")
    shares = equal_bits(loud_run(meta(source, "bfloat16")), loud_run(TorchLlama(source, "bfloat16")))
    assert set(shares) == all_taps(without=HIDDEN_BY_META)
    assert min(shares.values()) > 0.99


def test_one_rounding_too_few_is_seen_in_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from oracle import llama

    source = Loud(loud_config(), "bfloat16")
    right = loud_run(TorchLlama(source, "bfloat16"))
    monkeypatch.setattr(
        llama,
        "rms_norm",
        lambda x, weight, eps: (torch.nn.functional.rms_norm(x.float(), weight.shape, eps=eps) * weight.float()).to(
            x.dtype
        ),
    )
    assert equal_bits(loud_run(TorchLlama(source, "bfloat16")), right)["attention_norm"] < 0.9


def test_transformers_rounds_at_the_same_places_before_rope() -> None:
    source = Loud(loud_config(), "bfloat16")
    shares = equal_bits(loud_run(transformers_llama(source, "bfloat16")), loud_run(TorchLlama(source, "bfloat16")))
    assert shares["tok_embeddings"] == 1
    found = recorded(transformers_llama(source, "bfloat16"), [1, 2, 3])
    wanted = recorded(TorchLlama(source, "bfloat16"), [1, 2, 3])
    for tap in ("attention_norm", "q", "k", "v"):
        np.testing.assert_array_equal(found.read(f"layers.0.{tap}"), wanted.read(f"layers.0.{tap}"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mistake_in_the_oracle_is_seen_by_transformers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from oracle import llama

    config, rotate = loud_config(), llama.rotate
    right = loud_run(transformers_llama(Loud(config), dtype))
    monkeypatch.setattr(llama, "rotate", lambda x, by: rotate(x, by.conj()))
    errors = nmse_by_tap(right, loud_run(TorchLlama(Loud(config), dtype)))
    assert errors["q_rope"] > 0.1
    assert errors["k_rope"] > 0.1


def test_transformers_computes_the_stored_frequencies_itself() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = SHAPES["scaled frequencies"]
    scaling = config.rope_scaling
    assert scaling is not None
    settings = LlamaConfig(
        hidden_size=config.dim,
        num_attention_heads=config.n_heads,
        head_dim=config.head_dim,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": config.rope_theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    )
    freqs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    np.testing.assert_allclose(freqs.numpy(), Loud(config).rope_freqs(), rtol=5e-7)
    assert attention_factor == 1


@pytest.mark.real
def test_meta_cannot_express_heads_that_do_not_divide_the_width(meta: type[MetaLlama]) -> None:
    with pytest.raises(UnsupportedError, match="4 heads of 24 in a model of width 64"):
        meta(Loud(SHAPES["heads not D / H wide"]))


def test_meta_is_not_offered_in_float64() -> None:
    with pytest.raises(UnsupportedError, match="lowers its norms to float32"):
        MetaLlama(Loud(loud_config()), "float64")


@pytest.fixture(scope="session")
def smollm2(smollm2_stores: dict[str, Path]) -> Store:
    return Store.open(smollm2_stores["bf16"])


@pytest.fixture(scope="session")
def smollm2_run(smollm2: Store) -> MemoryTrace:
    return recorded(TorchLlama(smollm2), SMOLLM2_TOKENS, len(SMOLLM2_TOKENS) - DECODED)


@pytest.mark.real
@pytest.mark.slow
def test_transformers_agrees_on_a_trained_model(smollm2: Store, smollm2_run: MemoryTrace) -> None:
    found = recorded(transformers_llama(smollm2), SMOLLM2_TOKENS, len(SMOLLM2_TOKENS) - DECODED)
    errors = nmse_by_tap(found, smollm2_run)
    assert set(errors) == all_taps(without=HIDDEN_BY_TRANSFORMERS)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.real
@pytest.mark.slow
def test_meta_agrees_on_a_trained_model(smollm2: Store, smollm2_run: MemoryTrace, meta: type[MetaLlama]) -> None:
    found = recorded(meta(smollm2), SMOLLM2_TOKENS, len(SMOLLM2_TOKENS) - DECODED)
    errors = nmse_by_tap(found, smollm2_run)
    assert set(errors) == all_taps(without=HIDDEN_BY_META)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.real
@pytest.mark.slow
def test_in_bfloat16_the_bits_of_a_trained_model_are_meta_s(smollm2: Store, meta: type[MetaLlama]) -> None:
    prefill = len(SMOLLM2_TOKENS) - DECODED
    found = recorded(meta(smollm2, "bfloat16"), SMOLLM2_TOKENS, prefill)
    shares = equal_bits(found, recorded(TorchLlama(smollm2, "bfloat16"), SMOLLM2_TOKENS, prefill))
    assert min(shares.values()) > 0.99
