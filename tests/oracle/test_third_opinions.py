"""The oracle against implementations that nobody here wrote: transformers' of every family, and Meta's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.check.trace import MemoryTrace
from npllama.checkpoint.spellings import HF
from npllama.checkpoint.store import Store
from npllama.config import ModelConfig
from npllama.errors import UnsupportedError
from npllama.taps import tap_names
from tests.fixtures.loud import loud_config, loud_tokens
from tests.oracle.sources import FAMILIES, SHAPES, Loud, nmse_by_tap, prefill_of, recorded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from oracle.decoder import TorchDecoder  # noqa: E402
from oracle.equations import Rounding, rotate  # noqa: E402
from oracle.meta_reference import MetaLlama, single_process  # noqa: E402

DECODED = 3
FLOAT32_NOISE = 1e-10
SMOLLM2_TOKENS = [504, 3575, 282, 4649, 314, 7042, 30, 378, 2210, 5345, 314, 253, 3075]
#: What stays inside transformers' eager attention (unless it is in float64), its experts, and behind its modules.
HIDDEN_BY_TRANSFORMERS = {
    *("scores", "router_probs", "expert_gate", "expert_up", "expert_act", "expert_out"),
    *("shared_weight", "shared_out"),
}
HIDDEN_BY_META = {"q_rope", "scores", "probs"}

THIRD = {name: config for name, config in FAMILIES.items() if config.family in HF}
META_SHAPES = {name: config for name, config in SHAPES.items() if config.head_dim * config.n_heads == config.dim}


@pytest.fixture
def meta(meta_model: None) -> Iterator[type[MetaLlama]]:
    with single_process():
        yield MetaLlama


def transformers_model(source: Any, dtype: str = "float32") -> Any:
    from oracle.transformers_reference import TransformersModel

    return TransformersModel(source, dtype)


def loud_run(reference: Any) -> MemoryTrace:
    prefill = prefill_of(reference.config)
    return recorded(reference, loud_tokens(reference.config, prefill + DECODED).tolist(), prefill)


def all_taps(config: ModelConfig, without: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in tap_names(config)} - without


def equal_bits(found: MemoryTrace, wanted: MemoryTrace) -> dict[str, float]:
    """Smallest share of equal numbers over steps and layers, by the tap's name without its layer."""
    shares: dict[str, float] = {}
    for entry in found.taps:
        name = entry.name.rpartition(".")[2]
        share = float(np.mean(found.read(entry.name, entry.step) == wanted.read(entry.name, entry.step)))
        shares[name] = min(shares.get(name, 1.0), share)
    return shares


def test_every_family_has_a_third_opinion() -> None:
    assert {config.family for config in THIRD.values()} == set(HF)


@pytest.mark.parametrize("config", {**SHAPES, **THIRD}.values(), ids={**SHAPES, **THIRD})
def test_transformers_agrees_at_every_tap_that_it_shows(config: ModelConfig) -> None:
    errors = nmse_by_tap(loud_run(transformers_model(Loud(config))), loud_run(TorchDecoder(Loud(config))))
    assert set(errors) == all_taps(config, without=HIDDEN_BY_TRANSFORMERS)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.parametrize("config", {**SHAPES, **THIRD}.values(), ids={**SHAPES, **THIRD})
def test_transformers_in_float64_is_not_held_back_by_what_it_computes_in_float32(config: ModelConfig) -> None:
    found, wanted = (loud_run(make(Loud(config), "float64")) for make in (transformers_model, TorchDecoder))
    errors = nmse_by_tap(found, wanted)
    shown = {"scores"} if config.family != "openai-gpt" else set()
    assert set(errors) == all_taps(config, without=HIDDEN_BY_TRANSFORMERS - shown)
    assert max(errors.values()) < 1e-12  # the float32 cosines and sines differ in the last bit
    first = nmse_by_tap(only(found, "layers.0.attention_norm"), wanted)
    assert max(first.values(), default=0) < 1e-28


def only(trace: MemoryTrace, *names: str) -> MemoryTrace:
    """Return the part of a trace that holds some taps."""
    part = MemoryTrace(tokens=trace.tokens, prefill=trace.prefill, dtype=trace.dtype)
    for entry in trace.taps:
        if entry.name in names:
            part.add(entry.step, entry.name, trace.read(entry.name, entry.step))
    return part


@pytest.mark.real
@pytest.mark.parametrize("config", META_SHAPES.values(), ids=META_SHAPES)
def test_meta_agrees_at_every_tap_that_it_shows(config: ModelConfig, meta: type[MetaLlama]) -> None:
    errors = nmse_by_tap(loud_run(meta(Loud(config))), loud_run(TorchDecoder(Loud(config))))
    assert set(errors) == all_taps(config, without=HIDDEN_BY_META)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.real
@pytest.mark.parametrize("config", META_SHAPES.values(), ids=META_SHAPES)
def test_in_bfloat16_the_bits_are_meta_s(config: ModelConfig, meta: type[MetaLlama]) -> None:
    source = Loud(config, "bfloat16")
    shares = equal_bits(loud_run(meta(source, "bfloat16")), loud_run(TorchDecoder(source, "bfloat16")))
    assert set(shares) == all_taps(config, without=HIDDEN_BY_META)
    assert min(shares.values()) > 0.99


def test_one_rounding_too_few_is_seen_in_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Loud(loud_config(), "bfloat16")
    right = loud_run(TorchDecoder(source, "bfloat16"))
    monkeypatch.setattr("oracle.decoder.rounding_of", lambda family: Rounding(False, wide_norm_weight=True))
    assert equal_bits(loud_run(TorchDecoder(source, "bfloat16")), right)["attention_norm"] < 0.9


