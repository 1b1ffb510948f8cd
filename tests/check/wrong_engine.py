"""An engine built wrong on purpose: from other files, other constants, other operations, another block or cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from npllama import ops
from npllama.cache import KVCache
from npllama.config import ModelConfig
from npllama.dtypes import Array, Tensor, narrow
from npllama.engine import Model
from npllama.kernels.paths import twins
from npllama.rounding import with_rounded_inputs
from npllama.taps import Recorder, Tap
from npllama.weights import gather_weights
from tests.fixtures.engine import FAST
from tests.fixtures.loud import loud_tensors


@dataclass(frozen=True, slots=True)
class Build:
    """What an engine is built from."""

    config: ModelConfig
    tensors: Mapping[str, Array]
    backend: str = "numpy"
    dtype: str = "float32"
    #: What the inputs of products are rounded to.
    activations: str = "float32"
    #: Replaced operations.
    ops: Mapping[str, Callable[..., Any]] | None = None
    freqs: Array | None = None
    #: Those of texts beyond the original context.
    freqs_long: Array | None = None
    #: ``block(*arguments of npllama.model.block)``, instead of the engine's.
    block: Callable[..., Array] | None = None
    #: Changes the tokens of the first forward call.
    prompt: Callable[[Array], Array] | None = None
    cache: Callable[[ModelConfig, int], KVCache] = KVCache
    #: Called before every forward call.
    before: Callable[[KVCache], None] | None = None

    def with_tensors(self, change: Callable[[str, Array], Array]) -> Build:
        return replace(self, tensors={name: change(name, values) for name, values in self.tensors.items()})

    def with_ops(self, **functions: Callable[..., Any]) -> Build:
        return replace(self, ops={**(self.ops or {}), **functions})

    @property
    def base(self) -> SimpleNamespace:
        """The operations of the backend."""
        rounds = self.activations != "float32"
        if self.backend == "fast":
            return FAST if not rounds else SimpleNamespace(**{**vars(ops), **twins(None, self.activations)})
        return with_rounded_inputs(ops, self.activations) if rounds else SimpleNamespace(**vars(ops))

    def model(self) -> WrongModel:
        stored = {name: Tensor(narrow(array, self.dtype), self.dtype) for name, array in self.tensors.items()}
        stored.setdefault("output.weight", stored["tok_embeddings.weight"])
        freqs, long = frequencies(self.config), frequencies(self.config, long=True)
        freqs = freqs if self.freqs is None else self.freqs
        long = long if self.freqs_long is None else self.freqs_long
        weights = gather_weights(self.config, stored.get, freqs, long)
        namespace = SimpleNamespace(**{**vars(self.base), **(self.ops or {})})
        return WrongModel(self, Model(self.config, weights, namespace, backend=self.backend))


class WrongModel(Model):
    """An engine with a mistake in it; see `Build`."""

    def __init__(self, build: Build, model: Model, *, rounds_to: str = "") -> None:
        super().__init__(model.config, model.weights, model._ops, backend=model.backend)
        self._build = build
        self._rounds_to = rounds_to

    def rounding(self, dtype: str) -> WrongModel:
        """Return the same engine with every tapped tensor rounded to a dtype."""
        return WrongModel(self._build, self, rounds_to=dtype)

    def new_cache(self, capacity: int) -> KVCache:
        return self._build.cache(self.config, capacity + 1)

    def forward(self, tokens: Any, cache: KVCache | None = None, *, last: bool = False) -> Array:
        assert cache is not None
        if self._build.prompt is not None and cache.length == 0:
            tokens = self._build.prompt(np.asarray(tokens))
        if self._build.before is not None:
            self._build.before(cache)
        watched, self.recorder = self.recorder, self.recorder and _Rounding(self.recorder, self._rounds_to)
        try:
            if self._build.block is None:
                return super().forward(tokens, cache, last=last)
            with mock.patch("npllama.model.block", self._build.block):
                return super().forward(tokens, cache, last=last)
        finally:
            self.recorder = watched


class _Rounding:
    """A recorder that is shown rounded tensors."""

    def __init__(self, recorder: Recorder, dtype: str) -> None:
        self._recorder = recorder
        self._dtype = np.dtype(getattr(ml_dtypes, dtype)) if dtype else np.dtype(np.float32)

    def step(self, n_new: int, n_all: int, dtype: np.dtype[Any]) -> Tap:
        tap = self._recorder.step(n_new, n_all, dtype)
        return lambda name, x: tap(name, x.astype(self._dtype).astype(x.dtype))


def build(
    config: ModelConfig,
    *,
    backend: str = "numpy",
    dtype: str = "float32",
    activations: str = "float32",
    seed: int = 0,
) -> Build:
    """Return a loud engine's parts, without a mistake; the weights are numbers that the dtype has."""
    values = loud_tensors(config, seed)
    exact = {name: Tensor(narrow(x, dtype), dtype).numbers() for name, x in values.items()}
    return Build(config, exact, backend, dtype, activations)


def frequencies(config: ModelConfig, *, long: bool = False) -> Array | None:
    """Radians per position for each pair, one by one as Meta's code goes through them, in float64, rounded once.

    None without RoPE, and where there are none for long texts.
    """
    found = []
    scaling = config.rope_scaling
    two_sets = scaling is not None and scaling.kind == "longrope"
    if config.positions != "rope" or (long and not two_sets):
        return None
    for j in range(0, config.head_dim, 2):
        freq = config.rope_theta ** (-(j / 2) / (config.head_dim / 2))
        if scaling is not None and two_sets:
            freq /= float(np.float32((scaling.long_factors if long else scaling.short_factors)[j // 2]))
        elif scaling is not None:
            wavelength = 2 * math.pi / freq
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            if wavelength > scaling.original_max_seq_len / low:
                freq = freq / scaling.factor
            elif wavelength >= scaling.original_max_seq_len / high:
                smooth = (scaling.original_max_seq_len / wavelength - low) / (high - low)
                freq = (1 - smooth) * freq / scaling.factor + smooth * freq
        found.append(freq)
    return np.array(found).astype(np.float32)
