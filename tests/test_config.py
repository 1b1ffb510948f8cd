"""Configurations: the real models' numbers, and an error for every key that is wrong or not understood."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.config import ModelConfig, RopeScaling, from_gguf, from_hf_json, from_params_json
from npllama.errors import ConfigError, NpllamaError, ParameterError, UnsupportedError
from tests.checkpoint.tiny import CONFIG
from tests.fixtures.loud import hf_config

# --- Meta ----------------------------------------------------------------------------------------------------------

LLAMA1_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
LLAMA2_70B = {
    "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
    "norm_eps": 1e-05, "vocab_size": -1,
}  # fmt: skip
LLAMA3_8B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA31_8B = {**LLAMA3_8B, "use_scaled_rope": True}
LLAMA31_405B = {
    **LLAMA31_8B, "dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2,
}  # fmt: skip
LLAMA32_1B = {**LLAMA31_8B, "dim": 2048, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
LLAMA32_3B = {**LLAMA31_8B, "dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0}

#: params.json -> what the released model has: F, Dh, K, context, RoPE factor
RELEASED = {
    "1 7B": (LLAMA1_7B, 11008, 128, 32, 2048, None),
    "2 70B": (LLAMA2_70B, 28672, 128, 8, 4096, None),
    "3 8B": (LLAMA3_8B, 14336, 128, 8, 8192, None),
    "3.1 8B": (LLAMA31_8B, 14336, 128, 8, 131072, 8.0),
    "3.1 405B": (LLAMA31_405B, 53248, 128, 8, 131072, 8.0),
    "3.2 1B": (LLAMA32_1B, 8192, 64, 8, 131072, 32.0),
    "3.2 3B": (LLAMA32_3B, 8192, 128, 8, 131072, 32.0),
}


def meta(params: dict[str, Any], **options: Any) -> ModelConfig:
    return from_params_json(json.dumps(params).encode(), "params.json", **options)[0]


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_of_meta(name: str) -> None:
    params, hidden, head_dim, kv_heads, context, factor = RELEASED[name]
    config = meta(params, vocab_size=32000)
    assert (config.hidden_dim, config.head_dim, config.n_kv_heads, config.max_seq_len) == (
        hidden, head_dim, kv_heads, context,
    )  # fmt: skip
    assert config.vocab_size == (32000 if params["vocab_size"] == -1 else 128256)
    assert config.rope_scaling == (None if factor is None else RopeScaling("llama3", factor, 1.0, 4.0, 8192))
    assert config.rope_theta == params.get("rope_theta", 10_000.0)
    assert not config.tied


@pytest.mark.parametrize(("params", "factor"), [(LLAMA31_8B, "8"), (LLAMA32_1B, "32")])
def test_an_assumed_rope_factor_is_noted(params: dict[str, Any], factor: str) -> None:
    _, notes = from_params_json(json.dumps(params).encode(), "params.json")
    assert any(f"scaled by {factor} (by the model's shape" in note for note in notes)


def test_a_rope_factor_that_is_asked_for_is_taken_and_noted() -> None:
    config, notes = from_params_json(json.dumps(LLAMA31_8B).encode(), "params.json", rope_factor=16.0)
    assert config.rope_scaling == RopeScaling("llama3", 16.0)
    assert any("scaled by 16 (as asked)" in note for note in notes)


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_rope_factor_is_refused(factor: float) -> None:
    with pytest.raises(ParameterError, match="RoPE factor"):
        meta(LLAMA31_8B, rope_factor=factor)


def test_a_rope_factor_for_a_model_without_scaling_is_refused() -> None:
    with pytest.raises(ParameterError, match="no use_scaled_rope"):
        meta(LLAMA3_8B, rope_factor=8.0)


def test_values_nested_under_model_are_found() -> None:
    assert meta({"model": LLAMA3_8B}) == meta(LLAMA3_8B)


def test_a_context_that_the_file_states_wins() -> None:
    assert meta({**LLAMA3_8B, "max_seq_len": 512}).max_seq_len == 512


PARAMS_REFUSED: dict[str, tuple[dict[str, Any], type[NpllamaError], str]] = {
    "no dim": ({"dim": None}, ConfigError, "dim is None"),
    "dim text": ({"dim": "4096"}, ConfigError, "dim is '4096', expected an integer"),
    "dim real": ({"dim": 4096.0}, ConfigError, "dim is 4096.0, expected an integer"),
    "dim true": ({"dim": True}, ConfigError, "dim is True"),
    "dim zero": ({"dim": 0}, ConfigError, "dim is 0"),
    "dim negative": ({"dim": -4096}, ConfigError, "dim is -4096"),
    "dim astronomical": ({"dim": 10**350}, ConfigError, "expected an integer of at most"),
    "dim large": ({"dim": 1 << 40}, ConfigError, "expected an integer of at most"),
    "dim not by heads": ({"dim": 4097}, ConfigError, "dim 4097 is not a multiple of n_heads 32"),
    "heads zero": ({"n_heads": 0}, ConfigError, "n_heads is 0"),
    "heads not by kv heads": ({"n_kv_heads": 5}, ConfigError, "n_heads 32 is not a multiple of n_kv_heads 5"),
    "kv heads zero": ({"n_kv_heads": 0}, ConfigError, "n_kv_heads is 0"),
    "odd head": ({"n_heads": 4096}, ConfigError, "head_dim is 1, expected an even number"),
    "layers zero": ({"n_layers": 0}, ConfigError, "n_layers is 0, expected an integer from 1"),
    "layers absurd": ({"n_layers": 1 << 20}, ConfigError, "n_layers is 1048576"),
    "multiple zero": ({"multiple_of": 0}, ConfigError, "multiple_of is 0"),
    "multiplier text": ({"ffn_dim_multiplier": "1.3"}, ConfigError, "ffn_dim_multiplier is '1.3', expected a number"),
    "multiplier huge": ({"ffn_dim_multiplier": 1e300}, ConfigError, "ffn_dim_multiplier"),
    "multiplier negative": ({"ffn_dim_multiplier": -1.0}, ConfigError, "hidden_dim is -"),
    "eps zero": ({"norm_eps": 0}, ConfigError, "norm_eps is 0"),
    "eps negative": ({"norm_eps": -1e-5}, ConfigError, "norm_eps is -1e-05"),
    "eps one": ({"norm_eps": 1}, ConfigError, "norm_eps is 1"),
    "no eps": ({"norm_eps": None}, ConfigError, "norm_eps is None"),
    "theta zero": ({"rope_theta": 0}, ConfigError, "rope_theta is 0"),
    "no theta": ({"rope_theta": None}, ConfigError, "rope_theta is None, expected a number: a Llama 3 model needs it"),
    "vocabulary": ({"vocab_size": -1}, ConfigError, "vocab_size is -1"),
    "scaled by text": ({"use_scaled_rope": "yes"}, ConfigError, "use_scaled_rope is 'yes', expected true or false"),
    "unknown key": ({"attention_sinks": 4}, ConfigError, "unknown keys that could change the numbers: attention_sinks"),
    "quantised": ({"quantization_args": {"scheme": "int8"}}, UnsupportedError, "a quantised release"),
    "lora": ({"lora_args": {"rank": 16}}, UnsupportedError, "a LoRA fine-tune"),
    "vision": ({"vision_chunk_size": 448}, UnsupportedError, "a vision model"),
    "experts": ({"moe_args": {}}, UnsupportedError, "a mixture of experts"),
}


@pytest.mark.parametrize("kind", PARAMS_REFUSED)
def test_params_json_is_refused(kind: str) -> None:
    change, error, message = PARAMS_REFUSED[kind]
    with pytest.raises(error) as caught:
        meta({**LLAMA3_8B, **change})
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert str(caught.value).startswith("params.json: ")


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "multiple_of", "norm_eps"])
def test_a_missing_key_of_params_json_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        meta({name: value for name, value in LLAMA3_8B.items() if name != key})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(key=st.sampled_from([*LLAMA31_8B, "max_seq_len", "model"]), value=json_values)
def test_no_value_of_params_json_gives_an_untyped_error(key: str, value: Any) -> None:
    try:
        config = meta({**LLAMA31_8B, key: value})
    except NpllamaError:
        return
    assert config.n_heads % config.n_kv_heads == 0


# --- Hugging Face --------------------------------------------------------------------------------------------------

HF = hf_config(CONFIG)


def hugging_face(config: dict[str, Any]) -> ModelConfig:
    return from_hf_json(json.dumps(config).encode(), "config.json")[0]


def test_hf_config_is_read_back() -> None:
    assert hugging_face(HF) == CONFIG
    assert hugging_face({**HF, "tie_word_embeddings": True}) == replace(CONFIG, tied=True)


@pytest.mark.parametrize("spelled", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rope_scaling_are_read(spelled: str, place: str) -> None:
    config = hugging_face({**HF, place: {spelled: "linear", "factor": 2.0}})
    assert config == replace(CONFIG, rope_scaling=RopeScaling("linear", 2.0))


def test_theta_in_rope_parameters_wins() -> None:
    new = {key: value for key, value in HF.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 777.0}
    assert hugging_face(new).rope_theta == 777.0


HF_REFUSED: dict[str, tuple[dict[str, Any], type[NpllamaError], str]] = {
    "another family": ({"model_type": "gemma"}, UnsupportedError, "model_type is 'gemma'"),
    "no family": ({"model_type": None}, UnsupportedError, "model_type is None"),
    "another activation": ({"hidden_act": "quick_gelu"}, UnsupportedError, "hidden_act is 'quick_gelu'"),
    "biases text": ({"attention_bias": "yes"}, ConfigError, "attention_bias is 'yes', expected true or false"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, UnsupportedError, "RoPE must turn whole heads"),
    "interleaved rotation": ({"rope_interleaved": True}, UnsupportedError, "rope_interleaved is True"),
    "quantised": ({"quantization_config": {"bits": 4}}, UnsupportedError, "a quantised release"),
    "a window": ({"sliding_window": 32}, UnsupportedError, "sliding_window is 32"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, UnsupportedError, "'yarn'"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, ConfigError, "factor is missing"),
    "unknown in scaling": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4, "beta": 1}}, ConfigError, "unknown keys .*: beta",
    ),
    "bands out of order": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1,
                          "original_max_position_embeddings": 8192}},
        ConfigError, "not positive and in order",
    ),
    "scaling text": ({"rope_scaling": "linear"}, ConfigError, "not a JSON object"),
    "tie text": ({"tie_word_embeddings": "false"}, ConfigError, "tie_word_embeddings is 'false', expected true or"),
    "unknown key": ({"logit_softcapping": 30.0}, ConfigError, "unknown keys .*: logit_softcapping"),
    "no heads": ({"num_attention_heads": 0}, ConfigError, "num_attention_heads is 0"),
    "no width": ({"hidden_size": None}, ConfigError, "hidden_size is None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HF_REFUSED)
def test_config_json_is_refused(kind: str) -> None:
    change, error, message = HF_REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        hugging_face({**HF, **change})
    assert type(caught.value) is error
    assert str(caught.value).startswith("config.json: ")


# --- GGUF ----------------------------------------------------------------------------------------------------------

GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.embedding_length": 8,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.dimension_count": 2,
    "llama.feed_forward_length": 12,
    "llama.vocab_size": 16,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10_000.0,
    "tokenizer.ggml.model": "gpt2",
}


def gguf(metadata: dict[str, Any], *, tied: bool = False, freq_factors: bool = False) -> ModelConfig:
    return from_gguf(metadata, "model.gguf", tied=tied, freq_factors=freq_factors)[0]


def test_gguf_metadata_is_read() -> None:
    assert gguf(GGUF) == CONFIG
    assert gguf(GGUF, tied=True, freq_factors=True) == replace(CONFIG, tied=True, rope_scaling=RopeScaling("factors"))


def test_the_vocabulary_of_a_gguf_may_be_counted() -> None:
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    assert gguf({**metadata, "tokenizer.ggml.tokens": ["a"] * 16}) == CONFIG


def test_a_gguf_of_llama_3_1_without_factors_says_that_nothing_is_scaled() -> None:
    metadata = {**GGUF, "llama.context_length": 131072, "llama.rope.freq_base": 500_000.0}
    _, notes = from_gguf(metadata, "model.gguf", tied=False, freq_factors=False)
    assert any("no rope_freqs.weight" in note for note in notes)
    assert from_gguf(metadata, "model.gguf", tied=False, freq_factors=True)[1] == ()


GGUF_REFUSED: dict[str, tuple[dict[str, Any], type[NpllamaError], str]] = {
    "another family": ({"general.architecture": "mamba"}, UnsupportedError, "general.architecture is 'mamba'"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, UnsupportedError, "rope.scaling.type is 'yarn'"),
    "part of a head": ({"llama.rope.dimension_count": 1}, UnsupportedError, "RoPE must turn whole heads"),
    "other value width": ({"llama.attention.value_length": 4}, UnsupportedError, "one width"),
    "unknown key": ({"llama.logit_scale": 2.0}, ConfigError, "unknown keys .*: llama.logit_scale"),
    "array": ({"llama.block_count": np.array([2, 2])}, ConfigError, "llama.block_count is array"),
    "eps NaN": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, ConfigError, "layer_norm_rms_epsilon is nan"),
    "theta inf": ({"llama.rope.freq_base": math.inf}, ConfigError, "freq_base is inf"),
}


@pytest.mark.parametrize("kind", GGUF_REFUSED)
def test_gguf_metadata_is_refused(kind: str) -> None:
    change, error, message = GGUF_REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        gguf({**GGUF, **change})
    assert type(caught.value) is error
    assert str(caught.value).startswith("model.gguf: ")


@pytest.mark.parametrize("key", ["embedding_length", "attention.head_count", "context_length", "block_count"])
def test_a_missing_key_of_gguf_metadata_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"llama.{key} is missing"):
        gguf({name: value for name, value in GGUF.items() if name != f"llama.{key}"})


# --- the configuration itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, RopeScaling("llama3", 8.0), RopeScaling("factors")])
def test_json_and_back(scaling: RopeScaling | None) -> None:
    config = replace(CONFIG, rope_scaling=scaling)
    text = json.dumps(config.to_json())
    assert ModelConfig.from_json(json.loads(text), "manifest.json") == config


@given(key=st.sampled_from([*CONFIG.to_json()]), value=json_values)
def test_no_json_value_gives_an_untyped_error(key: str, value: Any) -> None:
    try:
        found = ModelConfig.from_json({**CONFIG.to_json(), key: value}, "manifest.json")
    except ConfigError as problem:
        message = str(problem)
    else:
        message = "manifest.json"
        assert getattr(found, key) is not None or key == "rope_scaling"
    assert "manifest.json" in message


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"kind": "yarn"},
        {"kind": "llama3", "original_max_seq_len": "8192"},
        {"kind": "linear", "factor": 0},
        [],
        "x",
    ],
)
def test_a_scaling_in_json_is_checked(scaling: Any) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json"):
        ModelConfig.from_json({**CONFIG.to_json(), "rope_scaling": scaling}, "manifest.json")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CONFIG.dim = 16  # type: ignore[misc]


def test_axes_are_the_lengths_of_the_letters() -> None:
    assert CONFIG.axes == {"L": 2, "D": 8, "H": 4, "K": 2, "Dh": 2, "F": 12, "V": 16}


def test_an_unknown_kind_of_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match="kind 'yarn'"):
        replace(CONFIG, rope_scaling=RopeScaling("yarn"))
