"""Bytes of a checkpoint, from a local disk or, for paths with a scheme (``gs://``, ``az://``), through blobfile."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npllama.errors import FileAccessError, SourceChangedError, TruncatedFileError


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path names an object store rather than a local file."""
    return "://" in os.fspath(path)


def _blobfile() -> Any:
    import blobfile

    return blobfile


def join(folder: str, name: str) -> str:
    """Path of a file in a folder, local or remote."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def split(path: str) -> tuple[str, str]:
    """Split a file's path, local or remote, into its folder and its name."""
    if is_remote(path):
        folder, _, name = path.rpartition("/")
        return folder, name
    return str(Path(path).parent), Path(path).name


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether the path is an existing folder."""
    path = os.fspath(path)
    return bool(_blobfile().isdir(path)) if is_remote(path) else Path(path).is_dir()


def file_names(folder: str | os.PathLike[str]) -> list[str]:
    """Names in a folder, sorted."""
    folder = os.fspath(folder)
    try:
        names = _blobfile().listdir(folder) if is_remote(folder) else [entry.name for entry in Path(folder).iterdir()]
    except OSError as problem:
        raise FileAccessError(f"cannot list the folder: {problem.strerror or problem}", file=folder) from None
    return sorted(names)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies one version of a file."""

    path: str
    size: int
    mtime_ns: int
    inode: int


def _local_fingerprint(path: str, status: os.stat_result) -> Fingerprint:
    return Fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino)


class Source:
    """One file, read at explicit offsets.

    Parameters
    ----------
    path : path-like
        A local path, or one with a scheme.

    Raises
    ------
    FileAccessError
        Missing, unreadable, or not a regular file (a pipe or device is refused before it could block).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.remote = is_remote(self.path)
        try:
            if self.remote:
                self._file: Any = _blobfile().BlobFile(self.path, "rb", streaming=True)
            else:
                if not stat.S_ISREG(Path(self.path).stat().st_mode):
                    raise FileAccessError(
                        "not a regular file", file=self.path, remedy="Name a checkpoint file or its folder."
                    )
                self._file = Path(self.path).open("rb", buffering=0)  # noqa: SIM115 - close() closes it
        except OSError as problem:
            raise FileAccessError(
                f"cannot open: {problem.strerror or problem}", file=self.path, remedy="Check the path."
            ) from None
        self.fingerprint = self._fingerprint()
        self.size = self.fingerprint.size

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def _fingerprint(self) -> Fingerprint:
        if self.remote:
            found = _blobfile().stat(self.path)
            return Fingerprint(self.path, found.size, int(found.mtime * 1e9), 0)
        return _local_fingerprint(self.path, os.fstat(self._file.fileno()))

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly ``count`` bytes from ``offset``.

        Raises
        ------
        TruncatedFileError
            The file ends before.
        FileAccessError
            The system reports an I/O error.
        """
        buffer = bytearray(count)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a writable byte buffer from ``offset``; same errors as `read`."""
        if offset < 0 or offset + len(buffer) > self.size:
            raise TruncatedFileError(
                f"{len(buffer)} bytes are needed at {offset}, but the file has {self.size}",
                file=self.path,
                remedy="The file is incomplete; fetch it again.",
            )
        done = 0
        try:
            self._file.seek(offset)
            while done < len(buffer):
                count = self._file.readinto(buffer[done:])
                if not count:
                    raise TruncatedFileError(
                        f"the file ended at byte {offset + done} of {self.size}",
                        file=self.path,
                        remedy="It was cut short while being read; fetch it again.",
                    )
                done += count
        except OSError as problem:
            raise FileAccessError(
                f"cannot read: {problem.strerror or problem}", file=self.path, offset=offset + done
            ) from None

    def sha256(self) -> str:
        """Digest of the whole file."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, 1 << 24):
            digest.update(self.read(offset, min(1 << 24, self.size - offset)))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raise SourceChangedError if the file is not the one that was opened."""
        try:
            now = self._fingerprint() if self.remote else _local_fingerprint(self.path, Path(self.path).stat())
        except OSError:
            raise SourceChangedError("the file was deleted while it was read", file=self.path) from None
        if now != self.fingerprint:
            raise SourceChangedError(
                f"the file changed while it was read (was {self.fingerprint.size} bytes, is {now.size})",
                file=self.path,
                remedy="Convert again once it is complete.",
            )

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        self._file.close()


def read_file(path: str | os.PathLike[str], limit: int = 64 << 20) -> bytes:
    """Read a small file whole; more than ``limit`` bytes is a FileAccessError."""
    source = Source(path)
    try:
        if source.size > limit:
            raise FileAccessError(f"{source.size} bytes is more than such a file can have ({limit})", file=source.path)
        return source.read(0, source.size)
    finally:
        source.close()
