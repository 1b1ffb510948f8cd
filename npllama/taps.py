"""The named intermediate tensors of a forward pass: one table, and a recorder that holds the engine to it.

The same names serve the engine that emits them, the checker that compares them and the pages that show them.

Axis letters, here and in every shape comment: T new tokens, S all positions so far, D model width, H query heads,
K key/value heads, R = H / K, Dh head width, F feed-forward width, V vocabulary, L layers; in a mixture of experts E
experts, A of them asked for each token, Fe width of one, Fs width of the shared one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npllama.config import ModelConfig
from npllama.errors import TapError

Array: TypeAlias = NDArray[Any]
Tap: TypeAlias = Callable[[str, Array], Array]


@dataclass(frozen=True, slots=True)
class TapSpec:
    """What a tap holds.

    Attributes
    ----------
    name : str
        Full name; ``{i}`` stands for the layer.
    axes : tuple of str
        Axis letters of its shape.
    formula : str
        How it is computed, in the names of the other taps and weights.
    when : frozenset of str
        What a model must have for this tap to be in it: words of `ModelConfig.features`.
    """

    name: str
    axes: tuple[str, ...]
    formula: str
    when: frozenset[str]


# In the order of the forward pass. Queries and keys are in interleaved pairs; k and v are the new positions' only. The
# last column says which models have a tap, in the words of `ModelConfig.features`; "-" is for all.
_TABLE = """
tok_embeddings                 | T D    | tok_embeddings.weight[tokens]                                 | -
pos_embeddings                 | T D    | pos_embeddings.weight[positions]                              | learned
embeddings                     | T D    | tok_embeddings + pos_embeddings                               | learned
layers.{i}.attention_norm      | T D    | x / sqrt(mean(x²) + eps) * attention_norm.weight              | pre norm-rms
layers.{i}.attention_norm      | T D    | (x - mean(x)) / sqrt(var(x) + eps) * attention_norm.weight + attention_norm.bias | pre norm-layer
layers.{i}.q                   | T H Dh | attention_norm · wqᵀ                                          | -
layers.{i}.k                   | T K Dh | attention_norm · wkᵀ                                          | -
layers.{i}.v                   | T K Dh | attention_norm · wvᵀ                                          | -
layers.{i}.q_norm              | T H Dh | q / sqrt(mean(q²) + eps) * q_norm.weight                      | qk-norm
layers.{i}.k_norm              | T K Dh | k / sqrt(mean(k²) + eps) * k_norm.weight                      | qk-norm
layers.{i}.q_rope              | T H Dh | each pair of q turned by position * freqs                     | rope
layers.{i}.k_rope              | T K Dh | each pair of k turned by position * freqs                     | rope
layers.{i}.scores              | H T S  | q_rope · keysᵀ / sqrt(Dh), -inf where a key lies in the future or outside of the window | -
layers.{i}.probs               | H T S  | softmax(scores) along S                                       | -
layers.{i}.context             | T H Dh | probs · values                                                | -
layers.{i}.attention_out       | T D    | context · woᵀ                                                 | -
layers.{i}.attention_out_norm  | T D    | attention_out / sqrt(mean(attention_out²) + eps) * attention_norm.weight | output
layers.{i}.resid_mid           | T D    | x + attention_out                                             | -
layers.{i}.resid_mid_norm      | T D    | (x - mean(x)) / sqrt(var(x) + eps) * attention_norm.weight + attention_norm.bias, x = resid_mid | post
layers.{i}.ffn_norm            | T D    | resid_mid / sqrt(mean(resid_mid²) + eps) * ffn_norm.weight    | pre norm-rms
layers.{i}.ffn_norm            | T D    | (x - mean(x)) / sqrt(var(x) + eps) * ffn_norm.weight + ffn_norm.bias, x = resid_mid | pre norm-layer
layers.{i}.gate                | T F    | ffn_norm · w1ᵀ                                                | dense gated
layers.{i}.up                  | T F    | ffn_norm · w3ᵀ                                                | dense
layers.{i}.ffn_act             | T F    | silu(gate) * up                                               | dense
layers.{i}.router_logits       | T E    | ffn_norm · routerᵀ                                            | experts
layers.{i}.router_probs        | T E    | softmax(router_logits) along E                                | experts
layers.{i}.router_weights      | T E    | the A largest of router_probs (scaled to a sum of 1 or not), 0 elsewhere | experts
layers.{i}.expert_gate         | T A Fe | ffn_norm · w1ᵀ of each expert asked, in ascending order       | experts
layers.{i}.expert_up           | T A Fe | ffn_norm · w3ᵀ of each expert asked                           | experts
layers.{i}.expert_act          | T A Fe | silu(expert_gate) * expert_up                                 | experts
layers.{i}.expert_out          | T A D  | expert_act · w2ᵀ of each expert asked                         | experts
layers.{i}.shared_gate         | T Fs   | ffn_norm · shared.w1ᵀ                                         | shared
layers.{i}.shared_up           | T Fs   | ffn_norm · shared.w3ᵀ                                         | shared
layers.{i}.shared_act          | T Fs   | silu(shared_gate) * shared_up                                 | shared
layers.{i}.shared_weight       | T 1    | sigmoid(ffn_norm · shared.routerᵀ)                            | shared
layers.{i}.shared_out          | T D    | shared_act · shared.w2ᵀ * shared_weight                       | shared
layers.{i}.ffn_out             | T D    | ffn_act · w2ᵀ                                                 | dense
layers.{i}.ffn_out             | T D    | sum of router_weights * expert_out (+ shared_out)             | experts
layers.{i}.ffn_out_norm        | T D    | ffn_out / sqrt(mean(ffn_out²) + eps) * ffn_norm.weight        | output
layers.{i}.resid_post          | T D    | resid_mid + ffn_out                                           | -
layers.{i}.resid_post_norm     | T D    | (x - mean(x)) / sqrt(var(x) + eps) * ffn_norm.weight + ffn_norm.bias, x = resid_post | post
norm                           | T D    | x / sqrt(mean(x²) + eps) * norm.weight                        | final-norm
logits                         | T V    | norm · outputᵀ                                                | -
"""  # noqa: E501 - a table is read by its columns


def _parsed(line: str) -> TapSpec:
    name, axes, formula, when = (cell.strip() for cell in line.split("|"))
    return TapSpec(name, tuple(axes.split()), formula, frozenset(when.split()) - {"-"})


TAPS: tuple[TapSpec, ...] = tuple(_parsed(line) for line in _TABLE.strip().splitlines())


def model_taps(config: ModelConfig) -> Iterator[tuple[str, TapSpec]]:
    """Yield every tap of a model, in the order of its forward pass: full name, specification."""
    for per_layer, group in groupby(TAPS, key=lambda spec: "{i}" in spec.name):
        specs = list(group)
        for i in range(config.n_layers if per_layer else 1):
            features = config.features(i)
            yield from ((spec.name.format(i=i), spec) for spec in specs if spec.when <= features)


def tap_names(config: ModelConfig) -> list[str]:
    """Return the full name of every tap of a model, in the order of its forward pass."""
    return [name for name, _ in model_taps(config)]


def spec_of(name: str) -> TapSpec:
    """Look a full name up in the table, in a Llama's formula first; TapError if it is not there."""
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit():
        parts[1] = "{i}"
    general = ".".join(parts)
    for spec in TAPS:
        if spec.name == general:
            return spec
    raise TapError(f"no tap is called {name!r}", remedy="The names are in npllama.taps.TAPS.")


