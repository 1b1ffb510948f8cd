"""The diary of a conversion: what it converts, and which tensors are already on the disk.

``journal.jsonl`` lies in the partial folder. Its first line is the plan; each further line is a tensor whose files are
complete. A line counts only if it ends: the one that a crash cut short is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npllama.checkpoint.store import manifest as manifests
from npllama.checkpoint.store.disk import sync_folder
from npllama.errors import DestinationExistsError

FILE_NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True, eq=False)
class Journal:
    """An open journal.

    Attributes
    ----------
    folder : Path
        The partial folder.
    done : dict of str to tuple of str
        Canonical name -> SHA-256 of each of the tensor's files, all complete.
    restarted : bool
        An earlier attempt was thrown away, because it was about something else.
    """

    folder: Path
    done: dict[str, tuple[str, ...]]
    restarted: bool = False

    def append(self, name: str, sha256: tuple[str, ...]) -> None:
        """Record that a tensor's files are complete; returns when the line is on the disk."""
        self.done[name] = sha256
        _append(self.folder / FILE_NAME, {"name": name, "sha256": sha256})

    def remove(self) -> None:
        """Delete the file, as the last act before the folder gets its final name."""
        (self.folder / FILE_NAME).unlink()


def open_journal(folder: Path, plan: Mapping[str, Any]) -> Journal:
    """Begin a conversion in ``folder``, or take up the one that is there.

    Parameters
    ----------
    folder : Path
        The partial folder; made if it is missing.
    plan : mapping
        Everything that the output depends on, as JSON values (lists, no tuples). An earlier attempt with another
        plan is discarded.

    Raises
    ------
    DestinationExistsError
        The folder is there and is not a conversion's.
    OSError
        From the disk.
    """
    lines = _read(folder / FILE_NAME)
    if lines and lines[0] == {"plan": plan}:
        (folder / "weights").mkdir(exist_ok=True)
        done = {line["name"]: tuple(line["sha256"]) for line in lines[1:]}
        return Journal(folder, {name: sha256 for name, sha256 in done.items() if _exist(folder, name, len(sha256))})
    if os.path.lexists(folder):
        _discard(folder)
    folder.mkdir()
    _append(folder / FILE_NAME, {"plan": plan})
    (folder / "weights").mkdir()
    sync_folder(folder)
    sync_folder(folder.parent)
    return Journal(folder, {}, restarted=bool(lines))


def _exist(folder: Path, name: str, count: int) -> bool:
    return all((folder / file).exists() for file in manifests.part_files(name, count))


def _discard(folder: Path) -> None:
    """Remove an earlier attempt: a folder with a journal, or with a manifest (its last moments), or still empty."""
    if not folder.is_dir() or not (
        (folder / FILE_NAME).exists() or manifests.is_model_folder(folder) or not any(folder.iterdir())
    ):
        raise DestinationExistsError(
            "in the way, and not an interrupted conversion", file=folder, remedy="Move it, or choose another folder."
        )
    shutil.rmtree(folder)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines; the file is cut behind them."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in complete.splitlines()]
    except ValueError:
        return []
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    return lines


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(line).encode("ascii") + b"\n")
        file.flush()
        os.fsync(file.fileno())
