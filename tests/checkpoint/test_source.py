"""Bytes of a checkpoint: local files, object stores through blobfile, and what goes wrong with either."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npllama
from npllama.checkpoint import source as sources
from npllama.checkpoint.source import Source, file_names, is_folder, is_remote, join, read_file
from npllama.checkpoint.store.folder import Store
from npllama.errors import FileAccessError, SourceChangedError, TruncatedFileError
from tests.fixtures.loud import loud_config, loud_tensors, write_gguf, write_hf, write_meta

CONFIG = loud_config()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(100)))
    return path


def test_exactly_the_bytes_asked_for_come_back(file: Path) -> None:
    source = Source(file)
    assert (source.size, source.name) == (100, "file.bin")
    assert source.read(10, 5) == bytes(range(10, 15))
    assert source.read(100, 0) == b""
    source.close()


@pytest.mark.parametrize(("offset", "count"), [(96, 5), (101, 0), (-1, 2), (0, 101)])
def test_reading_past_the_end_is_refused_with_both_numbers(file: Path, offset: int, count: int) -> None:
    source = Source(file)
    with pytest.raises(TruncatedFileError, match=rf"{count} bytes are needed at {offset}, but the file has 100"):
        source.read(offset, count)
    source.close()


def test_a_file_cut_short_while_it_is_read_is_noticed(file: Path) -> None:
    source = Source(file)
    os.truncate(file, 50)
    with pytest.raises(TruncatedFileError, match="ended at byte 50 of 100"):
        source.read(0, 100)
    with pytest.raises(SourceChangedError, match="was 100 bytes, is 50"):
        source.check_unchanged()
    source.close()


def test_a_file_that_was_deleted_or_replaced_is_noticed(file: Path) -> None:
    source = Source(file)
    source.check_unchanged()
    replacement = file.with_name("other")
    replacement.write_bytes(bytes(range(100)))
    replacement.replace(file)
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        source.check_unchanged()
    file.unlink()
    with pytest.raises(SourceChangedError, match="deleted"):
        source.check_unchanged()
    source.close()


def test_what_is_no_regular_file_is_refused_before_it_can_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path(os.devnull)):
        with pytest.raises(FileAccessError, match="not a regular file"):
            Source(path)
    with pytest.raises(FileAccessError, match=r"missing: cannot open: No such file"):
        Source(tmp_path / "missing")
    with pytest.raises(FileAccessError, match="cannot list the folder"):
        file_names(tmp_path / "missing")


def test_a_small_file_that_is_not_small_is_refused(file: Path) -> None:
    assert read_file(file) == bytes(range(100))
    with pytest.raises(FileAccessError, match=r"100 bytes is more .* \(99\)"):
        read_file(file, limit=99)


# --- object stores ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a local folder that stands behind gs://bucket: blobfile does the work, on the translated path."""
    import blobfile

    folder = tmp_path / "bucket"
    folder.mkdir()

    def local(path: str) -> str:
        assert path.startswith("gs://bucket/"), path
        return str(folder / path.removeprefix("gs://bucket/"))

    def translated(name: str) -> Any:
        return lambda path, *arguments, **options: getattr(blobfile, name)(local(path), *arguments, **options)

    fake = SimpleNamespace(**{name: translated(name) for name in ("BlobFile", "isdir", "listdir", "stat")})
    monkeypatch.setattr(sources, "_blobfile", lambda: fake)
    return folder


def test_a_path_with_a_scheme_is_remote_and_joined_with_slashes() -> None:
    assert is_remote("gs://bucket/model")
    assert is_remote("az://account/container/model")
    assert not is_remote("C:/model")
    assert join("gs://bucket/model/", "a.pth") == "gs://bucket/model/a.pth"


def test_a_remote_file_is_read_at_offsets_and_watched_for_changes(bucket: Path) -> None:
    (bucket / "file.bin").write_bytes(bytes(range(100)))
    assert file_names("gs://bucket/") == ["file.bin"]
    assert is_folder("gs://bucket/")
    source = Source("gs://bucket/file.bin")
    assert source.read(90, 10) + source.read(3, 2) == bytes([*range(90, 100), 3, 4])
    source.check_unchanged()
    (bucket / "file.bin").write_bytes(b"shorter")
    with pytest.raises(SourceChangedError):
        source.check_unchanged()
    source.close()
    with pytest.raises(FileAccessError, match="gs://bucket/missing"):
        Source("gs://bucket/missing")


@pytest.mark.parametrize("kind", ["gguf", "hf", pytest.param("meta", marks=pytest.mark.torch)])
def test_a_remote_checkpoint_converts_to_the_same_bytes_as_a_local_one(bucket: Path, tmp_path: Path, kind: str) -> None:
    if kind == "meta":
        pytest.importorskip("torch")
    tensors = loud_tensors(CONFIG)
    name = "model.gguf" if kind == "gguf" else "model"
    {
        "gguf": lambda path: write_gguf(path, tensors, CONFIG),
        "hf": lambda path: write_hf(path, tensors, CONFIG, n_files=2),
        "meta": lambda path: write_meta(path, tensors, CONFIG, n_shards=2),
    }[kind](bucket / name)
    remote = Store.open(npllama.convert(f"gs://bucket/{name}", tmp_path / "remote"))
    local = Store.open(npllama.convert(bucket / name, tmp_path / "local"))
    assert remote.entries == local.entries  # names, shapes and digests
    assert (np.asarray(remote.tensor("norm.weight").data) == local.tensor("norm.weight").data).all()
