"""Checkpoints as Meta publishes them: ``consolidated.*.pth`` with ``params.json`` and ``tokenizer.model``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from npllama.checkpoint.names import EMBEDDING, OUTPUT, expected, is_ignored, select
from npllama.checkpoint.pth.file import PthFile, open_pth
from npllama.checkpoint.pth.shards import Merged, check_alike, merge, share_checks
from npllama.checkpoint.source import file_names, is_folder, join, read_file, split
from npllama.checkpoint.tensor import Checkpoint
from npllama.checkpoint.tokenizer_files import META, tokenizer_files
from npllama.config import from_params_json
from npllama.errors import ConfigError, NotACheckpointError, ShardError, UnsupportedError

PARAMS = "params.json"

_SHARD = re.compile(r"consolidated\.([0-9]{1,4})\.pth")
_WHOLE = "consolidated.pth"
_CHECKLIST = "checklist.chk"
_PREFIXES = ("model.", "module.")
_NORM = "norm.weight"

#: A file that only another kind of checkpoint has.
_OTHER_FOLDERS = (
    (re.compile(r"fp8_scales_.*"), "Meta's fp8 release"),
    (re.compile(r"\.metadata|.*\.distcp"), "a checkpoint of torch.distributed"),
)
#: A tensor that only another kind of checkpoint has.
_OTHER_TENSORS = (
    (re.compile(r".*\.scales"), "Meta's quantised (SpinQuant or QLoRA) release"),
    (re.compile(r".*\b(adaptor|lora_[ab])\b.*", re.IGNORECASE), "a release with LoRA adaptors"),
)
_PLAIN = "Take the plain bf16 release of the model."


def open_meta(path: str | os.PathLike[str], *, rope_factor: float | None = None, verify_crc: bool = True) -> Checkpoint:
    """Open a Meta checkpoint.

    Parameters
    ----------
    path : path-like
        A folder with ``consolidated.00.pth`` ... and ``params.json``, or one ``.pth`` file with ``params.json``
        beside it.
    rope_factor : float, optional
        Overrides the RoPE scaling factor that ``params.json`` leaves open.
    verify_crc : bool
        As for `open_pth`.

    Returns
    -------
    Checkpoint
        Tensors of the whole model under canonical names, in the order that reads each file once.

    Raises
    ------
    ShardError
        A shard is missing, or the shards do not belong together.
    ConfigError, ConfigMismatchError
        ``params.json`` is missing or wrong, or the tensors are not those that it describes.
    UnsupportedError
        A quantised release, or another kind of checkpoint.
    NpllamaError
        As `open_pth` raises.

    Notes
    -----
    The axis along which a matrix is cut is found by its shape: Llama 3 cuts the embedding along V, Llama 1 and 2 along
    D. Tensors that every shard repeats are compared while they are read.
    """
    path = os.fspath(path)
    folder, weights = (path, None) if is_folder(path) else split(path)
    names = file_names(folder)
    shards = _shard_names(folder, names) if weights is None else _one_file(folder, weights, names)
    if PARAMS not in names:
        raise ConfigError(
            f"no {PARAMS} beside the weights",
            file=folder,
            remedy="It holds the model's shape; put the one that came with the weights into the same folder.",
        )
    with ExitStack() as stack:
        files = []
        for shard in shards:
            files.append(_without_prefix(open_pth(join(folder, shard), verify_crc=verify_crc)))
            stack.callback(files[-1].source.close)
        checkpoint = _assemble(path, folder, names, files, rope_factor)
        stack.pop_all()
    return checkpoint


def _assemble(
    path: str, folder: str, names: list[str], files: Sequence[PthFile], rope_factor: float | None
) -> Checkpoint:
    """Make the whole model of opened shards."""
    _refuse_others(files[0].tensors, _OTHER_TENSORS, files[0].source.path)
    check_alike(files)
    params = join(folder, PARAMS)
    config, notes = from_params_json(read_file(params), params, rope_factor=rope_factor, vocab_size=_vocab_size(files))
    merged = merge(files, expected(replace(config, tied=False)))
    config = replace(config, tied=_is_tied(merged))
    chosen = select({name: entry.ref for name, entry in merged.items()}, config, path)
    tokenizer = tokenizer_files(folder, names, META)
    found_notes = [*notes, *files[0].notes]
    if ignored := [name for name in merged if is_ignored(name)]:
        found_notes.append(f"computed anew, not taken from the checkpoint: {', '.join(ignored[:3])}")
    if OUTPUT not in merged:
        found_notes.append(f"the checkpoint has no {OUTPUT}: the embedding serves as the output matrix")
    if not tokenizer:
        found_notes.append(f"no {META} beside the weights: the model will take and give token ids only")
    return Checkpoint(
        kind="meta",
        path=path,
        config=config,
        tensors=share_checks({name: merged[name] for name in chosen}),
        tokenizer=tokenizer,
        notes=tuple(found_notes),
        sources=tuple(file.source for file in files),
        rope_layout="interleaved",
    )


def _refuse_others(names: Iterable[str], kinds: Sequence[tuple[re.Pattern[str], str]], file: str) -> None:
    for name in names:
        for pattern, what in kinds:
            if pattern.fullmatch(name):
                raise UnsupportedError(f"this is {what} (it has {name})", file=file, remedy=_PLAIN)


def _shard_names(folder: str, names: Sequence[str]) -> list[str]:
    """Return the shards' file names in order, or that of the whole checkpoint."""
    _refuse_others(names, _OTHER_FOLDERS, folder)
    numbered: dict[int, str] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match and numbered.setdefault(int(match[1]), name) != name:
            raise ShardError(f"{numbered[int(match[1])]} and {name} are the same shard twice", file=folder)
    if not numbered and _WHOLE in names:
        return [_WHOLE]
    if not numbered:
        raise NotACheckpointError(
            "no consolidated.00.pth in the folder", file=folder, remedy="Name the folder that holds a Meta checkpoint."
        )
    listed = {*numbered, *_listed_shards(folder, names)}
    count = max(listed) + 1
    missing = [number for number in range(count) if number not in numbered]
    if missing:
        raise ShardError(
            f"shard {missing[0]:02d} of {count} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""),
            file=folder,
            remedy="Shards are numbered from consolidated.00.pth on; fetch the missing ones.",
        )
    return [numbered[number] for number in range(count)]


