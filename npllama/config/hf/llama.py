"""Llama, Mistral, Mixtral and Phi-3."""

from __future__ import annotations

from typing import Any

from npllama.config.hf import Family
from npllama.config.hf.decoder import DECODER_DEFAULTS, read_decoder, windows
from npllama.config.keys import Keys
from npllama.config.model_config import Experts

#: What earlier configurations of Phi-3 call longrope.
_PHI3_SYNONYMS = {"su": "longrope", "yarn": "longrope"}


def _llama(keys: Keys) -> dict[str, Any]:
    keys.must_be("sliding_window", [], "a Llama has none")
    bias = keys.flag("attention_bias")
    return {
        **read_decoder(keys),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "ffn_bias": keys.flag("mlp_bias"),
    }


def _mistral(keys: Keys) -> dict[str, Any]:
    return _with_windows(keys, read_decoder(keys))


def _phi3(keys: Keys) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        keys.must_be(key, [False], "Phi-3 has no biases")
    return _with_windows(keys, read_decoder(keys, _PHI3_SYNONYMS))


def _mixtral(keys: Keys) -> dict[str, Any]:
    values = _with_windows(keys, read_decoder(keys))
    experts = Experts(
        count=keys.integer("num_local_experts"),
        active=keys.integer("num_experts_per_tok"),
        hidden_dim=values["hidden_dim"],
        renormalise=True,
    )
    return {**values, "experts": experts}


def _with_windows(keys: Keys, values: dict[str, Any]) -> dict[str, Any]:
    """Add the sliding window that all layers have, or none."""
    sliding = range(values["n_layers"]) if keys.get("sliding_window") is not None else ()
    return {**values, "windows": windows(keys, values["n_layers"], frozenset(sliding))}


FAMILIES = {
    "llama": Family(_llama, {**DECODER_DEFAULTS, "max_position_embeddings": 2048}),
    "mistral": Family(
        _mistral,
        {**DECODER_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    ),
    "mixtral": Family(
        _mixtral,
        {
            **DECODER_DEFAULTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}),
    ),
    "phi3": Family(
        _phi3,
        {
            **DECODER_DEFAULTS,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        frozenset({"embd_pdrop", "resid_pdrop"}),
    ),
}
