"""The metadata of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from npllama.config.gguf_architectures import ARCHITECTURES, Mixture
from npllama.config.keys import Keys
from npllama.config.model_config import Experts, ModelConfig, RopeScaling, model_config
from npllama.errors import ConfigError, UnsupportedError

_SCALING_KINDS = ("none", "linear", "longrope")
_SOFTMAX = 1  # of the gating functions, ``llama_expert_gating_func_type`` in llama.cpp


def from_gguf(
    metadata: Mapping[str, Any],
    file: str,
    *,
    tied: bool,
    freq_factors: bool,
    biases: Iterable[str] = (),
    longrope: tuple[Sequence[float], Sequence[float]] | None = None,
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
    biases : iterable of str
        Fields of `ModelConfig` that name biases which the file has: no key speaks of them.
    longrope : pair of sequences of float, optional
        ``rope_factors_short.weight`` and ``rope_factors_long.weight``, Dh/2 numbers each.

    Notes
    -----
    Keys outside the architecture's own prefix (``general.``, ``tokenizer.``, ``quantize.`` ...) do not touch the
    forward pass. Raises as `from_params_json` does.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"general.architecture is {name!r}", file=file, remedy=f"Supported: {', '.join(ARCHITECTURES)}."
        )
    architecture = ARCHITECTURES[name]
    keys = _Section(metadata, file, f"{name}.")
    dim, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    if n_heads < 1:
        raise keys.error("attention.head_count", "a positive integer")
    head_dim = keys.integer("attention.key_length", dim // n_heads)
    keys.must_be("attention.value_length", [head_dim], "keys and values must have one width")
    keys.must_be("attention.causal", [True], "a token must not see what comes after it")
    keys.must_be("rope.dimension_count", [head_dim], "RoPE must turn whole heads")
    n_layers, hidden_dim = keys.integer("block_count"), keys.integer("feed_forward_length")
    context, theta = keys.integer("context_length"), keys.number("rope.freq_base", 10_000.0)
    scaling = _rope_scaling(keys, context, freq_factors, longrope)
    window = keys.integer("attention.sliding_window", 0)
    tokens = metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else None
    config = model_config(
        file,
        family=architecture.family,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=keys.integer("vocab_size", n_tokens),
        norm_eps=keys.number(architecture.epsilon),
        rope_theta=theta,
        rope_scaling=scaling,
        max_seq_len=context,
        tied=tied,
        windows=(window,) * n_layers if 0 != window < context else (),
        experts=_experts(keys, architecture.mixture, hidden_dim),
        **{**architecture.fields, **dict.fromkeys(biases, True)},
    )
    keys.finish()
    return config, tuple(_notes(config))


def _notes(config: ModelConfig) -> Iterable[str]:
    """Say what a person should know about a model."""
    if config.max_seq_len > 32_768 and config.rope_scaling is None and config.rope_theta == 500_000.0:
        yield "the context is that of Llama 3.1, but the file brings no rope_freqs.weight: frequencies are not scaled"
    if config.windows:
        yield (
            f"each position sees the last {config.windows[0]} only (attention.sliding_window); llama.cpp does not "
            "obey this key in files of this architecture"
        )


def nearest_decimal(value: float) -> float:
    """Return the decimal that a float32 was made from: the shortest one that rounds to it.

    GGUF files keep 1e-5 as the float32 9.99999974738e-06. A number that is no float32 is returned as it is.
    """
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


class _Section:
    """The keys under one architecture's prefix, named without it."""

    def __init__(self, metadata: Mapping[str, Any], file: str, prefix: str) -> None:
        self._keys = Keys(metadata, file)
        self._prefix = prefix
        self.file = file

    def error(self, key: str, wanted: str) -> ConfigError:
        return self._keys.error(self._prefix + key, wanted)

    def get(self, key: str) -> Any:
        return self._keys.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        return self._keys.integer(self._prefix + key, default)

    def number(self, key: str, default: float | None = None) -> float:
        return nearest_decimal(self._keys.number(self._prefix + key, default))

    def flag(self, key: str, default: bool) -> bool:
        return default if self.get(key) is None else self._keys.flag(self._prefix + key)

    def must_be(self, key: str, allowed: Iterable[Any], why: str) -> None:
        if isinstance(self.get(key), np.ndarray | list):
            raise self.error(key, "a single value")
        self._keys.must_be(self._prefix + key, allowed, why)

    def finish(self) -> None:
        harmless = frozenset({f"{self._prefix}rope.scaling.finetuned"})
        self._keys.finish(harmless, self._prefix)


