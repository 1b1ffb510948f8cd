"""Files are written in pieces that are whole huge pages of memory."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.store.disk import InPieces
from npllama.errors import DiskSpaceError


class RecordedFile(io.RawIOBase):
    """Keeps what is written, one by one."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: Any) -> int:
        self.written.append(bytes(data))
        return len(data)


def test_a_file_is_written_in_whole_huge_pages() -> None:
    """Headers are small and blocks have any size; what the system gets are multiples of 2 MiB, and then the rest."""
    content = np.random.default_rng(0).bytes(5 * (1 << 20) + 77)
    pieces = RecordedFile()
    with InPieces(pieces) as file:
        for start, stop in ((0, 128), (128, 128), (128, 3_000_000), (3_000_000, 3_000_001), (3_000_001, len(content))):
            file.write(content[start:stop])
    assert [len(piece) for piece in pieces.written] == [1 << 21, 1 << 21, (1 << 20) + 77]
    assert b"".join(pieces.written) == content


def test_no_last_piece_is_written_behind_an_error() -> None:
    def fail(file: InPieces) -> None:
        with file:
            file.write(b"half")
            raise DiskSpaceError("full")

    pieces = RecordedFile()
    with pytest.raises(DiskSpaceError):
        fail(InPieces(pieces))
    assert not pieces.written
