"""A converted model on disk, opened as memory maps.

Nothing in the folder is interpreted that the manifest does not already say: a tensor's file must have exactly the
header and the size that follow from the manifest before it is mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.checkpoint.source import read_file
from npllama.checkpoint.store import manifest as manifests
from npllama.checkpoint.store.manifest import ROPE_FREQS, ROPE_FREQS_LONG, Entry, Part
from npllama.config import ModelConfig
from npllama.dtypes import STORAGE, Array, Tensor
from npllama.errors import (
    CorruptDataError,
    FileAccessError,
    IncompleteConversionError,
    NotACheckpointError,
    NpllamaError,
    ParameterError,
    TruncatedFileError,
)

#: Called as ``progress(what, done, total)``, in bytes.
Progress = Callable[[str, int, int], None]

#: Ending of the folder that a conversion works in.
PARTIAL = ".partial"

_BLOCK_BYTES = 1 << 23
_REMEDY = "Convert the checkpoint again."


@dataclass(frozen=True, slots=True, eq=False)
class Store:
    """A model folder.

    Attributes
    ----------
    path : Path
        The folder.
    config : ModelConfig
        What the model is.
    manifest : mapping
        The manifest, as plain JSON values.
    entries : mapping of str to Entry
        Canonical name -> tensor, in the order of the forward pass. Tied names are not in it; `tensor` knows them.
    """

    path: Path
    config: ModelConfig
    manifest: Mapping[str, Any]
    entries: Mapping[str, Entry]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a model folder: read the manifest and check every file's presence, size and header.

        The tensors' bytes are not read; `verify_store` does that.

        Raises
        ------
        IncompleteConversionError
            The conversion was interrupted.
        NotACheckpointError
            Not a model folder.
        VersionError
            Written by a newer npllama.
        CorruptDataError, TruncatedFileError, ConfigError, ConfigMismatchError
            The manifest or a file is damaged.
        FileAccessError
            Something cannot be read.
        """
        store = _read_manifest(Path(path))
        for entry in store.entries.values():
            for part in entry.parts:
                with _opened(store.path, part):
                    pass
        for line in store.manifest["tokenizer"]:
            _check_tokenizer_file(store.path, line)
        return store

    @property
    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer's files; None for a model that takes and gives token ids only."""
        return self.path / "tokenizer" if self.manifest["tokenizer"] else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.data_bytes for entry in self.entries.values())

    def tensor(self, name: str) -> Tensor:
        """Map a tensor.

        Parameters
        ----------
        name : str
            Canonical name; a tied one gives the tensor that it is tied to.

        Returns
        -------
        Tensor
            Its arrays are read-only ndarrays on the files' pages.

        Raises
        ------
        ParameterError
            The model has no such tensor.
        """
        entry = self.entries.get(self.manifest["tied"].get(name, name))
        if entry is None:
            raise ParameterError(f"there is no tensor {name!r}", file=self.path, remedy="See `npllama inspect`.")
        data, *rest = (_mapped(self.path, part) for part in entry.parts)
        if not rest:
            return Tensor(data, entry.dtype)
        scales, minima = (*rest, None)[:2]
        return Tensor(data, entry.dtype, scales, minima, entry.shape[-1])

    def find(self, name: str) -> Tensor | None:
        """Map a tensor, or return None if the model has no such tensor."""
        return self.tensor(name) if self.manifest["tied"].get(name, name) in self.entries else None

    def frequencies(self) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Return the RoPE inverse frequencies, shape (Dh/2,), float32, radians per position, and longrope's second set.

        None for what the model does not have.
        """
        short, long = self.find(ROPE_FREQS), self.find(ROPE_FREQS_LONG)
        return None if short is None else short.numbers(), None if long is None else long.numbers()


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_store` found.

    Attributes
    ----------
    files, tensors : int
        How many were checked.
    nbytes : int
        Bytes that were read.
    problems : tuple of NpllamaError
        One for each damaged file.
    """

    files: int
    tensors: int
    nbytes: int
    problems: tuple[NpllamaError, ...]


