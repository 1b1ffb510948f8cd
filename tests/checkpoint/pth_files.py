"""Opens .pth files written byte by byte, and compares what is read from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from npllama.checkpoint.pth.file import PthFile, open_pth
from tests.checkpoint.archives import archive, torch_members


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[PthFile]:
    file = open_pth(path, **options)
    try:
        yield file
    finally:
        file.source.close()


def read_all(path: Path, **options: Any) -> dict[str, np.ndarray]:
    with opened(path, **options) as file:
        return {name: ref.read() for name, ref in file.tensors.items()}


def write(path: Path, value: Any, storages: dict[str, bytes]) -> Path:
    path.write_bytes(archive(torch_members(value, storages)))
    return path


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Equal names, in order, and equal bits."""

    def facts(arrays: dict[str, np.ndarray]) -> list[Any]:
        return [(name, array.shape, array.dtype, array.tobytes()) for name, array in arrays.items()]

    return facts(found) == facts(expected)
