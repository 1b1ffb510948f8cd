"""Every family in transformers: its classes, its settings, and where in its modules the taps are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from npllama.config import ModelConfig, RopeScaling
from npllama.errors import UnsupportedError

Settings: TypeAlias = Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """A family's implementation in transformers.

    Attributes
    ----------
    name : str
        Of its classes: ``NameConfig``.
    settings : callable
        Turns a configuration into arguments of the config class.
    taps : str
        Table of hooks, as `oracle.hooks.attach` reads it.
    model : str
        Name of the class of the model; by default ``NameForCausalLM``.
    cached : bool
        Its forward pass takes a cache; one without gets the whole text at every step.
    """

    name: str
    settings: Settings
    taps: str
    model: str = ""
    cached: bool = True

    @property
    def model_class(self) -> str:
        """Name of the class of the model."""
        return self.model or f"{self.name}ForCausalLM"


def family_of(config: ModelConfig) -> Family:
    """Return the implementation of a model's family; UnsupportedError if there is none here."""
    if config.family not in FAMILIES:
        raise UnsupportedError(
            f"the family {config.family!r} is not run with transformers",
            remedy=f"Families that are: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[config.family]


# --- settings -------------------------------------------------------------------------------------------------------


def _common(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "hidden_act": _ACTIVATIONS[config.activation],
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_seq_len,
    }


def _window(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a family whose layers all have one window, or none."""
    windows = set(config.windows) or {0}
    if len(windows) > 1:
        raise UnsupportedError(f"transformers' {config.family} has one window for all layers, this model {windows}")
    window = windows.pop()
    return {"sliding_window": window or None, "use_sliding_window": window > 0}


def _windows(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a family whose layers have a window or none, by a list."""
    widths = set(config.windows) - {0}
    if len(widths) > 1:
        raise UnsupportedError(f"transformers' {config.family} has windows of one width, this model of {widths}")
    kinds = ["sliding_attention" if config.window(i) else "full_attention" for i in range(config.n_layers)]
    window = widths.pop() if widths else config.max_seq_len
    return {"sliding_window": window, "use_sliding_window": True, "layer_types": kinds}


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {**_common(config), "attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


def _mistral(config: ModelConfig) -> dict[str, Any]:
    return {**_common(config), **_window(config)}


def _qwen(config: ModelConfig) -> dict[str, Any]:
    return {**_common(config), **_windows(config)}


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    assert experts is not None
    return {
        **_mistral(config),
        "intermediate_size": experts.hidden_dim,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "experts_implementation": "eager",
    }


def _experts(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a Qwen mixture of experts."""
    experts = config.experts
    assert experts is not None
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.active,
        "moe_intermediate_size": experts.hidden_dim,
        "shared_expert_intermediate_size": experts.shared_dim,
        "norm_topk_prob": experts.renormalise,
        "mlp_only_layers": list(experts.dense_layers),
        "decoder_sparse_step": 1,
        "experts_implementation": "eager",
    }


def _qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    return {**_common(config), **_windows(config), **_experts(config), "qkv_bias": config.qkv_bias}


def _qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {**_common(config), **_window(config), **_experts(config)}


def _phi3(config: ModelConfig) -> dict[str, Any]:
    settings = _mistral(config)
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        original = config.rope_scaling.original_max_seq_len
        settings["original_max_position_embeddings"] = original
        settings["rope_parameters"] = _longrope(config.rope_theta, config.rope_scaling)
    return settings


def _longrope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "attention_factor": scaling.attention_factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }


def _gpt(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_positions": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "n_inner": config.hidden_dim,
        "activation_function": _ACTIVATIONS[config.activation],
        "afn": _GPT1_ACTIVATIONS.get(config.activation),
    }


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
#: GPT-1's "gelu" is the tanh form.
_GPT1_ACTIVATIONS = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}

# --- where the taps are ---------------------------------------------------------------------------------------------

_ENDS = """
model.embed_tokens  out  tok_embeddings
model.norm          out  norm
lm_head             out  logits
"""

_PRE_NORMS = """
model.layers.{i}.input_layernorm           out  layers.{i}.attention_norm
model.layers.{i}.post_attention_layernorm  in   layers.{i}.resid_mid
model.layers.{i}.post_attention_layernorm  out  layers.{i}.ffn_norm
"""

_OUTPUT_NORMS = """
model.layers.{i}.post_attention_layernorm    out  layers.{i}.attention_out_norm
model.layers.{i}.mlp                         in   layers.{i}.resid_mid
model.layers.{i}.post_feedforward_layernorm  out  layers.{i}.ffn_out_norm
"""

_PROJECTIONS = """
model.layers.{i}.self_attn.q_proj  out  layers.{i}.q
model.layers.{i}.self_attn.k_proj  out  layers.{i}.k
model.layers.{i}.self_attn.v_proj  out  layers.{i}.v
model.layers.{i}.self_attn.q_norm  out  layers.{i}.q_norm
model.layers.{i}.self_attn.k_norm  out  layers.{i}.k_norm
model.layers.{i}.mlp.gate_proj     out  layers.{i}.gate
model.layers.{i}.mlp.up_proj       out  layers.{i}.up
"""

_FUSED_PROJECTIONS = """
model.layers.{i}.self_attn.qkv_proj  out  layers.{i}.q|layers.{i}.k|layers.{i}.v
model.layers.{i}.mlp.gate_up_proj    out  layers.{i}.gate|layers.{i}.up
"""

_OUTPUTS = """
model.layers.{i}.self_attn.o_proj             in   layers.{i}.context
model.layers.{i}.self_attn.o_proj             out  layers.{i}.attention_out
model.layers.{i}.mlp.down_proj                in   layers.{i}.ffn_act
model.layers.{i}.mlp.gate                     out  layers.{i}.router_logits
model.layers.{i}.mlp.shared_expert.gate_proj  out  layers.{i}.shared_gate
model.layers.{i}.mlp.shared_expert.up_proj    out  layers.{i}.shared_up
model.layers.{i}.mlp.shared_expert.down_proj  in   layers.{i}.shared_act
model.layers.{i}.mlp                          out  layers.{i}.ffn_out
model.layers.{i}                              out  layers.{i}.resid_post
"""

_LLAMA_TAPS = _ENDS + _PRE_NORMS + _PROJECTIONS + _OUTPUTS

_GPT_TAPS = """
transformer.h.{i}.attn.c_attn  out  layers.{i}.q|layers.{i}.k|layers.{i}.v
transformer.h.{i}.attn.c_proj  in   layers.{i}.context
transformer.h.{i}.attn.c_proj  out  layers.{i}.attention_out
transformer.h.{i}.mlp.c_fc     out  layers.{i}.up
transformer.h.{i}.mlp.c_proj   in   layers.{i}.ffn_act
transformer.h.{i}.mlp          out  layers.{i}.ffn_out
transformer.drop               out  embeddings
lm_head                        out  logits
"""

_GPT2_TAPS = f"""
transformer.wte         out  tok_embeddings
transformer.wpe         out  pos_embeddings
transformer.h.{{i}}.ln_1  out  layers.{{i}}.attention_norm
transformer.h.{{i}}.ln_2  in   layers.{{i}}.resid_mid
transformer.h.{{i}}.ln_2  out  layers.{{i}}.ffn_norm
transformer.h.{{i}}       out  layers.{{i}}.resid_post
transformer.ln_f        out  norm
{_GPT_TAPS.strip()}
"""

_GPT1_TAPS = f"""
transformer.tokens_embed           out  tok_embeddings
transformer.positions_embed        out  pos_embeddings
transformer.h.{{i}}.attn.attn_dropout  in   layers.{{i}}.probs
transformer.h.{{i}}.ln_1             in   layers.{{i}}.resid_mid
transformer.h.{{i}}.ln_1             out  layers.{{i}}.resid_mid_norm
transformer.h.{{i}}.ln_2             in   layers.{{i}}.resid_post
transformer.h.{{i}}.ln_2             out  layers.{{i}}.resid_post_norm
{_GPT_TAPS.strip()}
"""

#: `ModelConfig.family` -> implementation.
FAMILIES = {
    "llama": Family("Llama", _llama, _LLAMA_TAPS),
    "mistral": Family("Mistral", _mistral, _LLAMA_TAPS),
    "qwen2": Family("Qwen2", _qwen, _LLAMA_TAPS),
    "qwen3": Family("Qwen3", _qwen, _LLAMA_TAPS),
    "qwen2_moe": Family("Qwen2Moe", _qwen2_moe, _LLAMA_TAPS),
    "qwen3_moe": Family("Qwen3Moe", _qwen3_moe, _LLAMA_TAPS),
    "phi3": Family("Phi3", _phi3, _ENDS + _PRE_NORMS + _FUSED_PROJECTIONS + _OUTPUTS),
    "mixtral": Family("Mixtral", _mixtral, _LLAMA_TAPS),
    "olmo2": Family("Olmo2", _common, _ENDS + _OUTPUT_NORMS + _PROJECTIONS + _OUTPUTS),
    "gpt2": Family("GPT2", _gpt, _GPT2_TAPS, model="GPT2LMHeadModel"),
    "openai-gpt": Family("OpenAIGPT", _gpt, _GPT1_TAPS, model="OpenAIGPTLMHeadModel", cached=False),
}
