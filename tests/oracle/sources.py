"""What the tests of the oracle share: loud models as sources of weights, recorded runs, and a measure of difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npllama.check.trace import MemoryTrace, TraceLike
from npllama.checkpoint.convert import convert
from npllama.checkpoint.rope import inverse_frequencies
from npllama.config import ModelConfig, RopeScaling
from npllama.dtypes import Array, Tensor, narrow
from tests.fixtures.loud import loud_config, loud_tensors, write_hf

#: Shapes that differ in what an implementation can get wrong.
SHAPES = {
    "grouped": loud_config(),
    "one key head for each query head": loud_config(n_kv_heads=4),
    "tied": loud_config(tied=True),
    "scaled frequencies": loud_config(rope_scaling=RopeScaling("llama3", 8.0)),
    "heads not D / H wide": loud_config(head_dim=24),
}


class Loud:
    """A loud model's weights in memory, as the oracle takes them."""

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        self.config = config
        self._tensors = {name: Tensor(narrow(values, dtype), dtype) for name, values in loud_tensors(config).items()}
        if config.tied:
            self._tensors["output.weight"] = self._tensors["tok_embeddings.weight"]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def rope_freqs(self) -> Any:
        return inverse_frequencies(self.config)


def loud_store(folder: Path, config: ModelConfig, dtype: str = "f32") -> Path:
    """Convert a loud model, without a tokenizer."""
    write_hf(folder / "hf", loud_tensors(config), config)
    convert(folder / "hf", folder / "store", dtype=dtype)
    return folder / "store"


def recorded(reference: Any, tokens: Sequence[int], prefill: int | None = None) -> MemoryTrace:
    """Run a reference over tokens and keep every tap."""
    from oracle.run import record

    first = len(tokens) if prefill is None else prefill
    trace = MemoryTrace(tokens=tokens, prefill=first, dtype=reference.dtype, config=reference.config)
    record(reference, tokens, trace, prefill=first)
    return trace


def nmse(found: Array, wanted: Array) -> float:
    """Squared error relative to the wanted tensor's square; infinities must be in the same places."""
    finite = np.isfinite(wanted)
    assert found.shape == wanted.shape
    assert (np.isfinite(found) == finite).all()
    found, wanted = found[finite].astype(np.float64), wanted[finite].astype(np.float64)
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def nmse_by_tap(found: TraceLike, wanted: TraceLike) -> dict[str, float]:
    """Largest `nmse` over steps and layers, by the tap's name without its layer; of the taps that ``found`` has."""
    worst: dict[str, float] = {}
    for entry in found.taps:
        name = entry.name.rpartition(".")[2]
        error = nmse(found.read(entry.name, entry.step), wanted.read(entry.name, entry.step))
        worst[name] = max(worst.get(name, 0.0), error)
    return worst
