"""`npllama inspect`: what is in a converted model, or in a checkpoint before conversion."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from npllama.checkpoint.open import open_checkpoint
from npllama.checkpoint.source import is_remote
from npllama.checkpoint.store import PARTIAL, Store, manifest
from npllama.commands.console import human, print_json, print_table
from npllama.config import ModelConfig


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Contents:
    kind: str
    config: ModelConfig
    tensors: tuple[_Tensor, ...]
    tokenizer: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors if tensor.name != manifest.ROPE_FREQS)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtypes(self) -> dict[str, dict[str, int]]:
        """Dtype -> how many tensors and bytes."""
        tensors: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for tensor in self.tensors:
            tensors[tensor.dtype] += 1
            nbytes[tensor.dtype] += tensor.nbytes
        return {dtype: {"tensors": count, "bytes": nbytes[dtype]} for dtype, count in tensors.most_common()}


def run(options: argparse.Namespace) -> int:
    """Print the configuration, the tensors and their bytes."""
    found = _of_store(options.path) if _is_store(options.path) else _of_checkpoint(options.path)
    if options.json:
        print_json(_as_json(options.path, found))
        return 0
    for key, value in _summary(found):
        print(f"{key:<14}{value}")
    print()
    rows = [
        (one.name, " x ".join(map(str, one.shape)) or "scalar", one.dtype, human(one.nbytes)) for one in found.tensors
    ]
    print_table(("tensor", "shape", "dtype", "size"), rows)
    return 0


def _is_store(path: str) -> bool:
    return not is_remote(path) and (path.rstrip("/").endswith(PARTIAL) or Path(path, manifest.FILE_NAME).exists())


def _of_store(path: str) -> _Contents:
    store = Store.open(path)
    document = store.manifest
    truncated = document["truncated"]
    kept = (f"keeps {truncated['layers']} of {truncated['of']} layers",) if truncated else ()
    return _Contents(
        kind="npllama model",
        config=store.config,
        tensors=tuple(_Tensor(e.name, e.shape, e.dtype, e.data_bytes) for e in store.entries.values()),
        tokenizer=tuple(line["file"] for line in document["tokenizer"]),
        notes=(*kept, *document["notes"]),
    )


def _of_checkpoint(path: str) -> _Contents:
    checkpoint = open_checkpoint(path)
    for source in checkpoint.sources:
        source.close()
    return _Contents(
        kind=f"{checkpoint.kind} checkpoint",
        config=checkpoint.config,
        tensors=tuple(
            _Tensor(name, ref.shape, ref.encoding or ref.dtype, ref.nbytes) for name, ref in checkpoint.tensors.items()
        ),
        tokenizer=tuple(checkpoint.tokenizer),
        notes=checkpoint.notes,
    )


def _as_json(path: str, found: _Contents) -> dict[str, Any]:
    return {
        "path": path,
        "kind": found.kind,
        "config": found.config.to_json(),
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "dtypes": found.dtypes,
        "tensors": [
            {"name": one.name, "shape": list(one.shape), "dtype": one.dtype, "bytes": one.nbytes}
            for one in found.tensors
        ],
        "tokenizer": list(found.tokenizer),
        "notes": list(found.notes),
    }


def _summary(found: _Contents) -> Iterator[tuple[str, str]]:
    yield "kind", found.kind
    for key, value in found.config.to_json().items():
        yield key, str(value)
    yield "parameters", human(found.parameters, unit="")
    yield "size", human(found.nbytes)
    for dtype, sums in found.dtypes.items():
        yield "dtype", f"{dtype}: {sums['tensors']} tensors, {human(sums['bytes'])}"
    yield "tokenizer", ", ".join(found.tokenizer) or "none: takes and gives token ids only"
    for note in found.notes:
        yield "note", note