def verify_store(path: str | os.PathLike[str], progress: Progress | None = None) -> Verification:
    """Read every byte of a model folder and compare it with the manifest: sizes, headers, SHA-256.

    Damaged files are collected, so that one run names them all.

    Raises
    ------
    NpllamaError
        As `Store.open`, when not even the manifest can be read.
    """
    store = _read_manifest(Path(path))
    parts = [part for entry in store.entries.values() for part in entry.parts]
    total = sum(part.file_bytes for part in parts)
    problems: list[NpllamaError] = []
    read = done = 0
    for part in parts:
        try:
            with _opened(store.path, part) as descriptor:
                digest = hashlib.sha256()
                while block := os.read(descriptor, _BLOCK_BYTES):
                    digest.update(block)
                    read += len(block)
                    if progress:
                        progress("Verifying", min(done + part.file_bytes, read), total)
            if digest.hexdigest() != part.sha256:
                raise CorruptDataError(
                    f"the SHA-256 is {digest.hexdigest()}, the manifest says {part.sha256}",
                    file=store.path / part.file,
                    remedy=_REMEDY,
                )
        except NpllamaError as problem:
            problems.append(problem)
        done += part.file_bytes
    for line in store.manifest["tokenizer"]:
        try:
            read += _check_tokenizer_file(store.path, line)
        except NpllamaError as problem:
            problems.append(problem)
    files = 1 + len(parts) + len(store.manifest["tokenizer"])
    return Verification(files, len(store.entries), read, tuple(problems))


def _read_manifest(folder: Path) -> Store:
    """Open a folder as far as its manifest."""
    if folder.name.endswith(PARTIAL) or (not folder.exists() and folder.with_name(folder.name + PARTIAL).is_dir()):
        raise IncompleteConversionError(
            "the conversion was interrupted", file=folder, remedy="Run the same conversion again: it resumes."
        )
    if not folder.exists():
        raise FileAccessError("no such folder", file=folder, remedy="Check the path, or convert a checkpoint to it.")
    path = folder / manifests.FILE_NAME
    if not path.exists():
        raise NotACheckpointError(
            f"not a converted model: there is no {manifests.FILE_NAME}",
            file=folder,
            remedy="Convert a checkpoint with `npllama convert`, and name the folder that it wrote.",
        )
    document = manifests.decode(read_file(path), str(path))
    config = ModelConfig.from_json(document["config"], str(path))
    return Store(folder, config, document, manifests.entries(document, config, str(path)))


def _mapped(folder: Path, part: Part) -> Array:
    """Return an array on the pages of its file."""
    with _opened(folder, part) as descriptor:
        pages = mmap.mmap(descriptor, part.file_bytes, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without huge pages says so
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, STORAGE[part.dtype], offset=len(part.header)).reshape(part.shape)


@contextlib.contextmanager
def _opened(folder: Path, part: Part) -> Iterator[int]:
    """Yield a descriptor, at offset 0, of a file whose size and header are right."""
    path = folder / part.file
    try:
        # Not blocking: opening a pipe that nobody writes would never return.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptDataError("the file is missing", file=path, remedy=_REMEDY) from None
    except OSError as problem:
        raise FileAccessError(f"cannot open: {problem.strerror}", file=path, remedy="Check its permissions.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileAccessError("not a regular file", file=path, remedy=_REMEDY)
        if status.st_size != part.file_bytes:
            kind = TruncatedFileError if status.st_size < part.file_bytes else CorruptDataError
            raise kind(f"{status.st_size} bytes, expected {part.file_bytes}", file=path, remedy=_REMEDY)
        if os.pread(descriptor, len(part.header), 0) != part.header:
            raise CorruptDataError(
                f"the header is not that of {part.dtype} {part.shape}", file=path, offset=0, remedy=_REMEDY
            )
        yield descriptor
    except OSError as problem:
        raise FileAccessError(f"cannot read: {problem.strerror or problem}", file=path) from None
    finally:
        os.close(descriptor)


def _check_tokenizer_file(folder: Path, line: Mapping[str, str]) -> int:
    """Compare a tokenizer file with its digest: it is small, and one wrong byte in it changes every text."""
    path = folder / line["file"]
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != line["sha256"]:
        raise CorruptDataError("the SHA-256 is not the manifest's", file=path, remedy=_REMEDY)
    return len(content)
