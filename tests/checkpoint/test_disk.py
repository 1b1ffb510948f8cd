"""Files are written in pieces that are whole huge pages of memory."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.store import disk
from npllama.checkpoint.store.disk import new_file


class RecordedFile(io.FileIO):
    """Keeps the lengths of what is written, one by one."""

    lengths: list[int]

    def write(self, data: Any) -> int:
        self.lengths.append(len(data))
        return super().write(data)


def test_a_file_is_written_in_whole_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are small and blocks have any size; what the system gets are multiples of 2 MiB, and then the rest."""
    monkeypatch.setattr(RecordedFile, "lengths", [], raising=False)
    monkeypatch.setattr(disk.os, "fdopen", RecordedFile)
    content = np.random.default_rng(0).bytes(5 * (1 << 20) + 77)
    with new_file(tmp_path / "file", len(content)) as file:
        for start, stop in ((0, 128), (128, 128), (128, 3_000_000), (3_000_000, 3_000_001), (3_000_001, len(content))):
            file.write(content[start:stop])
    assert RecordedFile.lengths == [1 << 21, 1 << 21, (1 << 20) + 77]
    assert (tmp_path / "file").read_bytes() == content


def test_an_array_of_several_axes_is_written_as_its_bytes(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    with new_file(tmp_path / "file") as file:
        file.write(array.data)
    assert (tmp_path / "file").read_bytes() == array.tobytes()
