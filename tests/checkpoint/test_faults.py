"""What a conversion survives: being killed anywhere, full and failing disks, rivals, sources that change."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.store.disk import locked
from npllama.checkpoint.store.folder import Store, verify_store
from npllama.errors import (
    DiskSpaceError,
    FileAccessError,
    IncompleteConversionError,
    LockedError,
    NpllamaError,
)
from tests.checkpoint.tiny import CONFIG, checkpoint, ref, stored, tree
from tools.environment import ROOT


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return what an undisturbed conversion of the tiny model writes."""
    return tree(convert_checkpoint(checkpoint(), tmp_path_factory.mktemp("complete") / "m"))


def driver(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.checkpoint.drivers", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a process with threads should not fork
    )


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a conversion to ``folder/model`` in another process; it waits in the middle."""
    with driver("hold", folder) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "holding\n"
            yield process
        finally:
            process.kill()


# --- killed --------------------------------------------------------------------------------------------------------


def test_killed_at_any_step_it_is_never_half_and_resumes_to_the_same_bytes() -> None:
    memory_disk = Path("/dev/shm")
    where = memory_disk if os.access(memory_disk, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder, driver("crash", folder) as process:
        out, _ = process.communicate()
    assert process.returncode == 0
    report = json.loads(out)
    assert report["failures"] == []
    assert set(report["seen"]) == {"new: nothing", "new: 2", "replacing: 1", "replacing: nothing", "replacing: 2"}
    assert report["seen"]["replacing: nothing"] == 1  # between two renames; the next run puts it right
    assert report["points"] > 150
    assert report["twice"] > 30


def interrupted(folder: Path, after: int = 600, dtype: str = "bf16", **changes: Any) -> None:
    """Interrupt a conversion to ``folder/m`` after so many bytes were written."""

    def stop(what: str, done: int, total: int) -> None:
        if done > after and what != "Measuring":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint(**changes), folder / "m", dtype=dtype, progress=stop)


def test_an_interrupted_conversion_keeps_its_work_and_frees_its_lock(
    tmp_path: Path, complete: dict[str, bytes]
) -> None:
    interrupted(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.partial"]
    with pytest.raises(IncompleteConversionError):
        Store.open(tmp_path / "m")
    seen: list[tuple[str, int, int]] = []
    convert_checkpoint(checkpoint(), tmp_path / "m", progress=lambda *call: seen.append(call))
    assert seen[0][0] == "Resuming"
    assert seen[0][1] > 0
    assert tree(tmp_path / "m") == complete


def test_finished_tensors_are_not_read_again(tmp_path: Path) -> None:
    interrupted(tmp_path)
    finished = {path.stem for path in (tmp_path / "m.partial" / "weights").glob("*.npy")}
    assert finished

    def counted(name: str, values: Any) -> Any:
        def read_rows(start: int, stop: int) -> Any:
            read.add(name)
            return values[start:stop]

        return ref(name, values, read_rows=read_rows)

    read: set[str] = set()
    convert_checkpoint(
        checkpoint(tensors={name: counted(name, values) for name, values in stored().items()}), tmp_path / "m"
    )
    assert read == stored().keys() - finished


def test_a_tensor_whose_file_vanished_is_written_again(tmp_path: Path, complete: dict[str, bytes]) -> None:
    interrupted(tmp_path)
    next((tmp_path / "m.partial" / "weights").glob("*.npy")).unlink()
    convert_checkpoint(checkpoint(), tmp_path / "m")
    assert tree(tmp_path / "m") == complete


@pytest.mark.parametrize("part", ["", ".scale", ".min"])
def test_a_quantised_tensor_of_which_a_part_vanished_is_written_again(tmp_path: Path, part: str) -> None:
    interrupted(tmp_path, dtype="int4")
    weights = tmp_path / "m.partial" / "weights"
    name = next(weights.glob("*.min.npy")).name.removesuffix(".min.npy")
    (weights / f"{name}{part}.npy").unlink()
    convert_checkpoint(checkpoint(), tmp_path / "m", dtype="int4")
    assert tree(tmp_path / "m") == tree(convert_checkpoint(checkpoint(), tmp_path / "alone", dtype="int4"))


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_journal_cut_short_loses_its_last_line_only(tmp_path: Path, complete: dict[str, bytes], cut: int) -> None:
    interrupted(tmp_path)
    journal = tmp_path / "m.partial" / "journal.jsonl"
    lines = journal.read_bytes().count(b"\n")
    os.truncate(journal, journal.stat().st_size - cut)
    seen: list[str] = []
    convert_checkpoint(checkpoint(), tmp_path / "m", progress=lambda what, *_: seen.append(what))
    assert lines > 2
    assert seen[0] == "Resuming"
    assert tree(tmp_path / "m") == complete


@pytest.mark.parametrize("content", [b"", b"\0" * 300 + b"\n", b"not json\n", b"{}\n"])
def test_a_ruined_journal_means_starting_over(tmp_path: Path, complete: dict[str, bytes], content: bytes) -> None:
    interrupted(tmp_path)
    (tmp_path / "m.partial" / "journal.jsonl").write_bytes(content)
    convert_checkpoint(checkpoint(), tmp_path / "m")
    assert tree(tmp_path / "m") == complete


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "f32"},
        {"dtype": "int8"},
        {"layers": 1},
        {"allow_nan": True},
        {"verify_crc": False},
    ],
)
def test_other_options_start_over(tmp_path: Path, other: dict[str, Any]) -> None:
    interrupted(tmp_path)
    seen: list[str] = []
    convert_checkpoint(checkpoint(), tmp_path / "m", progress=lambda what, *_: seen.append(what), **other)
    assert next(what for what in seen if what != "Measuring") == "Starting over"
    alone = convert_checkpoint(checkpoint(), tmp_path / "alone", **other)
    assert tree(tmp_path / "m") == tree(alone)


def test_terminated_it_leaves_its_work_and_no_lock(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == -signal.SIGTERM
    assert (tmp_path / "model.partial").is_dir()
    convert_checkpoint(checkpoint(), tmp_path / "model")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


# --- rivals --------------------------------------------------------------------------------------------------------


def test_a_second_conversion_to_the_same_folder_is_locked_out(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        with pytest.raises(LockedError, match=rf"pid {process.pid} on .* since \d{{4}}-\d\d-\d\dT") as caught:
            convert_checkpoint(checkpoint(), tmp_path / "model")
        assert caught.value.exit_code == 6
        convert_checkpoint(checkpoint(), tmp_path / "other")  # another folder is free
        out, _ = process.communicate("go on\n")
        assert out == "done\n"
    assert Store.open(tmp_path / "model").manifest["notes"] == ["seed 2"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "other"]


def test_a_lock_file_that_nobody_holds_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "m.lock").write_text('{"pid": 1, "host": "gone", "since": "long ago"}')
    convert_checkpoint(checkpoint(), tmp_path / "m")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_lock_without_a_holder_s_name_is_still_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "m"):
        os.truncate(tmp_path / "m.lock", 0)
        with pytest.raises(LockedError, match="has not said which"), locked(tmp_path / "m"):
            pytest.fail("two holders")


def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_mistaken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    removed: list[bool] = []

    def flock(descriptor: int, operation: int) -> None:
        if not removed:
            (tmp_path / "m.lock").unlink()
            removed.append(True)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "m"):
        assert removed
        with pytest.raises(LockedError), locked(tmp_path / "m"):
            pytest.fail("two holders")


def test_a_mapped_model_can_be_replaced_under_its_reader(tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m", dtype="f32")
    old = Store.open(folder).tensor("norm.weight")
    before = old.data.copy()
    convert_checkpoint(checkpoint(stored(seed=1)), folder, dtype="f32", force=True)
    new = Store.open(folder).tensor("norm.weight")
    np.testing.assert_array_equal(old.data, before)
    assert not np.array_equal(new.data, before)


# --- disks ---------------------------------------------------------------------------------------------------------


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10_000_000))
    with pytest.raises(DiskSpaceError, match=r"0\.07 GB are needed and 0\.01 GB are free") as caught:
        convert_checkpoint(checkpoint(), tmp_path / "m")
    assert caught.value.exit_code == 5
    assert not list((tmp_path / "m.partial" / "weights").iterdir())


def patch_os(patch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    """Replace a function of ``os``, also where Python 3.10's pathlib keeps a reference of its own."""
    accessor = getattr(pathlib, "_NormalAccessor", None)
    if getattr(accessor, name, None) is getattr(os, name):
        patch.setattr(accessor, name, staticmethod(function))
    patch.setattr(os, name, function)


