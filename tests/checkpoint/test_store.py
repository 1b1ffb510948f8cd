"""A store opens when it is whole, and says exactly what is wrong when it is not: never a wrong number."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.store import manifest as manifests
from npllama.checkpoint.store.folder import Store, verify_store
from npllama.checkpoint.store.npy import header
from npllama.errors import (
    ConfigError,
    ConfigMismatchError,
    CorruptDataError,
    FileAccessError,
    IncompleteConversionError,
    NotACheckpointError,
    NpllamaError,
    ParameterError,
    TruncatedFileError,
    VersionError,
)
from tests.checkpoint.tiny import CONFIG, checkpoint, stored

WQ = "layers.0.attention.wq.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_checkpoint(checkpoint(), tmp_path_factory.mktemp("store") / "model")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def never_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a damaged file was mapped")

    monkeypatch.setattr(mmap, "mmap", refuse)


# --- whole stores --------------------------------------------------------------------------------------------------


def test_open_gives_config_entries_and_size(pristine: Path) -> None:
    store = Store.open(pristine)
    assert store.path == pristine
    assert store.config == CONFIG
    assert list(store.entries) == [*stored(), "rope.freqs"]
    assert store.nbytes == sum(values.nbytes // 2 for values in stored().values()) + 4
    assert store.manifest["complete"] is True


def test_open_takes_a_string_and_a_trailing_slash(pristine: Path) -> None:
    assert Store.open(f"{pristine}/").config == CONFIG


def test_tensor_is_a_plain_read_only_view_of_the_file(pristine: Path) -> None:
    tensor = Store.open(pristine).tensor(WQ)
    assert type(tensor.data) is np.ndarray
    assert tensor.data.dtype == np.uint16
    assert not tensor.data.flags.writeable
    assert not tensor.data.flags.owndata
    assert tensor.data.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        tensor.data[0] = 0
    np.testing.assert_array_equal(tensor.data, np.load(pristine / "weights" / f"{WQ}.npy"))


def test_tensor_outlives_its_store_and_its_file(folder: Path) -> None:
    tensor = Store.open(folder).tensor(WQ)
    before = tensor.data.copy()
    shutil.rmtree(folder)
    np.testing.assert_array_equal(tensor.data, before)


def test_an_unknown_tensor_is_a_parameter_error(pristine: Path) -> None:
    with pytest.raises(ParameterError, match=r"there is no tensor 'layers\.9\.attention\.wq\.weight'"):
        Store.open(pristine).tensor("layers.9.attention.wq.weight")


def test_opening_maps_nothing(pristine: Path, never_mapped: None) -> None:
    Store.open(pristine)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not on this system")
def test_a_tensor_is_mapped_by_huge_pages_where_the_system_has_them(pristine: Path) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as pages:
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pytest.skip("the system has no huge pages")
    tensor = Store.open(pristine).tensor(WQ)
    start = f"{tensor.data.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE:x}-"
    _, mapping = ("\n" + Path("/proc/self/smaps").read_text()).split("\n" + start)
    flags = next(line for line in mapping.splitlines() if line.startswith("VmFlags"))
    assert "hg" in flags.split()


def test_verify_reads_every_byte_of_every_file(pristine: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = verify_store(pristine, lambda *call: seen.append(call))
    weights = sum(file.stat().st_size for file in (pristine / "weights").iterdir())
    tokenizer = sum(file.stat().st_size for file in (pristine / "tokenizer").iterdir())
    assert found.problems == ()
    assert found.nbytes == weights + tokenizer
    assert (found.files, found.tensors) == (22 + 2 + 1, 22)
    assert seen[-1] == ("Verifying", weights, weights)


# --- no store ------------------------------------------------------------------------------------------------------


def test_nothing_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="no such folder"):
        Store.open(tmp_path / "nothing")


def test_a_folder_without_a_manifest_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"no manifest\.json.*npllama convert"):
        Store.open(tmp_path)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotACheckpointError, match="not a converted model"):
        Store.open(tmp_path / "model.gguf")


def test_a_partial_folder_says_how_to_resume(tmp_path: Path) -> None:
    (tmp_path / "model.partial").mkdir()
    for path in (tmp_path / "model", tmp_path / "model.partial"):
        with pytest.raises(IncompleteConversionError, match="Run the same conversion again: it resumes"):
            Store.open(path)


def test_a_loop_of_links_is_an_access_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(FileAccessError):
        Store.open(tmp_path / "a")


# --- damaged files -------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _reheader(descr: str, fortran: str = "False", shape: str = "(8, 8)", version: bytes = b"\x01\x00") -> Any:
    text = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}".ljust(117) + "\n"
    new = b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode()
    assert len(new) == 128

    def change(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(new + data[128:])

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], type[NpllamaError], str]] = {
    "missing": (Path.unlink, CorruptDataError, "the file is missing"),
    "a byte short": (_cut, TruncatedFileError, "255 bytes, expected 256"),
    "a byte long": (_extend, CorruptDataError, "257 bytes, expected 256"),
    "empty": (lambda path: path.write_bytes(b""), TruncatedFileError, "0 bytes, expected 256"),
    "a pipe": (_pipe, FileAccessError, "not a regular file"),
    "a folder": (_folder, FileAccessError, "not a regular file"),
    "big-endian": (_reheader(">u2"), CorruptDataError, "the header is not that of bfloat16"),
    "Fortran order": (_reheader("<u2", fortran="True"), CorruptDataError, "header"),
    "objects": (_reheader("|O"), CorruptDataError, "header"),
    "void": (_reheader("<V2"), CorruptDataError, "header"),
    "other shape": (_reheader("<u2", shape="(4, 16)"), CorruptDataError, "header"),
    "bool in shape": (_reheader("<u2", shape="(True, 64)"), CorruptDataError, "header"),
    "negative shape": (_reheader("<u2", shape="(-1, 8)"), CorruptDataError, "header"),
    "other npy version": (_reheader("<u2", version=b"\x03\x00"), CorruptDataError, "header"),
    "zeros": (lambda path: path.write_bytes(bytes(256)), CorruptDataError, "header"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_before_it_is_mapped(folder: Path, kind: str, never_mapped: None) -> None:
    damage, error, message = DAMAGE[kind]
    path = folder / "weights" / f"{WQ}.npy"
    damage(path)
    with pytest.raises(error, match=message) as caught:
        Store.open(folder)
    assert str(path) in str(caught.value)
    found = verify_store(folder)
    assert [type(problem) for problem in found.problems] == [error]
    assert found.tensors == 22


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_after_opening_is_refused_when_the_tensor_is_asked_for(
    folder: Path, kind: str, never_mapped: None
) -> None:
    damage, error, message = DAMAGE[kind]
    store = Store.open(folder)
    damage(folder / "weights" / f"{WQ}.npy")
    with pytest.raises(error, match=message):
        store.tensor(WQ)


def test_verify_finds_a_flipped_bit_anywhere_and_names_all_files(folder: Path) -> None:
    damaged = [*sorted((folder / "weights").iterdir())[::5], folder / "tokenizer" / "tokenizer.json"]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-1] ^= 0x10
        path.write_bytes(content)
    found = verify_store(folder)
    assert {problem.file for problem in found.problems} == {str(path) for path in damaged}
    assert all(isinstance(problem, CorruptDataError) for problem in found.problems)
    assert "SHA-256" in str(found.problems[0])


def test_a_changed_tokenizer_is_found_when_the_store_is_opened(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b'{"model": "tinY"}')
    with pytest.raises(CorruptDataError, match=r"tokenizer\.json: the SHA-256"):
        Store.open(folder)


def test_a_missing_tokenizer_file_is_found_when_the_store_is_opened(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileAccessError, match=r"tokenizer\.json"):
        Store.open(folder)


# --- damaged manifests ---------------------------------------------------------------------------------------------


def test_every_single_byte_of_the_manifest_is_guarded(folder: Path) -> None:
    """A flipped bit gives a typed error, or the same model (white space that JSON does not count)."""
    path = folder / "manifest.json"
    content = path.read_bytes()
    document = json.loads(content)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        try:
            found = manifests.decode(bytes(damaged), "manifest.json")
        except NpllamaError:
            continue
        assert found == document


def test_every_prefix_of_the_manifest_is_refused(folder: Path) -> None:
    content = (folder / "manifest.json").read_bytes()
    for length in range(len(content) - 2):
        with pytest.raises(NpllamaError):
            manifests.decode(content[:length], "manifest.json")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as somebody would who also gets the digest right."""
    path = folder / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(manifests.encode(document))


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return change


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.pop(key)


