"""Hugging Face checkpoints: a folder with config.json and safetensors weights, in one file or in shards.

Hugging Face's Llama orders the rotated rows of queries and keys by halves; here, and nowhere else, they are brought
into the interleaved pairs that every store has.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from npllama.checkpoint.assemble import assemble
from npllama.checkpoint.safetensors.file import SafetensorsFile, open_safetensors
from npllama.checkpoint.source import file_names, is_folder, join, read_file, split
from npllama.checkpoint.spellings import HF
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.checkpoint.tokenizer_files import HUGGING_FACE, tokenizer_files
from npllama.config import from_hf_json
from npllama.errors import CorruptDataError, NotACheckpointError, ShardError, UnsafeFileError
from npllama.strict_json import parse_object

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def open_hf(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face checkpoint.

    Parameters
    ----------
    path : path-like
        A folder with ``config.json`` and either ``model.safetensors`` (preferred) or ``model.safetensors.index.json``;
        or one safetensors file with ``config.json`` beside it.

    Raises
    ------
    NotACheckpointError
        No ``config.json``, or no safetensors weights.
    ShardError
        A shard is missing, or the index and the shards contradict each other.
    UnsafeFileError
        The index names a file outside the folder.
    NpllamaError
        As `open_safetensors`, `npllama.config.from_hf_json` and `npllama.checkpoint.names.select` raise.
    """
    path = os.fspath(path)
    folder, weights = (path, None) if is_folder(path) else split(path)
    names = file_names(folder)
    if CONFIG not in names:
        raise NotACheckpointError(
            f"no {CONFIG} in the folder", file=folder, remedy="Name the folder of a whole checkpoint."
        )
    config_path = join(folder, CONFIG)
    config, notes = from_hf_json(read_file(config_path), config_path)
    with ExitStack() as stack:
        files = _open_weights(stack, folder, weights, names)
        found = {name: ref for file in files for name, ref in file.tensors.items()}
        spelling = HF[config.family]
        checkpoint = Checkpoint(
            kind="hf",
            path=path,
            config=config,
            tensors=assemble(found, config, "hf", spelling, path),
            tokenizer=tokenizer_files(folder, names, HUGGING_FACE),
            notes=notes,
            sources=tuple(file.source for file in files),
            rope_layout="half-split" if spelling.half_split else "interleaved",
        )
        stack.pop_all()
    return checkpoint


def _open(stack: ExitStack, path: str) -> SafetensorsFile:
    file = open_safetensors(path)
    stack.callback(file.source.close)
    return file


def _open_weights(stack: ExitStack, folder: str, weights: str | None, names: list[str]) -> list[SafetensorsFile]:
    """Open the file or the shards that hold the weights; the stack closes them."""
    if weights is None and WEIGHTS in names:
        weights = WEIGHTS
    if weights is not None:
        return [_open(stack, join(folder, weights))]
    if INDEX not in names:
        raise NotACheckpointError(
            f"neither {WEIGHTS} nor {INDEX} in the folder",
            file=folder,
            remedy="Only safetensors weights are read from Hugging Face checkpoints.",
        )
    index = join(folder, INDEX)
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise ShardError(
            f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}",
            file=folder,
            remedy="Fetch the whole checkpoint.",
        )
    files = {shard: _open(stack, join(folder, shard)) for shard in shards}
    _check_index(weight_map, {shard: file.tensors for shard, file in files.items()}, index)
    return list(files.values())


def _weight_map(index: str) -> dict[str, str]:
    """Read tensor name -> shard name; a shard is a file of the same folder, and nothing else."""
    weight_map = parse_object(read_file(index), error=CorruptDataError, file=index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptDataError(
            "weight_map is not an object of file names", file=index, remedy="The file is damaged; fetch it again."
        )
    for name, shard in weight_map.items():
        if any(mark in shard for mark in ("/", "\\", "\0", ":")) or not shard.endswith(".safetensors"):
            raise UnsafeFileError(
                f"the shard is said to be {shard!r}, expected the name of a .safetensors file in this folder",
                file=index,
                record=name,
                remedy="Do not use this checkpoint; fetch it from its makers.",
            )
    return weight_map


def _check_index(weight_map: dict[str, str], shards: dict[str, dict[str, TensorRef]], index: str) -> None:
    """Hold the index to the shards: each tensor is in the shard that the index names, and in no other."""
    for shard, tensors in shards.items():
        for name in tensors:
            if weight_map.get(name) != shard:
                said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ShardError(
                    f"{name} is in {shard}, but the index says that it is {said}",
                    file=index,
                    remedy="The files belong to different checkpoints; fetch all of one again.",
                )
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ShardError(
                f"{name} is not in {shard}, where the index says that it is",
                file=index,
                remedy="The files belong to different checkpoints; fetch all of one again.",
            )