def untapped(name: str, x: Array) -> Array:
    """Pass a tensor on: the tap of a forward pass that nobody watches."""
    return x


def at_layer(tap: Tap, i: int) -> Tap:
    """Return a tap that puts ``layers.i.`` before each name."""
    if tap is untapped:
        return untapped
    return lambda name, x: tap(f"layers.{i}.{name}", x)


class Recorder:
    """Keeps copies of the tapped tensors, one dict for each forward call.

    Every tensor that passes, wanted or not, is checked against the table: shape in axis letters, and dtype. So a shape
    comment cannot rot and nothing turns into float64 unnoticed.

    Parameters
    ----------
    config : ModelConfig
        The model's: it fixes the lengths of all letters but T and S.
    pattern : str
        Shell-style pattern of full names, for example ``"layers.0.*"``.

    Attributes
    ----------
    steps : list of dict
        Tap name -> ndarray, for each forward call in order.
    """

    def __init__(self, config: ModelConfig, pattern: str = "*") -> None:
        if not any(fnmatchcase(name, pattern) for name in tap_names(config)):
            raise TapError(
                f"the pattern {pattern!r} matches no tap of a model with {config.n_layers} layers",
                remedy='Try "layers.0.*", "*.q_rope" or "logits".',
            )
        self._axes = {**config.axes, "1": 1}
        self._pattern = pattern
        self.steps: list[dict[str, Array]] = []

    def step(self, n_new: int, n_all: int, dtype: np.dtype[Any]) -> Tap:
        """Begin a forward call of ``n_new`` tokens (T) that ends at ``n_all`` positions (S); return its tap."""
        lengths = {**self._axes, "T": n_new, "S": n_all}
        kept: dict[str, Array] = {}
        self.steps.append(kept)

        def tap(name: str, x: Array) -> Array:
            spec = spec_of(name)
            shape = tuple(lengths[axis] for axis in spec.axes)
            # A forward pass that is asked for the last position only has one row of logits.
            if x.shape != shape and not (name in ("norm", "logits") and x.shape == (1, *shape[1:])):
                raise TapError(f"{name} has shape {x.shape}, expected {shape} ({' '.join(spec.axes)})")
            if x.dtype != dtype:
                raise TapError(f"{name} is {x.dtype}, expected {dtype}")
            if fnmatchcase(name, self._pattern):
                kept[name] = np.array(x)
            return x

        return tap

    def __getitem__(self, name: str) -> Array:
        """Return the tensor of the most recent forward call."""
        for kept in reversed(self.steps):
            if name in kept:
                return kept[name]
        spec_of(name)
        raise TapError(
            f"{name} was not recorded",
            remedy="Run the model inside the `with`; the fast backend fuses some taps away, numpy emits them all.",
        )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names recorded in the most recent forward call."""
        return iter(self.steps[-1] if self.steps else ())


class Recordable(Protocol):
    """A model whose forward pass can be watched."""

    recorder: Recorder | None

    @property
    def config(self) -> ModelConfig:
        """What the model is."""


@contextmanager
def record(model: Recordable, taps: str = "*") -> Iterator[Recorder]:
    """Watch a model's forward passes.

    Parameters
    ----------
    model : Model
        Any model that `npllama.load` returns.
    taps : str
        Shell-style pattern of tap names.

    Yields
    ------
    Recorder
        ``rec["layers.0.q_rope"]`` is the latest call's tensor, ``rec.steps[n]`` all those of call n.

    Examples
    --------
    >>> with npllama.record(model, taps="layers.0.*") as rec:  # doctest: +SKIP
    ...     model.forward(tokens)
    >>> rec["layers.0.q_rope"].shape  # doctest: +SKIP
    (5, 9, 64)
    """
    recorder = Recorder(model.config, taps)
    before, model.recorder = model.recorder, recorder
    try:
        yield recorder
    finally:
        model.recorder = before
