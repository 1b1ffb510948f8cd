"""The numbers that define a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from npllama.errors import ConfigError

LARGEST_INTEGER = 1 << 24
LARGEST_NUMBER = 1e30  # far beyond any constant of a model, and products of two do not overflow
_MOST_LAYERS = 1 << 12  # tables of tensors are as long as the model is deep
#: What the words of a configuration may be.
_WORDS = {
    "norm": ("rms", "layer"),
    "norm_order": ("pre", "post", "output"),
    "qk_norm": ("none", "head", "projection"),
    "positions": ("rope", "learned"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
}
#: Fields of a RopeScaling that are always written.
_EVERY_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
_SCALING_KINDS = ("llama3", "linear", "factors", "longrope")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the RoPE frequencies were stretched for a longer context.

    Attributes
    ----------
    kind : str
        "llama3" (by wavelength), "linear" (all divided by ``factor``), "factors" (each divided by a number that the
        checkpoint brings as a tensor; ``factor`` is then 1), or "longrope" (each divided by a number out of two lists).
    factor : float
        The divisor of the longest wavelengths.
    low_freq_factor, high_freq_factor : float
        llama3: the band between original/low and original/high is blended.
    original_max_seq_len : int
        llama3, longrope: context that the frequencies were made for.
    short_factors, long_factors : tuple of float
        longrope: divisors of the Dh/2 frequencies for texts within the original context, and for longer ones.
    attention_factor : float
        longrope: multiplies cosines and sines.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def check(self) -> None:
        """Raise ConfigError if the numbers are no scaling."""
        if self.kind not in _SCALING_KINDS:
            raise ConfigError(f"the RoPE scaling is of kind {self.kind!r}, expected one of {_SCALING_KINDS}")
        numbers = (self.factor, self.attention_factor, *self.short_factors, *self.long_factors)
        if not (
            all(0 < number < math.inf for number in numbers)
            and 0 < self.low_freq_factor < self.high_freq_factor < math.inf
            and 0 < self.original_max_seq_len < math.inf
        ):
            raise ConfigError(f"the RoPE scaling {self} has factors that are not positive and in order")


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in the place of the feed-forward layer.

    Attributes
    ----------
    count, active : int
        E experts, of which A are asked for each token.
    hidden_dim : int
        Fe, width of one expert.
    renormalise : bool
        The weights of those that are asked are scaled to a sum of one.
    shared_dim : int
        Fs, width of the expert that is always asked, behind a gate of its own; 0 where there is none.
    dense_layers : tuple of int
        Layers that have an ordinary feed-forward layer instead.
    """

    count: int
    active: int
    hidden_dim: int
    renormalise: bool = True
    shared_dim: int = 0
    dense_layers: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise ConfigError if the numbers are no mixture of experts."""
        least = {"count": 1, "active": 1, "hidden_dim": 1, "shared_dim": 0}
        for name, smallest in least.items():
            _check_integer(f"experts.{name}", getattr(self, name), smallest, LARGEST_INTEGER)
        if self.active > self.count:
            raise ConfigError(f"{self.active} of {self.count} experts are said to be active")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and constants of a model. The fields with defaults are what not every family has; the defaults are Llama's.

    Attributes
    ----------
    family : str
        Architecture as its makers name it: "llama", "qwen2", "gpt2" ... A name, and nothing that is computed by.
    dim : int
        D, width of the residual stream.
    n_layers, n_heads, n_kv_heads : int
        L decoder layers, H query heads, K key/value heads (H is a multiple of K).
    head_dim : int
        Dh, width of one head; even where RoPE turns pairs.
    hidden_dim : int
        F, width of the feed-forward layer.
    vocab_size : int
        V, rows of the embedding.
    norm_eps : float
        Added to the mean square (RMSNorm) or to the variance (LayerNorm).
    rope_theta : float
        Base of the RoPE frequencies.
    rope_scaling : RopeScaling or None
        Stretching applied to them; None for a model without.
    max_seq_len : int
        Context that the model was trained for, in tokens; rows of the table of learned positions.
    tied : bool
        The output matrix is the embedding.
    norm : str
        "rms" (RMSNorm) or "layer" (LayerNorm, with bias).
    norm_order : str
        Where a norm stands: "pre" ``x + f(norm(x))``, "post" ``norm(x + f(x))``, "output" ``x + norm(f(x))``.
    final_norm : bool
        There is a norm before the output matrix.
    qkv_bias, attention_out_bias, ffn_bias, output_bias : bool
        The projections to queries, keys and values, the one behind attention, those of the feed-forward layer, and the
        output matrix have biases.
    qk_norm : str
        RMSNorm of queries and keys before RoPE: "none", over each "head" (Dh), or over the whole "projection" (H*Dh).
    positions : str
        "rope", or "learned": a table that is added to the embeddings.
    activation : str
        "silu", "gelu", "gelu_tanh" or "relu".
    gated : bool
        The feed-forward layer multiplies ``activation(gate) * up``; without, it is ``activation(up)``.
    score_dim : int or None
        Scores are divided by its square root; None for that of Dh.
    windows : tuple of int
        How many positions each layer sees, 0 for all; empty where every layer sees all.
    experts : Experts or None
        A mixture of experts.
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
    norm: str = "rms"
    norm_order: str = "pre"
    final_norm: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    ffn_bias: bool = False
    output_bias: bool = False
    qk_norm: str = "none"
    positions: str = "rope"
    activation: str = "silu"
    gated: bool = True
    score_dim: int | None = None
    windows: tuple[int, ...] = ()
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.family, str):
            raise ConfigError(f"family is {self.family!r}, expected a name")
        for entry in fields(self):
            if entry.type == "bool" and not isinstance(getattr(self, entry.name), bool):
                raise ConfigError(f"{entry.name} is {getattr(self, entry.name)!r}, expected true or false")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            _check_integer(name, getattr(self, name), 1, _MOST_LAYERS if name == "n_layers" else LARGEST_INTEGER)
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(words)}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2 and self.positions == "rope":
            raise ConfigError(f"head_dim is {self.head_dim}, expected an even number: RoPE turns pairs")
        if not 0 < self.norm_eps < 1:
            raise ConfigError(f"norm_eps is {self.norm_eps!r}, expected a small positive number")
        if not 0 < self.rope_theta < math.inf:
            raise ConfigError(f"rope_theta is {self.rope_theta!r}, expected a positive number")
        if self.experts is not None:
            self.experts.check()
        scaling = self.rope_scaling
        if scaling is not None:
            scaling.check()
        if scaling is not None and scaling.kind == "longrope":
            for factors in (scaling.short_factors, scaling.long_factors):
                if len(factors) != self.head_dim // 2:
                    raise ConfigError(f"longrope has {len(factors)} factors, expected Dh/2 = {self.head_dim // 2}")
        if self.score_dim is not None:
            _check_integer("score_dim", self.score_dim, 1, LARGEST_INTEGER)
        if len(self.windows) not in (0, self.n_layers):
            raise ConfigError(f"there are {len(self.windows)} windows for {self.n_layers} layers")
        for window in self.windows:
            _check_integer("a window", window, 0, LARGEST_INTEGER)

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer sees; None for all."""
        return self.windows[layer] or None if self.windows else None

    def is_long(self, n_positions: int) -> bool:
        """Tell whether a text of so many positions has the second of a longrope model's two sets of frequencies."""
        scaling = self.rope_scaling
        return scaling is not None and scaling.kind == "longrope" and n_positions > scaling.original_max_seq_len

    def features(self, layer: int = 0) -> frozenset[str]:
        """Name everything that decides which tensors a layer has, and which it computes.

        The words stand in the tables of `npllama.taps` and `npllama.checkpoint.names`.
        """
        experts = self.experts if self.experts and layer not in self.experts.dense_layers else None
        words = {
            f"norm-{self.norm}": True,
            self.norm_order: True,
            self.positions: True,
            "final-norm": self.final_norm,
            "qkv-bias": self.qkv_bias,
            "out-bias": self.attention_out_bias,
            "ffn-bias": self.ffn_bias,
            "output-bias": self.output_bias,
            "qk-norm": self.qk_norm != "none",
            f"qk-norm-{self.qk_norm}": True,
            "gated": self.gated,
            "dense": experts is None,
            "experts": experts is not None,
            "shared": experts is not None and experts.shared_dim > 0,
        }
        return frozenset(word for word, there in words.items() if there)

    def first_layers(self, count: int) -> ModelConfig:
        """Return the configuration of the model's first layers."""
        experts = self.experts
        if experts is not None:
            experts = replace(experts, dense_layers=tuple(i for i in experts.dense_layers if i < count))
        return replace(self, n_layers=count, windows=self.windows[:count], experts=experts)

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
            **({} if self.experts is None else self._expert_axes(self.experts)),
        }

    @staticmethod
    def _expert_axes(experts: Experts) -> dict[str, int]:
        return {"E": experts.count, "A": experts.active, "Fe": experts.hidden_dim, "Fs": experts.shared_dim}

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values; what a Llama does not have is left out where it is absent."""
        values = _without_defaults(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = _without_defaults(self.rope_scaling, keep=_EVERY_SCALING)
        if self.experts is not None:
            values["experts"] = _without_defaults(self.experts)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: str) -> ModelConfig:
        """Read what `to_json` wrote; a missing or unknown key is a ConfigError."""
        parts = {"rope_scaling": RopeScaling, "experts": Experts}
        made = {key: _made(kind, values[key], file) for key, kind in parts.items() if values.get(key) is not None}
        config: ModelConfig = _made(cls, {**values, **made}, file)
        return config


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}, expected an integer from {least} to {most}")


def _without_defaults(settings: Any, keep: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults, or have none; tuples as lists."""
    values = {entry.name: (getattr(settings, entry.name), entry.default) for entry in fields(settings)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, (value, default) in values.items()
        if value != default or name in keep
    }


def _made(kind: type, values: Any, file: str) -> Any:
    """Make a dataclass of what `_without_defaults` left of it; a missing or unknown key is a ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"a part of the config is {values!r}, expected an object", file=file)
    known = {entry.name: entry.default is MISSING for entry in fields(kind)}
    wrong = {name for name, needed in known.items() if needed and name not in values} | (set(values) - set(known))
    if wrong:
        raise ConfigError(f"the config has missing or unknown keys: {sorted(wrong)}", file=file)
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return kind(**arguments)
    except ConfigError as problem:
        raise ConfigError(problem.message, file=file) from None
    except TypeError as problem:
        raise ConfigError(f"a value has the wrong type: {problem}", file=file) from None


def model_config(file: str, **values: Any) -> ModelConfig:
    """Make a configuration; what is wrong with it is the file's fault."""
    try:
        return ModelConfig(**values)
    except ConfigError as problem:
        raise ConfigError(problem.message, file=file) from None
