"""GPT-1 and GPT-2."""

from __future__ import annotations

from typing import Any

from npllama.config.hf import Family
from npllama.config.hf.decoder import ACTIVATIONS
from npllama.config.keys import Keys

#: GPT-1's own names of activations: its "gelu" is the form with tanh.
_GPT1_ACTIVATIONS = {**ACTIVATIONS, "gelu": "gelu_tanh"}


def _gpt(keys: Keys) -> dict[str, Any]:
    """Read what both have: LayerNorm, learned positions, biases everywhere, as many key heads as query heads."""
    dim, n_heads = keys.integer("n_embd"), keys.integer("n_head")
    if n_heads < 1 or dim % n_heads:
        raise keys.error("n_head", f"a divisor of n_embd {dim}")
    return {
        "dim": dim,
        "n_layers": keys.integer("n_layer"),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": dim // n_heads,
        "hidden_dim": 4 * dim,
        "vocab_size": keys.integer("vocab_size"),
        "norm_eps": keys.number("layer_norm_epsilon"),
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "max_seq_len": keys.integer("n_positions"),
        "tied": keys.flag("tie_word_embeddings"),
        "norm": "layer",
        "qkv_bias": True,
        "attention_out_bias": True,
        "ffn_bias": True,
        "positions": "learned",
        "gated": False,
    }


def _gpt1(keys: Keys) -> dict[str, Any]:
    activation = keys.choice("afn", _GPT1_ACTIVATIONS)
    return {**_gpt(keys), "norm_order": "post", "final_norm": False, "activation": activation}


def _gpt2(keys: Keys) -> dict[str, Any]:
    keys.must_be("scale_attn_weights", [True], "scores must be divided by the root of the head's width")
    keys.must_be("scale_attn_by_inverse_layer_idx", [False], "scores must be scaled alike in all layers")
    keys.must_be("add_cross_attention", [False], "this is half of a model with an encoder")
    values = _gpt(keys)
    return {
        **values,
        "hidden_dim": keys.integer("n_inner", values["hidden_dim"]),
        "activation": keys.choice("activation_function", ACTIVATIONS),
    }


_DEFAULTS = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
_HARMLESS = frozenset(
    """
    attn_pdrop embd_pdrop n_ctx n_special predict_special_tokens resid_pdrop summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj _num_labels
    """.split()
)

FAMILIES = {
    "gpt2": Family(
        _gpt2,
        {**_DEFAULTS, "n_positions": 1024, "activation_function": "gelu_new"},
        # The order of two multiplications, and a dtype that is wider than the others.
        _HARMLESS | {"reorder_and_upcast_attn"},
    ),
    "openai-gpt": Family(_gpt1, {**_DEFAULTS, "n_positions": 512, "afn": "gelu"}, _HARMLESS),
}