class Failing:
    """A function of ``os`` that fails once, at its n-th call."""

    def __init__(self, real: Callable[..., Any], number: int, at: int) -> None:
        self.real, self.number, self.left, self.failed = real, number, at, False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **options)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("at", [2, 3, 9])
@pytest.mark.parametrize("function", ["posix_fallocate", "fsync", "replace", "rename", "open", "mkdir"])
def test_any_failing_call_is_a_typed_error_and_the_next_run_completes(
    tmp_path: Path, complete: dict[str, bytes], number: int, function: str, at: int
) -> None:
    failing = Failing(getattr(os, function), number, at)
    caught: list[NpllamaError] = []
    with pytest.MonkeyPatch.context() as patch:
        patch_os(patch, function, failing)
        try:
            convert_checkpoint(checkpoint(), tmp_path / "m")
        except NpllamaError as problem:
            caught.append(problem)
    assert len(caught) == failing.failed, "the failure went unnoticed"
    for problem in caught:
        assert type(problem) is (DiskSpaceError if number in (errno.ENOSPC, errno.EDQUOT) else FileAccessError)
        assert os.strerror(number) in str(problem)
        assert problem.exit_code == 5
    if failing.failed:
        convert_checkpoint(checkpoint(), tmp_path / "m", force=True)
    assert tree(tmp_path / "m") == complete
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_fallocate_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: dict[str, bytes], number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    convert_checkpoint(checkpoint(), tmp_path / "m")
    assert tree(tmp_path / "m") == complete