def _listed_shards(folder: str, names: Sequence[str]) -> list[int]:
    """Return the numbers of the shards that Meta's list of checksums names, if the folder has it."""
    if _CHECKLIST not in names:
        return []
    text = read_file(join(folder, _CHECKLIST)).decode("utf-8", "replace")
    return [int(number) for number in re.findall(rf"(?<![\w.-]){_SHARD.pattern}(?!\S)", text)]


def _one_file(folder: str, weights: str, names: Sequence[str]) -> list[str]:
    """Return the one file, unless it is a shard among others."""
    others = [name for name in names if _SHARD.fullmatch(name) and name != weights]
    if _SHARD.fullmatch(weights) and others:
        raise ShardError(
            f"{weights} is one of {len(others) + 1} shards", file=folder, remedy="Name the folder instead of one shard."
        )
    return [weights]


def _without_prefix(file: PthFile) -> PthFile:
    """Strip ``model.`` or ``module.`` from every name, if that gives Meta's names."""
    for prefix in _PREFIXES:
        if prefix + EMBEDDING in file.tensors and all(name.startswith(prefix) for name in file.tensors):
            cut = len(prefix)
            return replace(
                file,
                tensors={name[cut:]: ref for name, ref in file.tensors.items()},
                extents={name[cut:]: extent for name, extent in file.extents.items()},
                notes=(*file.notes, f"the names' prefix {prefix!r} was taken off"),
            )
    return file


def _vocab_size(files: Sequence[PthFile]) -> int | None:
    """Infer V from the embedding's shape, (V/S, D) or (V, D/S), where the norm tells D."""
    embedding, norm = files[0].tensors.get(EMBEDDING), files[0].tensors.get(_NORM)
    if embedding is None or norm is None or len(embedding.shape) != 2 or len(norm.shape) != 1:
        return None
    rows, columns = embedding.shape
    return rows * len(files) if columns == norm.shape[0] else rows


def _is_tied(merged: dict[str, Merged]) -> bool:
    """Tell whether the output matrix is the embedding: absent, or the same bytes."""
    if OUTPUT not in merged or EMBEDDING not in merged:
        return OUTPUT not in merged
    return merged[OUTPUT].ref.alias == merged[EMBEDDING].ref.alias
