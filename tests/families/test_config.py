"""The configurations of every family: real releases, the defaults of transformers, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.config import Experts, ModelConfig, RopeScaling, from_hf_json
from npllama.errors import ConfigError, NpllamaError, UnsupportedError

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 300, "head_dim": 16,
}  # fmt: skip
GPT_SHAPE = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 300}

#: `model_type` -> class of transformers.
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "gpt2": "GPT2", "openai-gpt": "OpenAIGPT",
    "olmo2": "Olmo2",
}  # fmt: skip


def shape(family: str) -> dict[str, Any]:
    return GPT_SHAPE if family in ("gpt2", "openai-gpt") else SHAPE


def read(family: str, **changes: Any) -> ModelConfig:
    """Read a small model of a family; a change to ``...`` leaves the key out."""
    values = {"model_type": family, **shape(family), **changes}
    text = json.dumps({key: value for key, value in values.items() if value is not ...})
    return from_hf_json(text.encode(), "config.json")[0]


# --- defaults ------------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("family", CLASSES)
def test_what_a_file_leaves_out_is_what_transformers_takes_it_for(family: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    whole = getattr(transformers, f"{CLASSES[family]}Config")(**shape(family)).to_json_string(use_diff=False)
    left_out = {} if family in ("gpt2", "openai-gpt") else {"num_key_value_heads": ..., "head_dim": ...}
    assert from_hf_json(whole.encode(), "config.json")[0] == read(family)
    if family in ("llama", "phi3", "olmo2", "gpt2", "openai-gpt"):  # elsewhere the defaults need a larger model
        whole = getattr(transformers, f"{CLASSES[family]}Config")(
            **{key: value for key, value in shape(family).items() if key not in left_out}
        ).to_json_string(use_diff=False)
        assert from_hf_json(whole.encode(), "config.json")[0] == read(family, **left_out)


@pytest.mark.torch
@pytest.mark.parametrize("family", ["mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"])
def test_the_default_number_of_key_heads_is_that_of_transformers(family: str) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    wide = {**SHAPE, "num_attention_heads": 32, "hidden_size": 512}
    del wide["num_key_value_heads"]
    theirs = getattr(transformers, f"{CLASSES[family]}Config")(**wide)
    found = read(family, hidden_size=512, num_attention_heads=32, num_key_value_heads=...)
    assert found.n_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("place", range(3))
def test_a_size_that_is_missing_is_named(family: str, place: int) -> None:
    key = [key for key in shape(family) if key not in ("num_key_value_heads", "head_dim")][place]
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        read(family, **{key: ...})


@pytest.mark.parametrize("family", CLASSES)
def test_an_unknown_key_is_refused_in_every_family(family: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown keys .*: logit_softcapping"):
        read(family, logit_softcapping=30.0)


# --- real releases -------------------------------------------------------------------------------------------------

QWEN25_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
PHI3_MINI_4K = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "auto_map": {}, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000,
    "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": True,
    "vocab_size": 32064,
}  # fmt: skip
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
GPT2_SMALL = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "task_specific_params": {}, "vocab_size": 50257,
}  # fmt: skip
LONGROPE = {"long_factor": [1.0] * 24 + [60.0] * 24, "short_factor": [1.1] * 48}
PHI35_MINI = {**PHI3_MINI_4K, "max_position_embeddings": 131072, "sliding_window": 262144,
              "rope_scaling": {**LONGROPE, "type": "longrope"}}  # fmt: skip


def release(values: dict[str, Any]) -> ModelConfig:
    return from_hf_json(json.dumps(values).encode(), "config.json")[0]


def test_qwen_2_5() -> None:
    config = release(QWEN25_05B)
    assert (config.qkv_bias, config.attention_out_bias, config.tied, config.windows) == (True, False, True, ())
    assert (config.head_dim, config.norm_eps, config.rope_theta) == (64, 1e-6, 1e6)


def test_phi_3_mini() -> None:
    config = release(PHI3_MINI_4K)
    assert config.windows == (2047,) * 32
    assert (config.head_dim, config.rope_scaling, config.vocab_size) == (96, None, 32064)


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_longrope_in_every_spelling(kind: str, word: str) -> None:
    config = release({**PHI35_MINI, "rope_scaling": {**LONGROPE, word: kind}})
    assert config.windows == ()
    assert config.rope_scaling == RopeScaling(
        "longrope",
        original_max_seq_len=4096,
        short_factors=tuple(LONGROPE["short_factor"]),
        long_factors=tuple(LONGROPE["long_factor"]),
        attention_factor=math.sqrt(1 + math.log(32) / math.log(4096)),
    )
    newer = {key: value for key, value in PHI35_MINI.items() if key not in ("rope_scaling", "rope_theta")}
    newer["rope_parameters"] = {
        **LONGROPE,
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    }
    assert release(newer) == config


def test_mixtral() -> None:
    config = release(MIXTRAL_8X7B)
    assert config.experts == Experts(8, 2, 14336, renormalise=True)
    assert (config.rope_theta, config.windows) == (1e6, ())


def test_gpt_2() -> None:
    config = release(GPT2_SMALL)
    assert (config.hidden_dim, config.head_dim, config.max_seq_len, config.tied) == (3072, 64, 1024, True)
    assert (config.norm, config.norm_order, config.positions, config.activation) == (
        "layer",
        "pre",
        "learned",
        "gelu_tanh",
    )


# --- windows and experts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {}, (4096,) * 4),
        ("mistral", {"sliding_window": None}, ()),
        ("mistral", {"sliding_window": 99, "max_position_embeddings": 100}, (99,) * 4),
        ("mistral", {"sliding_window": 100, "max_position_embeddings": 100}, ()),
        ("qwen2", {"sliding_window": 9}, ()),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}, (0, 0, 0, 9)),
        ("qwen3", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, ()),
        ("qwen2_moe", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3}, (9, 0, 9, 0)),
        ("qwen3_moe", {"sliding_window": 9, "use_sliding_window": True}, (9,) * 4),
    ],
)
def test_each_family_has_its_own_way_with_windows(
    family: str, changes: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert read(family, **changes).windows == windows


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 2, 3)),
    ],
)
def test_layers_without_experts(changes: dict[str, Any], dense: tuple[int, ...]) -> None:
    experts = read("qwen3_moe", num_local_experts=8, num_experts_per_tok=2, **changes).experts
    assert experts == Experts(8, 2, 768, renormalise=False, dense_layers=dense)


@pytest.mark.parametrize("changes", [{"num_experts": 0}, {"decoder_sparse_step": 5}, {"mlp_only_layers": [0, 1, 2, 3]}])
def test_a_mixture_without_sparse_layers_is_none(changes: dict[str, Any]) -> None:
    assert read("qwen2_moe", **changes).experts is None


def test_gelu_means_the_form_with_tanh_in_gpt_1_and_the_integral_elsewhere() -> None:
    assert read("openai-gpt", afn="gelu").activation == "gelu_tanh"
    assert read("gpt2", activation_function="gelu").activation == "gelu"
    assert read("llama", hidden_act="gelu").activation == "gelu"


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], type[NpllamaError], str]] = {
    "window zero": ("mistral", {"sliding_window": 0}, ConfigError, "sliding_window is 0, expected a positive"),
    "window text": ("mixtral", {"sliding_window": "8"}, ConfigError, "sliding_window is '8'"),
    "too few layer types": (
        "qwen2", {"layer_types": ["full_attention"]},
        ConfigError, "layer_types is .*expected 4 times",
    ),
    "other layer types": ("qwen3", {"layer_types": ["chunked_attention"] * 4}, ConfigError, "layer_types is"),
    "windows not in use": (
        "qwen2", {"layer_types": ["sliding_attention"] * 4},
        ConfigError, "no sliding window is in use",
    ),
    "images": ("qwen2", {"use_mrope": True}, UnsupportedError, "use_mrope is True"),
    "phi3 with biases": ("phi3", {"attention_bias": True}, UnsupportedError, "attention_bias is True"),
    "phi4 partial": ("phi3", {"partial_rotary_factor": 0.75}, UnsupportedError, "RoPE must turn whole heads"),
    "partial inside": (
        "phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        UnsupportedError, "whole heads",
    ),
    "few factors": (
        "phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
        ConfigError, "has 1 factors",
    ),
    "no factors": ("phi3", {"rope_scaling": {"type": "su"}}, ConfigError, "longrope has 0 factors"),
    "factors text": (
        "phi3", {"rope_scaling": {"type": "su", "short_factor": ["1"] * 8, "long_factor": [1] * 8}}, ConfigError,
        "short_factor is .*a list of numbers",
    ),
    "factor zero": (
        "phi3", {"rope_scaling": {"type": "su", "short_factor": [0] * 8, "long_factor": [1] * 8}},
        ConfigError, "not positive",
    ),
    "original one": (
        "phi3", {"original_max_position_embeddings": 1, "rope_scaling": {"type": "su"}},
        ConfigError, "a number of tokens",
    ),
    "yarn elsewhere": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, UnsupportedError, "type 'yarn'"),
    "scaling of no type": ("llama", {"rope_scaling": {"type": ["su"]}}, UnsupportedError, "scaling of type"),
    "too many active": ("mixtral", {"num_experts_per_tok": 9}, ConfigError, "9 of 8 experts"),
    "sparse step zero": ("qwen3_moe", {"decoder_sparse_step": 0}, ConfigError, "decoder_sparse_step is 0"),
    "dense text": ("qwen2_moe", {"mlp_only_layers": "0"}, ConfigError, "mlp_only_layers is '0', expected a list"),
    "gpt2 raw scores": ("gpt2", {"scale_attn_weights": False}, UnsupportedError, "scale_attn_weights is False"),
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, UnsupportedError, "alike in all layers"),
    "gpt2 encoder": ("gpt2", {"add_cross_attention": True}, UnsupportedError, "an encoder"),
    "gpt2 heads": ("gpt2", {"n_head": 5}, ConfigError, "n_head is 5, expected a divisor of n_embd 64"),
    "gpt1 activation": ("openai-gpt", {"afn": "selu"}, UnsupportedError, "afn is 'selu'"),
    "quantised": ("qwen3", {"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "a quantised release"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_setting_that_would_give_wrong_numbers_is_refused(kind: str) -> None:
    family, changes, error, message = REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        read(family, **changes)
    assert type(caught.value) is error
    assert str(caught.value).startswith("config.json: ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "factor"]), inner),
    max_leaves=6,
)
KEYS = """
hidden_size num_attention_heads num_key_value_heads head_dim hidden_act rope_theta rope_scaling rope_parameters n_embd
n_head n_inner n_positions afn activation_function sliding_window max_window_layers use_sliding_window layer_types
num_experts num_local_experts num_experts_per_tok mlp_only_layers decoder_sparse_step max_position_embeddings
original_max_position_embeddings partial_rotary_factor tie_word_embeddings shared_expert_intermediate_size
""".split()


@given(family=st.sampled_from([*CLASSES]), key=st.sampled_from(KEYS), value=json_values)
def test_no_value_gives_an_untyped_error(family: str, key: str, value: Any) -> None:
    try:
        assert read(family, **{key: value}).family == family
    except NpllamaError as problem:
        assert "config.json" in str(problem)  # noqa: PT017 - most values are refused, some are right
