"""A checkpoint of a few hundred numbers that lies in memory, for tests of what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npllama.checkpoint.names import expected
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.config import ModelConfig
from npllama.dtypes import STORAGE, Array, narrow

CONFIG = ModelConfig(
    family="llama",
    dim=8,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=2,
    hidden_dim=12,
    vocab_size=16,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    max_seq_len=64,
    tied=False,
)
TOKENIZER = {"tokenizer.json": b'{"model": "tiny"}', "tokenizer_config.json": b"{}"}


def stored(config: ModelConfig = CONFIG, dtype: str = "float32", seed: int = 0) -> dict[str, Array]:
    """Return canonical name -> stored values (bfloat16 as bit patterns), none alike."""
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=entry.shape).astype(np.float32) for name, entry in expected(config).items()}
    if dtype == "bfloat16":
        return {name: narrow(array, dtype) for name, array in values.items()}
    return {name: array.astype(STORAGE[dtype]) for name, array in values.items()}


def ref(name: str, values: Array, dtype: str = "float32", **changes: Any) -> TensorRef:
    """Return a tensor that reads an array."""

    def read_rows(start: int, stop: int) -> Array:
        return values[start:stop].copy()

    return replace(
        TensorRef(name, values.shape, dtype, f"memory:{name}", read_rows, values.nbytes),
        **changes,
    )


def checkpoint(
    values: Mapping[str, Array] | None = None, *, config: ModelConfig = CONFIG, dtype: str = "float32", **changes: Any
) -> Checkpoint:
    """Return a checkpoint of `stored` values, or of others of the same dtype."""
    arrays = stored(config, dtype) if values is None else values
    tensors = {name: ref(name, array, dtype) for name, array in arrays.items()}
    made = Checkpoint("meta", "memory", config, tensors, tokenizer=TOKENIZER, notes=("made up",))
    return replace(made, **changes)


def tree(folder: Path) -> dict[str, bytes]:
    """Return path -> content of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if not path.is_dir()}
