"""What the families that grew from Llama have in common: RMSNorm, RoPE, grouped heads, a gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npllama.config.hf.rope import rope_settings
from npllama.config.keys import Keys

#: What an absent key stands for in most of these families.
DECODER_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}

#: Name in transformers -> name of the activation in a `ModelConfig`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_decoder(keys: Keys, rope_synonyms: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read what all of these families have.

    Parameters
    ----------
    keys : Keys
        The document.
    rope_synonyms : mapping of str to str, optional
        As for `rope_settings`.

    Returns
    -------
    dict
        Fields of a `ModelConfig`.
    """
    dim, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if n_heads < 1:
        raise keys.error("num_attention_heads", "a positive integer")
    context = keys.integer("max_position_embeddings")
    return {
        "dim": dim,
        "n_layers": keys.integer("num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": keys.integer("num_key_value_heads", n_heads),
        "head_dim": keys.integer("head_dim", dim // n_heads),
        "hidden_dim": keys.integer("intermediate_size"),
        "vocab_size": keys.integer("vocab_size"),
        "norm_eps": keys.number("rms_norm_eps"),
        **rope_settings(keys, context, rope_synonyms),
        "max_seq_len": context,
        "tied": keys.flag("tie_word_embeddings"),
        "activation": keys.choice("hidden_act", ACTIVATIONS),
    }


def windows(keys: Keys, n_layers: int, sliding: frozenset[int]) -> tuple[int, ...]:
    """Return the windows of all layers, of which the ``sliding`` ones have that of the document.

    A window that is as wide as the context hides nothing, and is none.
    """
    if not sliding:
        return ()
    window = keys.integer("sliding_window")
    if window < 1:
        raise keys.error("sliding_window", "a positive integer")
    if window >= keys.integer("max_position_embeddings"):
        return ()
    return tuple(window if i in sliding else 0 for i in range(n_layers))
