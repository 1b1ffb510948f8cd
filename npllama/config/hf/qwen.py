"""Qwen 2 and 3, dense and as mixtures of experts."""

from __future__ import annotations

from typing import Any

from npllama.config.hf import Family
from npllama.config.hf.decoder import DECODER_DEFAULTS, read_decoder, windows
from npllama.config.keys import Keys
from npllama.config.model_config import Experts
from npllama.errors import ConfigError

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {**_dense(keys), "qkv_bias": True}


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {**_dense(keys), **_biases_and_norms_of_heads(keys)}


def _qwen2_moe(keys: Keys) -> dict[str, Any]:
    values = _decoder(keys)
    n_layers = values["n_layers"]
    # Unlike in the dense models: every other layer below the limit, from the first on.
    usual = range(0, min(keys.integer("max_window_layers"), n_layers), 2)
    return {
        **values,
        "windows": windows(keys, n_layers, _sliding_layers(keys, n_layers, usual)),
        "qkv_bias": keys.flag("qkv_bias"),
        "experts": _experts(keys, n_layers, keys.integer("shared_expert_intermediate_size")),
    }


def _qwen3_moe(keys: Keys) -> dict[str, Any]:
    values = _decoder(keys)
    n_layers = values["n_layers"]
    return {
        **values,
        "windows": windows(keys, n_layers, frozenset(range(n_layers) if _has_window(keys) else ())),
        **_biases_and_norms_of_heads(keys),
        "experts": _experts(keys, n_layers, shared_dim=0),
    }


def _decoder(keys: Keys) -> dict[str, Any]:
    keys.must_be("use_mrope", [False], "this is a model of images")
    return read_decoder(keys)


def _dense(keys: Keys) -> dict[str, Any]:
    values = _decoder(keys)
    n_layers = values["n_layers"]
    usual = range(keys.integer("max_window_layers"), n_layers)
    return {**values, "windows": windows(keys, n_layers, _sliding_layers(keys, n_layers, usual))}


def _biases_and_norms_of_heads(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "attention_out_bias": bias, "qk_norm": "head"}


def _has_window(keys: Keys) -> bool:
    window = keys.get("sliding_window")
    return keys.flag("use_sliding_window") and window is not None


def _sliding_layers(keys: Keys, n_layers: int, usual: range) -> frozenset[int]:
    """Return the layers with a window: those that the document lists, or else the usual ones."""
    used = _has_window(keys)
    kinds = keys.get("layer_types")
    if kinds is None:
        return frozenset(usual if used else ())
    if not isinstance(kinds, list) or len(kinds) != n_layers or not all(kind in (_FULL, _SLIDING) for kind in kinds):
        raise keys.error("layer_types", f"{n_layers} times {_FULL!r} or {_SLIDING!r}")
    sliding = frozenset(i for i, kind in enumerate(kinds) if kind == _SLIDING)
    if sliding and not used:
        raise ConfigError("layer_types has sliding layers, but no sliding window is in use", file=keys.file)
    return sliding


def _experts(keys: Keys, n_layers: int, shared_dim: int) -> Experts | None:
    """Read the mixture of experts; None where no layer has one."""
    # transformers has written the number of experts under either name.
    count = keys.integer("num_local_experts", keys.integer("num_experts"))
    step = keys.integer("decoder_sparse_step")
    if step < 1:
        raise keys.error("decoder_sparse_step", "a positive integer")
    only = keys.integers("mlp_only_layers")
    dense = tuple(i for i in range(n_layers) if i in only or (i + 1) % step)
    active, hidden_dim = keys.integer("num_experts_per_tok"), keys.integer("moe_intermediate_size")
    renormalise = keys.flag("norm_topk_prob")
    if count == 0 or len(dense) == n_layers:
        return None
    return Experts(count, active, hidden_dim, renormalise, shared_dim, dense)


_DENSE: dict[str, Any] = {
    **DECODER_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_SPARSE: dict[str, Any] = {**_DENSE, "decoder_sparse_step": 1, "norm_topk_prob": False, "mlp_only_layers": []}
_ROUTER_TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef"})

FAMILIES = {
    "qwen2": Family(_qwen2, _DENSE),
    "qwen3": Family(_qwen3, {**_DENSE, "head_dim": 128}),
    "qwen2_moe": Family(
        _qwen2_moe,
        {
            **_SPARSE,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "qkv_bias": True,
        },
        _ROUTER_TRAINING,
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        {
            **_SPARSE,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        _ROUTER_TRAINING | {"max_window_layers"},
    ),
}
