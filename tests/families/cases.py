"""The models that every family is tried with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Case:
    """One model.

    Attributes
    ----------
    family : str
        As transformers spells its classes.
    settings : mapping
        Of its configuration.
    prompt, steps : int
        Tokens of the prefill, and tokens decoded after it.
    shard : str
        Largest file that its checkpoint may be saved in.
    """

    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompt: int = 40
    steps: int = 3
    shard: str = "1GB"


_SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ODD = {
    **_SMALL,
    "hidden_size": 42,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 65,
    "vocab_size": 101,
    "head_dim": 10,
}
_GPT = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MOE = {**_SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _longrope(**more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(6)],
        "long_factor": [1.5 + 0.9 * i for i in range(6)],
        **more,
    }


CASES: dict[str, Case] = {
    "llama": Case("Llama", _SMALL),
    "llama, each head its own keys, tied": Case(
        "Llama", {**_SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True}
    ),
    "llama, odd widths, biases": Case("Llama", {**_ODD, "attention_bias": True, "mlp_bias": True}, shard="20KB"),
    "llama, scaled": Case("Llama", {**_SMALL, "rope_parameters": _LLAMA3}),
    "llama, scaled evenly, one key head, gelu": Case(
        "Llama",
        {
            **_SMALL,
            "num_key_value_heads": 1,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
    "mistral": Case("Mistral", {**_SMALL, "sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "mistral, window of 7": Case("Mistral", {**_ODD, "sliding_window": 7}, shard="20KB"),
    "qwen2": Case("Qwen2", {**_SMALL, "tie_word_embeddings": True}),
    "qwen2, window from layer 1 on": Case(
        "Qwen2",
        {**_SMALL, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        shard="20KB",
    ),
    "qwen2, listed windows": Case(
        "Qwen2",
        {
            **_SMALL,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3": Case("Qwen3", {**_ODD, "tie_word_embeddings": True}),
    "qwen3, biases, windows": Case(
        "Qwen3",
        {
            **_SMALL,
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        shard="20KB",
    ),
    "phi3": Case("Phi3", {**_SMALL, "num_key_value_heads": 4}),
    "phi3, window of 6, grouped": Case("Phi3", {**_SMALL, "sliding_window": 6}, shard="20KB"),
    "phi3, below its original context": Case(
        "Phi3", {**_SMALL, "original_max_position_embeddings": 64, "rope_parameters": _longrope()}
    ),
    "phi3, beyond its original context": Case(
        "Phi3", {**_SMALL, "original_max_position_embeddings": 16, "rope_parameters": _longrope()}
    ),
    "phi3, crossing its original context": Case(
        "Phi3", {**_SMALL, "original_max_position_embeddings": 41, "rope_parameters": _longrope(attention_factor=1.3)}
    ),
    "mixtral": Case("Mixtral", {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, one of three experts, window": Case(
        "Mixtral", {**_ODD, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 8}, shard="20KB"
    ),
    "mixtral, one expert": Case("Mixtral", {**_SMALL, "num_local_experts": 1, "num_experts_per_tok": 1}),
    "qwen2_moe": Case("Qwen2Moe", {**_MOE, "shared_expert_intermediate_size": 56}, shard="40KB"),
    "qwen2_moe, renormalised, first layer dense": Case(
        "Qwen2Moe",
        {
            **_MOE,
            "shared_expert_intermediate_size": 33,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "qkv_bias": False,
        },
    ),
    "qwen2_moe, every second layer sparse, windows": Case(
        "Qwen2Moe",
        {
            **_MOE,
            "num_hidden_layers": 3,
            "shared_expert_intermediate_size": 56,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": Case("Qwen3Moe", {**_MOE, "head_dim": 16}),
    "qwen3_moe, renormalised, three of four": Case(
        "Qwen3Moe", {**_MOE, "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True}, shard="40KB"
    ),
    "olmo2": Case("Olmo2", {**_SMALL, "tie_word_embeddings": True}),
    "olmo2, odd widths, biases": Case("Olmo2", {**_ODD, "attention_bias": True}, shard="20KB"),
    "gpt2": Case("GPT2", _GPT),
    "gpt2, separate head, odd widths, gelu": Case(
        "GPT2",
        {
            **_GPT,
            "n_embd": 35,
            "n_head": 5,
            "n_inner": 61,
            "vocab_size": 97,
            "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
        shard="20KB",
    ),
    "gpt1": Case("OpenAIGPT", _GPT),
    "gpt1, separate head, relu": Case(
        "OpenAIGPT", {**_GPT, "n_layer": 3, "n_head": 3, "afn": "relu", "tie_word_embeddings": False}, shard="20KB"
    ),
}
