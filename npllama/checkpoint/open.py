"""Any checkpoint, by what it is: a folder by the files in it, a file by its first bytes."""

from __future__ import annotations

import os
from pathlib import Path

from npllama.checkpoint.detect import detect
from npllama.checkpoint.gguf import open_gguf_checkpoint
from npllama.checkpoint.pth import open_meta, open_state_dict
from npllama.checkpoint.pth.meta import PARAMS
from npllama.checkpoint.safetensors import open_hf
from npllama.checkpoint.source import Source, file_names, is_folder, is_remote, join, split
from npllama.checkpoint.store import is_model_folder
from npllama.checkpoint.tensor import Checkpoint
from npllama.errors import NotACheckpointError, ParameterError

#: Ending of the weights -> format; in a folder without any weights, the configuration's name tells what is missing.
_WEIGHTS = {".pth": "pth", ".safetensors": "safetensors", ".gguf": "gguf"}
_CONFIGS = {"params.json": "pth", "config.json": "safetensors"}


def open_checkpoint(
    path: str | os.PathLike[str], *, rope_factor: float | None = None, verify_crc: bool = True
) -> Checkpoint:
    """Open a checkpoint of any format that npllama reads.

    Parameters
    ----------
    path : path-like
        A folder or a file, local or with a scheme.
    rope_factor : float, optional
        RoPE scaling factor, for Meta checkpoints alone: the other formats say it.
    verify_crc : bool
        Check the CRC-32 of the records of a .pth.

    Raises
    ------
    NotACheckpointError
        Nothing here is a checkpoint, or several are, or it is a converted model.
    ParameterError
        ``rope_factor`` for a checkpoint that says its own.
    NpllamaError
        As the readers raise.
    """
    path = os.fspath(path)
    if is_folder(path):
        kind, path = _look_into(path)
    else:
        source = Source(path)
        try:
            kind = detect(source)
        finally:
            source.close()
    lone = _lone_pth(path) if kind == "pth" else None
    if rope_factor is not None and (kind != "pth" or lone is not None):
        raise ParameterError("a RoPE factor was given, but only Meta's params.json leaves it open", file=path)
    found = None if lone is None else open_state_dict(lone, verify_crc=verify_crc)
    if found is not None:
        return found
    if kind == "pth":
        return open_meta(path, rope_factor=rope_factor, verify_crc=verify_crc)
    return open_hf(path) if kind == "safetensors" else open_gguf_checkpoint(path)


def _lone_pth(path: str) -> str | None:
    """Return the one ``.pth`` file that a path means, if no configuration stands beside it."""
    folder, name = (path, None) if is_folder(path) else split(path)
    names = file_names(folder)
    if PARAMS in names:
        return None
    files = [name] if name is not None else [other for other in names if other.endswith(".pth")]
    return join(folder, files[0]) if len(files) == 1 else None


def _look_into(folder: str) -> tuple[str, str]:
    """Return the format of the checkpoint in a folder, and the path to open."""
    if not is_remote(folder) and is_model_folder(Path(folder)):
        raise NotACheckpointError(
            "this is a converted model already", file=folder, remedy="Use it as it is, or name the original checkpoint."
        )
    names = file_names(folder)
    found = {kind: [name for name in names if name.endswith(ending)] for ending, kind in _WEIGHTS.items()}
    kinds = [kind for kind, files in found.items() if files] or [
        kind for name, kind in _CONFIGS.items() if name in names
    ]
    if not kinds:
        raise NotACheckpointError(
            "no .pth, .safetensors or .gguf file in the folder", file=folder, remedy="Name a checkpoint's folder."
        )
    if len(kinds) > 1 or len(found["gguf"]) > 1:
        several = ", ".join(name for kind in kinds for name in found[kind][:2]) or ", ".join(_CONFIGS)
        raise NotACheckpointError(f"several checkpoints: {several} ...", file=folder, remedy="Name the file to open.")
    return kinds[0], join(folder, found["gguf"][0]) if kinds == ["gguf"] else folder
