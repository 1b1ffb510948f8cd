"""Any path to a checkpoint leads to the reader of its format, and everything else to a sentence that says why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.open import open_checkpoint
from npllama.checkpoint.tensor import Checkpoint
from npllama.errors import (
    ConfigError,
    EmptyFileError,
    FileAccessError,
    NotACheckpointError,
    NpllamaError,
    ParameterError,
)
from tests.checkpoint.tiny import checkpoint
from tests.fixtures.loud import loud_config, loud_tensors, write_gguf, write_hf, write_meta


@pytest.fixture
def opened() -> Iterator[Any]:
    """Return a function that opens a checkpoint; its files are closed at the end."""
    found: list[Checkpoint] = []

    def open_it(*arguments: Any, **options: Any) -> Checkpoint:
        found.append(open_checkpoint(*arguments, **options))
        return found[-1]

    yield open_it
    for one in found:
        for source in one.sources:
            source.close()


def written(folder: Path, kind: str) -> Path:
    config = loud_config()
    tensors = loud_tensors(config)
    if kind == "gguf":
        folder.mkdir()
        return write_gguf(folder / "model.gguf", tensors, config).parent
    return {"meta": write_meta, "hf": write_hf}[kind](folder, tensors, config)


KINDS = [pytest.param("meta", marks=pytest.mark.torch), "hf", "gguf"]
FILES = {"meta": "consolidated.00.pth", "hf": "model.safetensors", "gguf": "model.gguf"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_opened_by_what_is_in_it(tmp_path: Path, opened: Any, kind: str) -> None:
    found = opened(written(tmp_path / "folder", kind))
    assert found.kind == kind
    assert replace(found.config, norm_eps=1e-5) == loud_config()
    assert np.float32(found.config.norm_eps) == np.float32(1e-5)  # a GGUF file holds a float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_opened_by_its_first_bytes_whatever_its_name(tmp_path: Path, opened: Any, kind: str) -> None:
    folder = written(tmp_path / "folder", kind)
    file = (folder / FILES[kind]).rename(folder / "weights.bin")
    assert opened(file).kind == kind


def test_the_rope_factor_reaches_meta_s_reader(tmp_path: Path, opened: Any) -> None:
    pytest.importorskip("torch")
    config = loud_config()
    params = {
        "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 256, "multiple_of": 192,
        "norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True,
    }  # fmt: skip
    folder = write_meta(tmp_path / "meta", loud_tensors(config), config, params=params)
    assert opened(folder).config.rope_scaling.factor == 8
    assert opened(folder, rope_factor=32.0).config.rope_scaling.factor == 32


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_a_rope_factor_for_a_format_that_says_its_own_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ParameterError, match="only Meta's"):
        open_checkpoint(written(tmp_path / "folder", kind), rope_factor=8.0)


def refused(path: Path | str, error: type[NpllamaError], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", FileAccessError, "cannot open: No such file")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, NotACheckpointError, "no .pth, .safetensors or .gguf file")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"")
    refused(tmp_path / "x.gguf", EmptyFileError, "0 bytes")


def test_some_other_file(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\xff\xe0" * 100)
    refused(tmp_path / "cat.jpg", NotACheckpointError, "no checkpoint format begins with")


def test_a_folder_with_two_formats_asks_for_one(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.gguf"):
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, NotACheckpointError, r"model\.safetensors, model\.gguf.*Name the file")


def test_a_folder_with_two_gguf_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a-Q4_K.gguf", "a-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, NotACheckpointError, r"a-Q4_K\.gguf, a-Q8_0\.gguf.*Name the file")


@pytest.mark.parametrize("name", ["params.json", "config.json"])
def test_a_configuration_without_weights_is_the_reader_s_to_explain(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "llama"}')
    with pytest.raises((NotACheckpointError, ConfigError)):
        open_checkpoint(tmp_path)


def test_a_converted_model(tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    refused(folder, NotACheckpointError, "converted model already")
