"""Writing so that a crash at any moment leaves either the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from npllama.errors import DiskSpaceError, FileAccessError, LockedError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_FALLOCATE = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_NO_FOLDER_SYNC = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_PIECE_BYTES = 2 << 20
_RESERVE = 64 << 20  # left free beside what is written: manifests, folders, other programs


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskSpaceError or FileAccessError about ``path``."""
    try:
        yield
    except OSError as problem:
        place = problem.filename or path
        reason = problem.strerror or str(problem)
        if problem.errno in _FULL:
            raise DiskSpaceError(
                f"cannot write: {reason}",
                file=place,
                remedy="Free some space and run the same command again: it resumes.",
            ) from problem
        raise FileAccessError(
            f"cannot write: {reason}", file=place, remedy="Check the path and its permissions."
        ) from problem


def require_space(folder: Path, needed: int) -> None:
    """Raise DiskSpaceError unless ``needed`` bytes, 1 % and a reserve of 64 MiB are free under the folder."""
    free = shutil.disk_usage(folder).free
    wanted = needed + needed // 100 + _RESERVE
    if free < wanted:
        raise DiskSpaceError(
            f"{wanted / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            file=folder,
            remedy="Free some space or choose a folder on another disk.",
        )


@contextlib.contextmanager
def new_file(path: Path, size: int = 0) -> Iterator[InPieces]:
    """Write a file that appears under its name only when it is whole and on the disk.

    Parameters
    ----------
    path : Path
        Final name; an existing file is replaced in one step.
    size : int
        Bytes that will be written, reserved beforehand so that a full disk shows at once; 0 when unknown.

    Yields
    ------
    InPieces
        What writes to the temporary file. When the block raises, the file is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            _reserve(file.fileno(), size)
            pieces = InPieces(file)
            yield pieces
            pieces.finish()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class InPieces:
    """Hands what is written to a file in pieces that begin and end at multiples of 2 MiB.

    The system keeps what was written in memory, in pages as large as the pieces allow. A model that is mapped behind
    its conversion is then read by huge pages, of 2 MiB, which takes the processor less time to find.

    Parameters
    ----------
    file : BinaryIO
        At its beginning.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._piece = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        view = memoryview(data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while len(self._piece) + len(view) >= _PIECE_BYTES:
            count = _PIECE_BYTES - len(self._piece)
            self._piece += view[:count]
            view = view[count:]
            self.finish()
        self._piece += view

    def finish(self) -> None:
        """Hand over what is left."""
        self._file.write(self._piece)
        self._piece = bytearray()


def _reserve(descriptor: int, size: int) -> None:
    """Claim the blocks of a file. A file system that cannot is no error; one that is full is."""
    if not size or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as problem:
        if problem.errno not in _NO_FALLOCATE:
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the only right to write ``target`` during the block.

    The right is a lock of the operating system on ``TARGET.lock``: it ends with the process, however that ends.

    Raises
    ------
    LockedError
        Another process holds it; the message names it and says since when.
    """
    import fcntl

    path = target.with_name(target.name + ".lock")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(descriptor, path):
                break
            os.close(descriptor)  # its holder removed it between our opening and our locking it
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise LockedError(
                f"another process is writing it: {_describe(holder)}",
                file=target,
                remedy="Wait for it, or choose another folder.",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, _holder(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder() -> bytes:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _describe(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f"pid {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said which"
