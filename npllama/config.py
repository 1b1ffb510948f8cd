"""The numbers that define a model, and the strict readers that find them in a checkpoint's own metadata.

A key that is neither understood nor known to be harmless is an error: a model that runs with a setting ignored gives
fluent, wrong text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from npllama.errors import ConfigError, ParameterError, UnsupportedError
from npllama.strict_json import parse_object

_LARGEST = 1 << 24
_LARGEST_NUMBER = 1e30  # far beyond any constant of a model, and products of two do not overflow
_MOST_LAYERS = 1 << 12  # tables of tensors are as long as the model is deep
_SCALING_KINDS = ("llama3", "linear", "factors")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the RoPE frequencies were stretched for a longer context.

    Attributes
    ----------
    kind : str
        "llama3" (by wavelength), "linear" (all divided by ``factor``), or "factors" (each divided by a number that
        the checkpoint brings as a tensor; ``factor`` is then 1).
    factor : float
        The divisor of the longest wavelengths.
    low_freq_factor, high_freq_factor : float
        llama3: the band between original/low and original/high is blended.
    original_max_seq_len : int
        llama3: context that the frequencies were made for.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a model.

    Attributes
    ----------
    family : str
        Architecture as its makers name it: "llama" or "mistral".
    dim : int
        D, width of the residual stream.
    n_layers, n_heads, n_kv_heads : int
        L decoder layers, H query heads, K key/value heads (H is a multiple of K).
    head_dim : int
        Dh, width of one head; even, since RoPE turns pairs.
    hidden_dim : int
        F, width of the feed-forward layer.
    vocab_size : int
        V, rows of the embedding.
    norm_eps : float
        Added to the mean square in RMSNorm.
    rope_theta : float
        Base of the RoPE frequencies.
    rope_scaling : RopeScaling or None
        Stretching applied to them; None for a model without.
    max_seq_len : int
        Context that the model was trained for, in tokens.
    tied : bool
        The output matrix is the embedding.
    """

    family: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_seq_len: int
    tied: bool

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            value, most = getattr(self, name), _MOST_LAYERS if name == "n_layers" else _LARGEST
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{name} is {value!r}, expected an integer from 1 to {most}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, expected an even number: RoPE turns pairs")
        if not 0 < self.norm_eps < 1:
            raise ConfigError(f"norm_eps is {self.norm_eps!r}, expected a small positive number")
        if not 0 < self.rope_theta < math.inf:
            raise ConfigError(f"rope_theta is {self.rope_theta!r}, expected a positive number")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind not in _SCALING_KINDS:
            raise ConfigError(f"the RoPE scaling is of kind {scaling.kind!r}, expected one of {_SCALING_KINDS}")
        if scaling is not None and not (
            0 < scaling.factor < math.inf and 0 < scaling.low_freq_factor < scaling.high_freq_factor
        ):
            raise ConfigError(f"the RoPE scaling {scaling} has factors that are not positive and in order")

    @property
    def axes(self) -> dict[str, int]:
        """Lengths of the axis letters that a model fixes; T and S are the caller's."""
        return {
            "L": self.n_layers,
            "D": self.dim,
            "H": self.n_heads,
            "K": self.n_kv_heads,
            "Dh": self.head_dim,
            "F": self.hidden_dim,
            "V": self.vocab_size,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: str) -> ModelConfig:
        """Read what `to_json` wrote; a missing or unknown key is a ConfigError."""
        names = {entry.name for entry in fields(cls)}
        if set(values) != names:
            raise ConfigError(
                f"the config has missing or unknown keys: {sorted(names.symmetric_difference(values))}", file=file
            )
        scaling = values["rope_scaling"]
        try:
            return cls(**{**values, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})
        except TypeError as problem:
            raise ConfigError(f"a value has the wrong type: {problem}", file=file) from None


class _Keys:
    """Typed access to a metadata mapping that remembers which keys were understood."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self._values = values
        self._file = file
        self._used: set[str] = set()

    def error(self, key: str, wanted: str) -> ConfigError:
        found = f"is {self._values[key]!r}"[:80] if key in self._values else "is missing"
        return ConfigError(f"{key} {found}, expected {wanted}", file=self._file)

    def get(self, key: str, default: Any = None) -> Any:
        self._used.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
            raise self.error(key, f"an integer of at most {_LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_NUMBER:
            raise self.error(key, "a number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def must_be(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Accept an absent key or one of the allowed values; anything else is a model that npllama would get wrong."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedError(f"{key} is {value!r}: {why}", file=self._file)

    def finish(self, harmless: frozenset[str], prefix: str = "") -> None:
        unknown = sorted(
            key for key in self._values if key.startswith(prefix) and key not in self._used and key not in harmless
        )
        if unknown:
            raise ConfigError(
                f"unknown keys that could change the numbers: {', '.join(unknown[:8])}",
                file=self._file,
                remedy="This model has a feature that npllama does not know.",
            )


def _model_config(file: str, **values: Any) -> ModelConfig:
    """Make a configuration; what is wrong with it is the file's fault."""
    try:
        return ModelConfig(**values)
    except ConfigError as problem:
        raise ConfigError(problem.message, file=file) from None


# --- Meta's params.json --------------------------------------------------------------------------------------------

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
    keys = _Keys(values, file)
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
    config = _model_config(
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


# --- Hugging Face config.json --------------------------------------------------------------------------------------

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
    keys = _Keys(parse_object(text, error=ConfigError, file=file), file)
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
    theta = _Keys(merged, file).number("rope_theta")
    config = _model_config(
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
    keys = _Keys(values, file)
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


# --- GGUF metadata -------------------------------------------------------------------------------------------------

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
    keys = _Keys(metadata, file)
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
    config = _model_config(
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