def _tensor(index: int, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return _set("tensors", index, key, to=value)


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], type[NpllamaError]]] = {
    "newer": (_set("format_version", to=2), VersionError),
    "version 0": (_set("format_version", to=0), CorruptDataError),
    "version true": (_set("format_version", to=True), CorruptDataError),
    "version text": (_set("format_version", to="1"), CorruptDataError),
    "no version": (_drop("format_version"), CorruptDataError),
    "not complete": (_set("complete", to=False), CorruptDataError),
    "no truncated": (_drop("truncated"), CorruptDataError),
    "truncated to too few": (_set("truncated", to={"layers": 1, "of": 2}), CorruptDataError),
    "truncated from too few": (_set("truncated", to={"layers": 2, "of": 2}), CorruptDataError),
    "truncated from text": (_set("truncated", to={"layers": 2, "of": "9"}), CorruptDataError),
    "truncated by something": (_set("truncated", to={"layers": 2}), CorruptDataError),
    "other layout": (_set("rope_layout", to="half-split"), CorruptDataError),
    "dtype": (_set("dtype", to="int8"), CorruptDataError),
    "other dtype": (_set("dtype", to="float32"), ConfigMismatchError),
    "notes": (_set("notes", to=[1]), CorruptDataError),
    "no notes": (_drop("notes"), CorruptDataError),
    "tie to nowhere": (_set("tied", to={"output.weight": "nowhere"}), CorruptDataError),
    "tie of a norm": (_set("tied", to={"norm.weight": "output.weight"}), CorruptDataError),
    "tied config": (_set("config", "tied", to=True), CorruptDataError),
    "tokenizer outside": (_set("tokenizer", 0, "file", to="tokenizer/../../etc/passwd"), CorruptDataError),
    "tokenizer absolute": (_set("tokenizer", 0, "file", to="/etc/passwd"), CorruptDataError),
    "tokenizer text": (_set("tokenizer", 0, to="tokenizer/tokenizer.json"), CorruptDataError),
    "tokenizer sha": (_set("tokenizer", 0, "sha256", to="X" * 64), CorruptDataError),
    "config missing": (_drop("config"), CorruptDataError),
    "config empty": (_set("config", to={}), ConfigError),
    "config unknown key": (_set("config", "experts", to=8), ConfigError),
    "config text": (_set("config", "dim", to="8"), ConfigError),
    "config eps text": (_set("config", "norm_eps", to="1e-5"), ConfigError),
    "config scaling text": (_set("config", "rope_scaling", to="llama3"), ConfigError),
    "config scaling kind": (_set("config", "rope_scaling", to={"kind": "yarn"}), ConfigError),
    "more layers": (_set("config", "n_layers", to=3), ConfigMismatchError),
    "very many layers": (_set("config", "n_layers", to=1 << 12), ConfigMismatchError),
    "absurd layers": (_set("config", "n_layers", to=1 << 24), ConfigError),
    "other width": (_set("config", "dim", to=10), ConfigMismatchError),
    "no tensors": (_set("tensors", to=[]), ConfigMismatchError),
    "tensors of numbers": (_set("tensors", to=[1] * 22), ConfigMismatchError),
    "tensor twice": (lambda document: document["tensors"].append(document["tensors"][0]), ConfigMismatchError),
    "tensor renamed": (_tensor(3, "name", "layers.0.attention.wz.weight"), ConfigMismatchError),
    "tensor file outside": (_tensor(3, "file", "../../etc/passwd"), ConfigMismatchError),
    "tensor file of another": (_tensor(3, "file", "weights/norm.weight.npy"), ConfigMismatchError),
    "tensor shape": (_tensor(3, "shape", [8, 9]), ConfigMismatchError),
    "tensor shape of bools": (_tensor(21, "shape", [True]), ConfigMismatchError),
    "tensor shape text": (_tensor(3, "shape", "8, 8"), ConfigMismatchError),
    "tensor dtype": (_tensor(3, "dtype", "float32"), ConfigMismatchError),
    "tensor group": (_tensor(3, "group", 32), ConfigMismatchError),
    "tensor sha": (_tensor(3, "sha256", "0" * 63), CorruptDataError),
    "tensor sha number": (_tensor(3, "sha256", 7), CorruptDataError),
    "tensor extra": (_tensor(3, "offset", 7), ConfigMismatchError),
}


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_manifest_is_refused(folder: Path, kind: str, never_mapped: None) -> None:
    change, error = FORGED[kind]
    rewrite(folder, change)
    with pytest.raises(error) as caught:
        Store.open(folder)
    assert type(caught.value) is error
    assert "manifest.json" in str(caught.value)


