"""The numbers that define a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from npllama.errors import ConfigError

LARGEST_INTEGER = 1 << 24
LARGEST_NUMBER = 1e30  # far beyond any constant of a model, and products of two do not overflow
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
        if not isinstance(self.family, str) or not isinstance(self.tied, bool):
            raise ConfigError(f"family is {self.family!r} and tied is {self.tied!r}, expected a name and true or false")
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"):
            value, most = getattr(self, name), _MOST_LAYERS if name == "n_layers" else LARGEST_INTEGER
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
            0 < scaling.factor < math.inf
            and 0 < scaling.low_freq_factor < scaling.high_freq_factor < math.inf
            and 0 < scaling.original_max_seq_len < math.inf
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
            stretched = None if scaling is None else RopeScaling(**scaling)
            return model_config(file, **{**values, "rope_scaling": stretched})
        except TypeError as problem:
            raise ConfigError(f"a value has the wrong type: {problem}", file=file) from None


def model_config(file: str, **values: Any) -> ModelConfig:
    """Make a configuration; what is wrong with it is the file's fault."""
    try:
        return ModelConfig(**values)
    except ConfigError as problem:
        raise ConfigError(problem.message, file=file) from None
