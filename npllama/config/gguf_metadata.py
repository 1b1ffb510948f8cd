"""The metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npllama.config.keys import Keys
from npllama.config.model_config import ModelConfig, RopeScaling, model_config
from npllama.errors import UnsupportedError

_GGUF_FAMILIES = ("llama",)


def from_gguf(
    metadata: Mapping[str, Any], file: str, *, tied: bool, freq_factors: bool
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read the metadata of a GGUF file.

    Parameters
    ----------
    metadata : mapping
        Key -> value, as the file has them.
    file : str
        Its name, for messages.
    tied : bool
        The file has no ``output.weight``.
    freq_factors : bool
        The file has ``rope_freqs.weight``, which says all about the scaling of a Llama 3.1 model.

    Notes
    -----
    Keys outside the architecture's own prefix (``general.``, ``tokenizer.``, ``quantize.`` ...) do not touch the
    forward pass. Raises as `from_params_json` does.
    """
    family = metadata.get("general.architecture")
    if family not in _GGUF_FAMILIES:
        raise UnsupportedError(
            f"general.architecture is {family!r}", file=file, remedy=f"Supported: {', '.join(_GGUF_FAMILIES)}."
        )
    keys = Keys(metadata, file)
    prefix = f"{family}."

    def key(name: str) -> str:
        return prefix + name

    dim, n_heads = keys.integer(key("embedding_length")), keys.integer(key("attention.head_count"))
    if n_heads < 1:
        raise keys.error(key("attention.head_count"), "a positive integer")
    head_dim = keys.integer(key("attention.key_length"), dim // n_heads)
    keys.must_be(key("attention.value_length"), [head_dim], "keys and values must have one width")
    keys.must_be(key("rope.dimension_count"), [head_dim], "RoPE must turn whole heads")
    keys.must_be(key("expert_count"), [0], "a mixture of experts")
    keys.must_be(key("expert_used_count"), [0], "a mixture of experts")
    keys.must_be(key("rope.scaling.attn_factor"), [1.0], "attention factors are not supported")
    keys.must_be(key("rope.scaling.type"), ["none", "linear"], "this kind of RoPE scaling is not supported")
    scaling = None
    if freq_factors:
        scaling = RopeScaling("factors")
    elif keys.get(key("rope.scaling.type")) == "linear":
        scaling = RopeScaling("linear", keys.number(key("rope.scaling.factor")))
    keys.get(key("rope.scaling.factor"))
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = keys.integer(key("vocab_size"), len(tokens) if tokens is not None else None)
    context = keys.integer(key("context_length"))
    notes: list[str] = []
    if context > 32_768 and scaling is None and keys.number(key("rope.freq_base"), 10_000.0) == 500_000.0:
        notes.append(
            "the context is that of Llama 3.1, but the file brings no rope_freqs.weight: frequencies are not scaled"
        )
    config = model_config(
        file,
        family=family,
        dim=dim,
        n_layers=keys.integer(key("block_count")),
        n_heads=n_heads,
        n_kv_heads=keys.integer(key("attention.head_count_kv"), n_heads),
        head_dim=head_dim,
        hidden_dim=keys.integer(key("feed_forward_length")),
        vocab_size=vocab,
        norm_eps=keys.number(key("attention.layer_norm_rms_epsilon")),
        rope_theta=keys.number(key("rope.freq_base"), 10_000.0),
        rope_scaling=scaling,
        max_seq_len=context,
        tied=tied,
    )
    harmless = frozenset({key("rope.scaling.original_context_length"), key("rope.scaling.finetuned")})
    keys.finish(harmless, prefix)
    return config, tuple(notes)
