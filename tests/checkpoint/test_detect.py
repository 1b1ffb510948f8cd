"""What a file is must be told by its bytes, and a file that is no checkpoint must be named for what it is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from npllama.checkpoint.detect import detect
from npllama.checkpoint.source import Source
from npllama.errors import EmptyFileError, NotACheckpointError, NpllamaError, UnsupportedError


def kind_of(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with closing(Source(path)) as source:
        return detect(source)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"PK\x03\x04" + bytes(100), "pth"),
        (b"GGUF\x03\0\0\0", "gguf"),
        ((2).to_bytes(8, "little") + b"{}", "safetensors"),
    ],
)
def test_formats_are_told_by_their_first_bytes_whatever_the_name(tmp_path: Path, content: bytes, kind: str) -> None:
    assert kind_of(tmp_path / "weights.txt", content) == kind


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", EmptyFileError, "0 bytes.*Download it again"),
        (b"<!DOCTYPE html>\n<html>", NotACheckpointError, "web page .first line '<!DOCTYPE html>'.*expired"),
        (b"\n <?xml version='1.0'?><Error/>", NotACheckpointError, "web page"),
        (b"<HTML><body>403 Forbidden</body>", NotACheckpointError, "403 Forbidden"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060556616\n",
            NotACheckpointError,
            "git-lfs pointer for an object of 16.1 GB.*git lfs pull",
        ),
        (bytes(4096), NotACheckpointError, "zeros: an incomplete download"),
        (bytes(3), NotACheckpointError, "first 3 bytes are zeros"),
        (b"PYTORCH1" + bytes(8), UnsupportedError, "pre-release"),
        (b"name".ljust(257, b"\0") + b"ustar\x0000", UnsupportedError, "tar archive"),
        (b"\x1f\x8b\x08\0", UnsupportedError, "gunzip"),
        (b"\x93NUMPY\x01\0", UnsupportedError, "npy array"),
        (b"MZ\x90\0", NotACheckpointError, "begins with the bytes 4d 5a 90 00"),
        ((1 << 40).to_bytes(8, "little") + b"{", NotACheckpointError, "begins with the bytes 00 00 00 00 00 01"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(
    tmp_path: Path, content: bytes, error: type[NpllamaError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        kind_of(tmp_path / "consolidated.00.pth", content)
    assert type(caught.value) is error
    assert "consolidated.00.pth" in str(caught.value)


@pytest.mark.torch
def test_torchs_own_old_format_is_refused_by_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "old.pth"
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"before 1\.6"):
        kind_of(path, path.read_bytes())
