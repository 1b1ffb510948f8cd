"""The named intermediate tensors of a forward pass: one table, and a recorder that holds the engine to it.

The same names serve the engine that emits them, the checker that compares them and the pages that show them.

Axis letters, here and in every shape comment: T new tokens, S all positions so far, D model width, H query heads,
K key/value heads, R = H / K, Dh head width, F feed-forward width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

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
    """

    name: str
    axes: tuple[str, ...]
    formula: str


# In the order of the forward pass. Queries and keys are in interleaved pairs; k and v are the new positions' only.
_TABLE = """
tok_embeddings             | T D    | tok_embeddings.weight[tokens]
layers.{i}.attention_norm  | T D    | x / sqrt(mean(x²) + eps) * attention_norm.weight
layers.{i}.q               | T H Dh | attention_norm · wqᵀ
layers.{i}.k               | T K Dh | attention_norm · wkᵀ
layers.{i}.v               | T K Dh | attention_norm · wvᵀ
layers.{i}.q_rope          | T H Dh | each pair of q turned by position * freqs
layers.{i}.k_rope          | T K Dh | each pair of k turned by position * freqs
layers.{i}.scores          | H T S  | q_rope · keysᵀ / sqrt(Dh), -inf where a key lies in the future
layers.{i}.probs           | H T S  | softmax(scores) along S
layers.{i}.context         | T H Dh | probs · values
layers.{i}.attention_out   | T D    | context · woᵀ
layers.{i}.resid_mid       | T D    | x + attention_out
layers.{i}.ffn_norm        | T D    | resid_mid / sqrt(mean(resid_mid²) + eps) * ffn_norm.weight
layers.{i}.gate            | T F    | ffn_norm · w1ᵀ
layers.{i}.up              | T F    | ffn_norm · w3ᵀ
layers.{i}.ffn_act         | T F    | silu(gate) * up
layers.{i}.ffn_out         | T D    | ffn_act · w2ᵀ
layers.{i}.resid_post      | T D    | resid_mid + ffn_out
norm                       | T D    | x / sqrt(mean(x²) + eps) * norm.weight
logits                     | T V    | norm · outputᵀ
"""

TAPS: tuple[TapSpec, ...] = tuple(
    TapSpec(name, tuple(axes.split()), formula)
    for name, axes, formula in ([cell.strip() for cell in line.split("|")] for line in _TABLE.strip().splitlines())
)


def tap_names(n_layers: int) -> list[str]:
    """Return every tap's full name, in the order of the forward pass."""
    head, *layer, norm, logits = TAPS
    names = [head.name]
    names += [spec.name.format(i=i) for i in range(n_layers) for spec in layer]
    return [*names, norm.name, logits.name]


def spec_of(name: str) -> TapSpec:
    """Look a full name up in the table; TapError if it is not there."""
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
    axes : mapping of str to int
        Lengths of the letters that the model fixes (all but T and S).
    n_layers : int
        L.
    pattern : str
        Shell-style pattern of full names, for example ``"layers.0.*"``.

    Attributes
    ----------
    steps : list of dict
        Tap name -> ndarray, for each forward call in order.
    """

    def __init__(self, axes: Mapping[str, int], n_layers: int, pattern: str = "*") -> None:
        if not any(fnmatchcase(name, pattern) for name in tap_names(n_layers)):
            raise TapError(
                f"the pattern {pattern!r} matches no tap of a model with {n_layers} layers",
                remedy='Try "layers.0.*", "*.q_rope" or "logits".',
            )
        self._axes = dict(axes)
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
    def axes(self) -> Mapping[str, int]:
        """Lengths of the axis letters, L included."""


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
    recorder = Recorder(model.axes, model.axes["L"], taps)
    before, model.recorder = model.recorder, recorder
    try:
        yield recorder
    finally:
        model.recorder = before