def _rope_scaling(
    keys: _Section, context: int, freq_factors: bool, longrope: tuple[Sequence[float], Sequence[float]] | None
) -> RopeScaling | None:
    """Read how the frequencies are stretched; a file without a type means a linear factor, if it has one."""
    keys.must_be("rope.scaling.type", _SCALING_KINDS, "this kind of RoPE scaling is not supported")
    kind = keys.get("rope.scaling.type") or "linear"
    factor = keys.number("rope.scaling.factor", 1.0)
    original = keys.integer("rope.scaling.original_context_length", context)
    scalings = {
        "rope_freqs.weight": freq_factors,
        "rope_factors_short.weight and rope_factors_long.weight": longrope is not None,
        "rope.scaling.factor": kind == "linear" and factor != 1,
    }
    found = [name for name, there in scalings.items() if there]
    if len(found) > 1:
        raise UnsupportedError(f"RoPE is scaled twice, by {' and by '.join(found)}", file=keys.file)
    if longrope is not None:
        return _longrope(keys, context, original, longrope)
    if kind == "longrope":
        raise ConfigError(
            "RoPE is said to be scaled by longrope, but the file has neither rope_factors_short.weight nor "
            "rope_factors_long.weight",
            file=keys.file,
            remedy="Convert the model again.",
        )
    keys.must_be("rope.scaling.attn_factor", [1.0], "an attention factor needs the factors of longrope")
    if freq_factors:
        return RopeScaling("factors")
    return RopeScaling("linear", factor) if found else None


def _longrope(
    keys: _Section, context: int, original: int, factors: tuple[Sequence[float], Sequence[float]]
) -> RopeScaling:
    """Read a longrope scaling.

    Notes
    -----
    Cosines and sines are multiplied by ``sqrt(1 + ln(context / original) / ln(original))`` unless the file says
    otherwise (Ding et al., https://arxiv.org/abs/2402.13753). What it says is
    a float32: where that is the formula's result, rounded, the result is meant.
    """
    if original < 2:
        raise keys.error("rope.scaling.original_context_length", "a context of at least two tokens")
    ratio = max(context / original, 1.0)
    computed = math.sqrt(1 + math.log(ratio) / math.log(original))
    stated = keys.number("rope.scaling.attn_factor", computed)
    short, long = (tuple(nearest_decimal(float(factor)) for factor in each) for each in factors)
    return RopeScaling(
        "longrope",
        original_max_seq_len=original,
        short_factors=short,
        long_factors=long,
        attention_factor=computed if np.float32(stated) == np.float32(computed) else stated,
    )


def _experts(keys: _Section, mixture: Mixture | None, hidden_dim: int) -> Experts | None:
    """Read a mixture of experts; a file may say in so many words that it has none."""
    count = keys.integer("expert_count", 0)
    if mixture is None or count == 0:
        for key in ("expert_count", "expert_used_count"):
            keys.must_be(key, [0], "this architecture has no mixture of experts")
        return None
    keys.must_be("expert_gating_func", [_SOFTMAX], "the router's weights must be a softmax")
    keys.must_be("expert_weights_scale", [1.0], "the router's weights must not be scaled")
    return Experts(
        count=count,
        active=keys.integer("expert_used_count"),
        hidden_dim=keys.integer("expert_feed_forward_length") if mixture.own_width else hidden_dim,
        renormalise=keys.flag("expert_weights_norm", mixture.renormalise),
        shared_dim=keys.integer("expert_shared_feed_forward_length") if mixture.shared else 0,
    )
