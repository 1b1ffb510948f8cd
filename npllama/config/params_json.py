"""Meta's ``params.json``."""

from __future__ import annotations

import math

from npllama.config.keys import Keys
from npllama.config.model_config import ModelConfig, RopeScaling, model_config
from npllama.errors import ConfigError, ParameterError, UnsupportedError
from npllama.strict_json import parse_object

_PARAMS_HARMLESS = frozenset({"max_batch_size", "model_parallel_size"})
_PARAMS_UNSUPPORTED = {
    "lora_args": "a LoRA fine-tune",
    "quantization_args": "a quantised release",
    "vision_chunk_size": "a vision model",
    "vision_max_num_chunks": "a vision model",
    "vision_num_cross_attention_layers": "a vision model",
    "moe_args": "a mixture of experts",
}
#: (dim, n_layers) of the models whose frequencies were stretched by 32; every other scaled Llama 3 uses 8. Meta's
#: params.json does not say, and Meta's reference code uses 8 for all (meta-llama/llama-models issues 166 and 241).
_ROPE_FACTOR_32 = frozenset({(2048, 16), (3072, 28)})


def from_params_json(
    text: bytes, file: str, *, rope_factor: float | None = None, vocab_size: int | None = None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Read Meta's ``params.json`` (Llama 1, 2, 3, 3.1, 3.2, 3.3).

    Parameters
    ----------
    text : bytes
        The document; the values may be nested under ``"model"``.
    file : str
        Its name, for messages.
    rope_factor : float, optional
        Overrides the assumed RoPE scaling factor of a model with ``use_scaled_rope``.
    vocab_size : int, optional
        Rows of the embedding, for files that say -1.

    Returns
    -------
    config : ModelConfig
    notes : tuple of str
        Assumptions that the file left open.

    Raises
    ------
    ConfigError
        Missing, unknown, mistyped or impossible values.
    UnsupportedError
        A release that is not a plain Llama.
    ParameterError
        ``rope_factor`` for a model whose frequencies are not scaled.

    Notes
    -----
    The feed-forward width is ``multiple_of * ceil(int(ffn_dim_multiplier * int(8 * dim / 3)) / multiple_of)``, as in
    https://github.com/meta-llama/llama3/blob/a0940f9cf7065d45bb6675660f80d305c041a754/llama/model.py#L197-L207.
    """
    values = parse_object(text, error=ConfigError, file=file)
    if isinstance(values.get("model"), dict):
        values = values["model"]
    for key, what in _PARAMS_UNSUPPORTED.items():
        if values.get(key) is not None:
            raise UnsupportedError(f"{key} is set: {what} is not supported", file=file)
    keys = Keys(values, file)
    notes: list[str] = []
    dim, n_layers, n_heads = keys.integer("dim"), keys.integer("n_layers"), keys.integer("n_heads")
    declared = keys.integer("vocab_size", -1)
    vocab = declared if declared != -1 or vocab_size is None else vocab_size
    if keys.get("rope_theta") is None and vocab >= 128_000:
        raise keys.error("rope_theta", "a number: a Llama 3 model needs it")
    theta = keys.number("rope_theta", 10_000.0)
    eps = keys.number("norm_eps")
    multiple = keys.integer("multiple_of")
    if multiple < 1 or n_heads < 1:
        raise keys.error("multiple_of" if multiple < 1 else "n_heads", "a positive integer")
    hidden = int(2 * (4 * dim) / 3)
    if keys.get("ffn_dim_multiplier") is not None:
        hidden = int(keys.number("ffn_dim_multiplier") * hidden)
    hidden = multiple * -(-hidden // multiple)
    scaled = keys.flag("use_scaled_rope")
    scaling = None
    if scaled:
        factor = rope_factor
        if factor is None:
            factor = 32.0 if (dim, n_layers) in _ROPE_FACTOR_32 else 8.0
        elif not 0 < factor < math.inf:
            raise ParameterError(f"the RoPE factor is {factor!r}, expected a positive number")
        scaling = RopeScaling("llama3", factor)
        origin = "as asked" if rope_factor is not None else "by the model's shape; params.json does not say"
        notes.append(f"RoPE frequencies scaled by {factor:g} ({origin})")
    elif rope_factor is not None:
        raise ParameterError("a RoPE factor was given, but params.json has no use_scaled_rope", file=file)
    if dim % n_heads:
        raise ConfigError(f"dim {dim} is not a multiple of n_heads {n_heads}", file=file)
    context = keys.integer("max_seq_len", _params_context(scaled, theta, eps))
    if keys.get("max_seq_len") is None:
        notes.append(f"context of {context} tokens assumed; params.json does not say")
    config = model_config(
        file,
        family="llama",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("n_kv_heads", n_heads),
        head_dim=dim // n_heads,
        hidden_dim=hidden,
        vocab_size=vocab,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=context,
        tied=False,
    )
    keys.finish(_PARAMS_HARMLESS)
    return config, tuple(notes)


def _params_context(scaled: bool, theta: float, eps: float) -> int:
    """Trained context of the Llama generation that these constants belong to."""
    if scaled:
        return 131_072
    if theta > 10_000:
        return 8192
    return 2048 if eps < 5e-6 else 4096
