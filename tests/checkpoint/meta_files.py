"""Meta checkpoints of a loud model, in any number of shards, written without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.names import EMBEDDING, expected
from npllama.checkpoint.pth.meta import open_meta
from npllama.checkpoint.tensor import Checkpoint
from npllama.config import ModelConfig
from npllama.dtypes import STORAGE, Array
from npllama.errors import NpllamaError
from tests.checkpoint.archives import write_checkpoint
from tests.fixtures.loud import loud_config, loud_tensors, meta_params

CONFIG = loud_config()
WHOLE = loud_tensors(CONFIG)
WQ, WK, WO, NORM = (
    f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "attention.wo", "attention_norm")
)


def cut(name: str, whole: Array, shard: int, n_shards: int, embedding_axis: int = 0) -> Array:
    """One shard's part of a tensor."""
    axis = embedding_axis if name == EMBEDDING else expected(CONFIG)[name].shard_axis
    return whole if axis is None else np.ascontiguousarray(np.split(whole, n_shards, axis)[shard])


def write_shards(
    folder: Path, tensors: Mapping[str, Array] = WHOLE, n_shards: int = 1, *, embedding_axis: int = 0
) -> Path:
    for shard in range(n_shards):
        parts = {name: cut(name, whole, shard, n_shards, embedding_axis) for name, whole in tensors.items()}
        write_checkpoint(folder / f"consolidated.{shard:02d}.pth", parts)
    return write_params(folder)


def write_params(folder: Path, config: ModelConfig = CONFIG, **changes: Any) -> Path:
    (folder / "params.json").write_text(json.dumps({**meta_params(config), **changes}))
    return folder


def edit_shard(folder: Path, shard: int, n_shards: int, **changes: Array | None) -> None:
    """Write a shard again with some tensors changed, or left out (None); names have ``__`` for the dot."""
    parts: dict[str, Array | None] = {name: cut(name, whole, shard, n_shards) for name, whole in WHOLE.items()}
    parts.update({name.replace("__", "."): values for name, values in changes.items()})
    kept = {name: values for name, values in parts.items() if values is not None}
    write_checkpoint(folder / f"consolidated.{shard:02d}.pth", kept)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Checkpoint]:
    checkpoint = open_meta(path, **options)
    try:
        yield checkpoint
    finally:
        for source in checkpoint.sources:
            source.close()


def assert_reads(path: Path, tensors: Mapping[str, Array], *, rows: int = 7, **options: Any) -> None:
    """Every tensor, read in blocks of rows as a conversion reads it, has exactly these numbers."""
    with opened(path, **options) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        for name, ref in checkpoint.tensors.items():
            blocks = [ref.read_rows(start, min(start + rows, ref.n_rows)) for start in range(0, ref.n_rows, rows)]
            ref.verify()
            found = np.concatenate(blocks)
            assert found.dtype == STORAGE[ref.dtype]
            assert ref.shape == found.shape
            np.testing.assert_array_equal(found, tensors[name], err_msg=name)


def refused(path: Path, error: type[NpllamaError], words: str, **options: Any) -> NpllamaError:
    with pytest.raises(error, match=words) as caught:
        open_meta(path, **options)
    assert type(caught.value) is error
    return caught.value
