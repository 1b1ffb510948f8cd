"""Kernels are compiled on two processors, once; and by this process alone where the other one cannot help."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npllama.kernels import warmup
from npllama.kernels.warmup import Needs, compile_kernels
from tools.environment import ROOT

NEEDS = Needs("float32", "portable")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand for the folder of compiled kernels where the notes of what is done are kept."""
    monkeypatch.setattr(warmup, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace processes by some that end at once, with the exit code that comes last."""
    commands: list[Any] = [0]

    class Process:
        def __init__(self, command: list[str], **options: Any) -> None:
            commands.insert(0, command)
            self.returncode = commands[-1]

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *problem: object) -> None:
            pass

        def kill(self) -> None:
            commands.insert(0, "killed")

    monkeypatch.setattr(warmup.subprocess, "Popen", Process)
    monkeypatch.setattr(warmup.os, "cpu_count", lambda: 2)
    return commands


def test_another_process_takes_its_share_once(folder: Path, started: list[Any]) -> None:
    compile_kernels(NEEDS)
    compile_kernels(NEEDS)
    assert len(started) == 2
    assert started[0][0] == sys.executable
    assert "compile_share(*('float32', 'portable', 'float32', 'float32', False, True, False))" in started[0][2]


def test_a_process_that_fails_is_tried_again_and_changes_nothing(folder: Path, started: list[Any]) -> None:
    started[-1] = 1
    seen: list[tuple[str, int, int]] = []
    compile_kernels(NEEDS)
    compile_kernels(NEEDS, lambda *step: seen.append(step))
    assert len(started) == 3
    assert not list(folder.iterdir())
    assert seen[-1][1] == seen[-1][2] == len(seen) - 1


@pytest.mark.parametrize("lack", ["folder", "processor", "interpreter"])
def test_where_nothing_can_be_shared_nobody_is_asked(
    lack: str, folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if lack == "folder":
        monkeypatch.setattr(warmup, "cache_folder", lambda: None)
    elif lack == "processor":
        monkeypatch.setattr(warmup.os, "cpu_count", lambda: 1)
    else:
        monkeypatch.setattr(warmup.sys, "executable", "")
    compile_kernels(NEEDS)
    assert started == [0]


def test_where_no_process_can_be_started_everything_is_compiled_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*command: Any, **options: Any) -> None:
        raise OSError("no process")

    monkeypatch.setattr(warmup.subprocess, "Popen", refused)
    monkeypatch.setattr(warmup.os, "cpu_count", lambda: 2)
    seen: list[tuple[str, int, int]] = []
    compile_kernels(NEEDS, lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] > 0
    assert not list(folder.iterdir())


def test_who_is_interrupted_leaves_no_process_behind(
    folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup, "_steps", lambda needs: ((interrupted,), ()))
    with pytest.raises(KeyboardInterrupt):
        compile_kernels(NEEDS)
    assert started[0] == "killed"
    assert not list(folder.iterdir())


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_let_lie_meanwhile_and_then_as_before(
    was_enabled: bool, folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []

    def fails() -> None:
        enabled.append(gc.isenabled())
        raise MemoryError

    monkeypatch.setattr(warmup, "_steps", lambda needs: ((fails,), ()))
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(MemoryError):
            compile_kernels(NEEDS)
        enabled.append(gc.isenabled())
    finally:
        gc.enable()
    assert enabled == [False, was_enabled]


def test_the_share_of_the_other_process_can_be_compiled_there() -> None:
    command = "from npllama.kernels.warmup import compile_share; compile_share('float32', 'portable')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", "-c", command], env=environment, check=True)
