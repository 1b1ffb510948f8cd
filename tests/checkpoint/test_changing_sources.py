"""Sources that change while they are converted, or between two attempts: noticed, never mixed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint import convert as convert_module
from npllama.checkpoint.convert import convert
from npllama.checkpoint.source import Source
from npllama.checkpoint.store.folder import Store
from npllama.errors import NpllamaError, SourceChangedError
from tests.checkpoint.tiny import tree
from tests.fixtures.loud import loud_config, loud_tensors, write_gguf


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    config = loud_config()
    return write_gguf(tmp_path / "model.gguf", loud_tensors(config), config)


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 64)


@pytest.mark.parametrize("change", [_touch, _grow, Path.unlink])
def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, gguf_file: Path, change: Callable[[Path], None]
) -> None:
    changed: list[bool] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if done > total // 2 and not changed:
            change(gguf_file)
            changed.append(True)

    with pytest.raises(SourceChangedError):
        convert(gguf_file, tmp_path / "m", progress=meanwhile)
    assert not (tmp_path / "m").exists()


def test_a_source_cut_short_meanwhile_is_called_changed_and_not_damaged(tmp_path: Path, gguf_file: Path) -> None:
    def meanwhile(what: str, done: int, total: int) -> None:
        if done > total // 2:
            os.truncate(gguf_file, 1000)

    with pytest.raises(SourceChangedError, match="changed while it was read"):
        convert(gguf_file, tmp_path / "m", progress=meanwhile)


def test_a_source_that_changed_between_two_attempts_starts_over(tmp_path: Path, gguf_file: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(gguf_file, tmp_path / "m", progress=stop)
    config = loud_config()
    tensors = loud_tensors(config, seed=1)
    write_gguf(gguf_file, tensors, config)
    seen: list[str] = []
    store = Store.open(convert(gguf_file, tmp_path / "m", dtype="bf16", progress=lambda what, *_: seen.append(what)))
    assert seen[0] == "Starting over"
    np.testing.assert_allclose(store.tensor("norm.weight").numbers(), tensors["norm.weight"], rtol=2**-8)


def test_an_unchanged_source_resumes(tmp_path: Path, gguf_file: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(gguf_file, tmp_path / "m", progress=stop)
    seen: list[str] = []
    convert(gguf_file, tmp_path / "m", progress=lambda what, *_: seen.append(what))
    assert seen[0] == "Resuming"
    assert tree(tmp_path / "m") == tree(convert(gguf_file, tmp_path / "alone"))


def test_sources_are_closed_whatever_happens(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Source] = []
    real = convert_module.open_checkpoint

    def remember(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        opened.extend(found.sources)
        return found

    monkeypatch.setattr(convert_module, "open_checkpoint", remember)
    convert(gguf_file, tmp_path / "m")
    with pytest.raises(NpllamaError):
        convert(gguf_file, tmp_path / "n", layers=99)
    assert len(opened) == 2
    for source in opened:
        with pytest.raises(ValueError, match="closed"):
            source.read(0, 1)