def test_a_newer_version_is_named_before_anything_else_is_checked(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 7, "everything": "else"}')
    with pytest.raises(VersionError, match=r"format version 7; this npllama reads up to 1.*Update npllama"):
        Store.open(folder)


def test_a_wrong_digest_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"norm_eps": 1e-05', b'"norm_eps": 1e-06'))
    with pytest.raises(CorruptDataError, match="digest"):
        Store.open(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptDataError):
        Store.open(folder)


def test_a_manifest_that_is_a_pipe_does_not_hang(folder: Path) -> None:
    _pipe(folder / "manifest.json")
    with pytest.raises(FileAccessError, match="not a regular file"):
        Store.open(folder)


# --- headers -------------------------------------------------------------------------------------------------------


def shapes() -> Iterator[tuple[int, ...]]:
    yield from ((), (1,), (8,), (128_256, 4096), (1, 2, 3), (16_777_216, 16_777_216))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", list(shapes()))
def test_header_is_read_by_numpy_as_meant_and_aligned(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    text = header(dtype, shape)
    assert len(text) % 64 == 0
    (tmp_path / "x.npy").write_bytes(text)
    with (tmp_path / "x.npy").open("rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        read_shape, fortran, descr = np.lib.format.read_array_header_1_0(file)
    expected = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}[dtype]
    assert (read_shape, fortran, descr) == (shape, False, np.dtype(expected))


def test_entries_of_a_tied_config_have_no_output(pristine: Path) -> None:
    assert "output.weight" not in manifests.layout(replace(CONFIG, tied=True), "bfloat16")
    assert "output.weight" in manifests.layout(CONFIG, "bfloat16")
