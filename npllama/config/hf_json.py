"""Hugging Face's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npllama.config.keys import Keys
from npllama.config.model_config import ModelConfig, RopeScaling, model_config
from npllama.errors import ConfigError, UnsupportedError
from npllama.strict_json import parse_object

_HF_FAMILIES = ("llama", "mistral")
_HF_HARMLESS = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config label2id max_length model_type output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict task_specific_params
    tokenizer_class torch_dtype transformers.js_config transformers_version unk_token_id unsloth_version use_cache
    _model_name_or_path _name_or_path
    """.split()
)


def from_hf_json(text: bytes, file: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read a Hugging Face ``config.json`` of a Llama-architecture model.

    Both spellings of the RoPE settings are read: ``rope_theta`` with ``rope_scaling``, and the newer
    ``rope_parameters``. Raises as `from_params_json` does.
    """
    keys = Keys(parse_object(text, error=ConfigError, file=file), file)
    family = keys.get("model_type")
    if family not in _HF_FAMILIES:
        raise UnsupportedError(
            f"model_type is {family!r}", file=file, remedy=f"Supported families: {', '.join(_HF_FAMILIES)}."
        )
    keys.must_be("hidden_act", ["silu"], "the feed-forward layer is SwiGLU")
    keys.must_be("attention_bias", [False], "biases are not supported")
    keys.must_be("mlp_bias", [False], "biases are not supported")
    keys.must_be("partial_rotary_factor", [1, 1.0], "RoPE must turn whole heads")
    keys.must_be("rope_interleaved", [False], "the rotated rows must be ordered by halves")
    keys.must_be("quantization_config", [], "a quantised release")
    dim, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if n_heads < 1:
        raise keys.error("num_attention_heads", "a positive integer")
    context = keys.integer("max_position_embeddings", 2048)
    window = keys.get("sliding_window")
    if window is not None and (not isinstance(window, int) or window < context):
        raise UnsupportedError(f"sliding_window is {window!r}: attention must see the whole context", file=file)
    rope = keys.get("rope_parameters") or {}
    legacy = keys.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(legacy, dict):
        raise ConfigError("the RoPE settings are not a JSON object", file=file)
    top_theta = keys.number("rope_theta", 10_000.0)
    merged = {"rope_theta": top_theta, **legacy, **rope}
    theta = Keys(merged, file).number("rope_theta")
    config = model_config(
        file,
        family=family,
        dim=dim,
        n_layers=keys.integer("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads),
        head_dim=keys.integer("head_dim", dim // n_heads),
        hidden_dim=keys.integer("intermediate_size"),
        vocab_size=keys.integer("vocab_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=_hf_scaling(merged, file),
        max_seq_len=context,
        tied=keys.flag("tie_word_embeddings"),
    )
    keys.finish(_HF_HARMLESS)
    return config, ()


def _hf_scaling(values: Mapping[str, Any], file: str) -> RopeScaling | None:
    keys = Keys(values, file)
    kind = keys.get("rope_type") or keys.get("type") or "default"
    keys.get("type")
    keys.get("rope_theta")
    keys.must_be("partial_rotary_factor", [1, 1.0], "RoPE must turn whole heads")
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = RopeScaling("linear", keys.number("factor"))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            keys.number("factor"),
            keys.number("low_freq_factor"),
            keys.number("high_freq_factor"),
            keys.integer("original_max_position_embeddings"),
        )
    else:
        raise UnsupportedError(f"RoPE scaling of type {kind!r}", file=file, remedy="Supported: llama3 and linear.")
    keys.finish(frozenset())
    return scaling