def test_a_failed_replacement_leaves_the_old_model_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    before = tree(folder)
    with monkeypatch.context() as patch:
        patch_os(patch, "rename", Failing(os.rename, errno.EIO, 2))
        with pytest.raises(FileAccessError):
            convert_checkpoint(checkpoint(stored(seed=1)), folder, force=True)
    assert tree(folder) == before
    convert_checkpoint(checkpoint(stored(seed=1)), folder, force=True)
    assert tree(folder) != before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("reserve", [True, False])
def test_a_disk_that_fills_up_in_the_middle_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserve: bool
) -> None:
    config = replace(CONFIG, hidden_dim=40_000, n_layers=1)  # the feed-forward matrices have 640 kB each
    if not reserve:
        monkeypatch.delattr(os, "posix_fallocate")
    with largest_file(300_000), pytest.raises(DiskSpaceError, match="it resumes") as caught:
        convert_checkpoint(checkpoint(config=config), tmp_path / "m")
    assert "layers.0.feed_forward" in str(caught.value)
    left = {path.name for path in (tmp_path / "m.partial" / "weights").iterdir()}
    assert "tok_embeddings.weight.npy" in left
    assert not any(name.endswith(".tmp") for name in left)
    convert_checkpoint(checkpoint(config=config), tmp_path / "m")
    assert verify_store(tmp_path / "m").problems == ()


@pytest.mark.parametrize("parent", ["a-file/m", "/proc/npllama/m", "x" * 300])
def test_a_place_that_cannot_be_written_is_an_access_error(tmp_path: Path, parent: str) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(FileAccessError) as caught:
        convert_checkpoint(checkpoint(), tmp_path / parent)
    assert caught.value.exit_code == 5


def test_data_reach_the_disk_before_their_names_and_the_manifest_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a power failure forgets, no name ever stands for missing bytes."""
    events: list[tuple[str, str]] = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def replace_(source: Path, target: Path) -> None:
        real_replace(source, target)
        events.append(("name", Path(target).name))

    def rename(source: Path, target: Path) -> None:
        real_rename(source, target)
        events.append(("publish", Path(target).name))

    patch_os(monkeypatch, "fsync", fsync)
    patch_os(monkeypatch, "replace", replace_)
    patch_os(monkeypatch, "rename", rename)
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    named = [name for event, name in events if event == "name"]
    for name in named:
        assert events.index(("sync", f"{name}.tmp")) < events.index(("name", name))
    assert named[-1] == "manifest.json"
    assert set(named) == {path.name for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in named if name.endswith(".npy")]:  # the journal follows the name
        assert events[events.index(("name", name)) + 1] == ("sync", "journal.jsonl")
    published = events.index(("publish", "m"))
    assert events.index(("name", "manifest.json")) < published
    assert {("sync", "weights"), ("sync", "tokenizer"), ("sync", "m.partial")} <= set(events[:published])
    assert events[published + 1 :] == [("sync", tmp_path.name)]


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    with driver("memory", tmp_path, "2000000000") as process:
        out, _ = process.communicate()
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    assert process.returncode == 0
    report = json.loads(out)
    assert report["nbytes"] > 990_000_000
    assert report["kilobytes"] < 100_000