#: The last tap of the first layer up to which a family's bits are transformers', where not all of them are.
UP_TO = {
    "llama": "v",  # Meta turns pairs in float32
    "mistral": "v",
    "mixtral": "expert_out",  # transformers no longer rounds the weights of the experts, Mistral's own code does
    "gpt2": "up",  # transformers rounds inside of this GELU
    "openai-gpt": "up",
}


@pytest.mark.parametrize("config", THIRD.values(), ids=THIRD)
def test_in_bfloat16_the_bits_are_transformers(config: ModelConfig) -> None:
    source, tokens = Loud(config, "bfloat16"), loud_tokens(config, prefill_of(config)).tolist()
    found = recorded(transformers_model(source, "bfloat16"), tokens)
    wanted = recorded(TorchDecoder(source, "bfloat16"), tokens)
    last = f"layers.0.{UP_TO.get(config.family, 'resid_post')}"
    compared = tap_names(config)[: tap_names(config).index(last) + 1]
    shares = equal_bits(only(found, *compared), wanted)
    assert len(shares) >= 5
    assert min(shares.values()) > 0.98  # torch's topk takes any of equally probable experts


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mistake_in_the_oracle_is_seen_by_transformers(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = loud_config()
    right = loud_run(transformers_model(Loud(config), dtype))
    monkeypatch.setattr("oracle.decoder.rotate", lambda x, by, rounding: rotate(x, by.conj(), rounding))
    errors = nmse_by_tap(right, loud_run(TorchDecoder(Loud(config), dtype)))
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
    np.testing.assert_allclose(freqs.numpy(), Loud(config).frequencies()[0], rtol=5e-7)
    assert attention_factor == 1


@pytest.mark.real
def test_meta_cannot_express_heads_that_do_not_divide_the_width(meta: type[MetaLlama]) -> None:
    with pytest.raises(UnsupportedError, match="4 heads of 24 in a model of width 64"):
        meta(Loud(SHAPES["heads not D / H wide"]))


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "options"), [("qwen2", "qkv_bias"), ("mixtral", "experts"), ("phi3", "windows"), ("qwen3", "qk_norm")]
)
def test_meta_is_asked_about_llamas_only(name: str, options: str, meta: type[MetaLlama]) -> None:
    with pytest.raises(UnsupportedError, match=f"the model has its own {options}, and Meta's reference is a Llama"):
        meta(Loud(FAMILIES[name]))


def test_transformers_is_not_asked_about_a_family_that_it_does_not_have() -> None:
    with pytest.raises(UnsupportedError, match="the family 'decoder' is not run with transformers"):
        transformers_model(Loud(loud_config(family="decoder")))


@pytest.mark.parametrize("windows", [(8, 0), (8, 9)])
def test_transformers_is_not_asked_for_windows_that_its_class_does_not_have(windows: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match="one window for all layers"):
        transformers_model(Loud(loud_config(family="mistral", windows=windows)))


def test_transformers_is_not_asked_for_weights_that_its_class_does_not_have() -> None:
    with pytest.raises(UnsupportedError, match=r"Qwen2 is another model than this qwen2: missing_keys: .*q_proj\.bias"):
        transformers_model(Loud(loud_config(family="qwen2")))


def test_meta_is_not_offered_in_float64() -> None:
    with pytest.raises(UnsupportedError, match="lowers its norms to float32"):
        MetaLlama(Loud(loud_config()), "float64")


@pytest.fixture(scope="session")
def smollm2(smollm2_stores: dict[str, Path]) -> Store:
    return Store.open(smollm2_stores["bf16"])


@pytest.fixture(scope="session")
def smollm2_run(smollm2: Store) -> MemoryTrace:
    return recorded(TorchDecoder(smollm2), SMOLLM2_TOKENS, len(SMOLLM2_TOKENS) - DECODED)


@pytest.mark.real
@pytest.mark.slow
def test_transformers_agrees_on_a_trained_model(smollm2: Store, smollm2_run: MemoryTrace) -> None:
    found = recorded(transformers_model(smollm2), SMOLLM2_TOKENS, len(SMOLLM2_TOKENS) - DECODED)
    errors = nmse_by_tap(found, smollm2_run)
    assert set(errors) == all_taps(smollm2.config, without=HIDDEN_BY_TRANSFORMERS)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.real
@pytest.mark.slow
def test_meta_agrees_on_a_trained_model(smollm2: Store, smollm2_run: MemoryTrace, meta: type[MetaLlama]) -> None:
    found = recorded(meta(smollm2), SMOLLM2_TOKENS, len(SMOLLM2_TOKENS) - DECODED)
    errors = nmse_by_tap(found, smollm2_run)
    assert set(errors) == all_taps(smollm2.config, without=HIDDEN_BY_META)
    assert max(errors.values()) < FLOAT32_NOISE


@pytest.mark.real
@pytest.mark.slow
def test_in_bfloat16_the_bits_of_a_trained_model_are_meta_s(smollm2: Store, meta: type[MetaLlama]) -> None:
    prefill = len(SMOLLM2_TOKENS) - DECODED
    found = recorded(meta(smollm2, "bfloat16"), SMOLLM2_TOKENS, prefill)
    shares = equal_bits(found, recorded(TorchDecoder(smollm2, "bfloat16"), SMOLLM2_TOKENS, prefill))
    assert min(shares.values()) > 0.99
