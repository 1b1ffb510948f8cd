"""The last step of a conversion: a finished folder gets its name, and an older one of that name goes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from npllama.checkpoint.store.disk import sync_folder
from npllama.checkpoint.store.manifest import FILE_NAME, is_model_folder
from npllama.errors import DestinationExistsError

_REPLACED = ".replaced"


def check_destination(target: Path, force: bool) -> None:
    """Raise DestinationExistsError unless ``target`` is free, empty, or a model that ``force`` may replace."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_model_folder(target):
        raise DestinationExistsError(
            f"it exists and is not a model folder of npllama (no {FILE_NAME} of its own), so it will not be replaced",
            file=target,
            remedy="Choose another folder.",
        )
    if not force:
        raise DestinationExistsError(
            "the model folder exists", file=target, remedy="Use it, or replace it with --force (force=True)."
        )


def recover(target: Path) -> None:
    """Finish or undo a replacement that a crash interrupted."""
    aside = _aside(target)
    if not is_model_folder(aside):
        return
    if is_model_folder(target):
        shutil.rmtree(aside)
    else:
        aside.rename(target)


def publish(finished: Path, target: Path) -> None:
    """Give a finished folder its name in one step.

    A folder cannot take the place of one that has content, so an old model is renamed aside, and renamed back if the
    new one cannot come in. Whoever has the old files mapped keeps them.
    """
    for folder in (finished / "weights", finished / "tokenizer", finished):
        if folder.exists():
            sync_folder(folder)
    aside = _aside(target)
    replaces = is_model_folder(target)
    if replaces:
        target.rename(aside)
    try:
        finished.rename(target)
    except OSError:
        if replaces:
            aside.rename(target)
        raise
    sync_folder(target.parent)
    if replaces:
        shutil.rmtree(aside)


def _aside(target: Path) -> Path:
    return target.with_name(target.name + _REPLACED)
