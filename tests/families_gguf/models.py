"""The models that every GGUF architecture is tried with: family as transformers spells it, settings."""

from __future__ import annotations

from typing import Any

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 3.3}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.5, 1.75, 2.0, 2.3, 3.1],
    "long_factor": [1.3, 2.05, 3.1, 4.5, 5.75, 8.0, 12.3, 33.1],
    "original_max_position_embeddings": 16,
}
_GPT2 = {
    "vocab_size": 96,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}

MIXTRAL = ("Mixtral", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None})

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, wide heads, biases": ("Llama", {**_SIZES, "head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "llama, tied, linear RoPE scaling": ("Llama", {**_SIZES, "tie_word_embeddings": True, "rope_parameters": _LINEAR}),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": None}),
    "mixtral": MIXTRAL,
    "qwen2": ("Qwen2", {**_SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 24, "rms_norm_eps": 1e-6}),
    "qwen2moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 24, "norm_topk_prob": True}),
    "phi3, window": ("Phi3", {**_SIZES, "sliding_window": 7, "original_max_position_embeddings": 64}),
    "phi3, longrope": (
        "Phi3",
        {**_SIZES, "num_key_value_heads": 4, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 16},
    ),
    "olmo2": ("Olmo2", _SIZES),
    "gpt2": ("GPT2", _GPT2),
}
