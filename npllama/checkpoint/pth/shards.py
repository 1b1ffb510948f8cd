"""Meta's model-parallel shards, put together tensor by tensor and row block by row block.

Every shard has every tensor's name. A matrix is cut along its output or its input, the embedding along either, and
what is not cut is in every shard alike. Nothing is read before a row block is asked for, and then only that block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from npllama.checkpoint.names import EMBEDDING, Expected
from npllama.checkpoint.pth.file import Extent, PthFile
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import Array, widen
from npllama.errors import ConfigMismatchError, ShardError

_KEYS_AND_VALUES = ("attention.wk.weight", "attention.wv.weight")
_MIXED = "The shards belong to different checkpoints; fetch all of one again."

RowReader: TypeAlias = Callable[[int, int], Array]


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A tensor of the whole model and the parts it is made of, one for each shard that is read.

    Attributes
    ----------
    ref : TensorRef
        The whole.
    parts : tuple of TensorRef
        As the files have them.
    extents : tuple of Extent
        Where each part lies.
    """

    ref: TensorRef
    parts: tuple[TensorRef, ...]
    extents: tuple[Extent, ...]


def check_alike(files: Sequence[PthFile]) -> None:
    """Hold all shards to the first one's names, dtypes and shapes.

    Raises
    ------
    ShardError
        Naming the first difference.
    """
    first = files[0]
    for other in files[1:]:
        where, reference = other.source.path, first.source.name
        for name in first.tensors.keys() ^ other.tensors.keys():
            has, lacks = (reference, "this shard") if name in first.tensors else ("this shard", reference)
            raise ShardError(f"{name} is in {has}, but not in {lacks}", file=where, remedy=_MIXED)
        for name, ref in first.tensors.items():
            found = other.tensors[name]
            if (found.dtype, found.shape) != (ref.dtype, ref.shape):
                raise ShardError(
                    f"{name} is {found.dtype} {found.shape}, but {ref.dtype} {ref.shape} in {reference}",
                    file=where,
                    remedy=_MIXED,
                )


def merge(files: Sequence[PthFile], table: Mapping[str, Expected]) -> dict[str, Merged]:
    """Put every tensor of the shards together.

    Parameters
    ----------
    files : sequence of PthFile
        The shards in order; `check_alike`.
    table : mapping of str to Expected
        Whole shapes and shard axes.

    Returns
    -------
    dict of str to Merged
        A name that the table does not have is taken from the first shard, as it is. So is every tensor of a single
        file, whatever its shape: matching it with the configuration is the caller's next step.

    Raises
    ------
    ConfigMismatchError
        A tensor's parts do not add up to its shape.
    """
    merged = {}
    for name in files[0].tensors:
        parts = tuple(file.tensors[name] for file in files)
        entry = table.get(name)
        if entry is None:
            parts = parts[:1]
        ref = parts[0] if entry is None or len(parts) == 1 else _join(entry, parts, files[0].source.path)
        extents = tuple(file.extents[name] for file in files[: len(parts)])
        merged[name] = Merged(ref, parts, extents)
    return merged


def share_checks(merged: Mapping[str, Merged]) -> dict[str, TensorRef]:
    """Let each zip record be checked by the last tensor that is read from it, so that it is read once.

    Parameters
    ----------
    merged : mapping of str to Merged
        The tensors that belong to the model.

    Returns
    -------
    dict of str to TensorRef
        The tensors, each layer's in the order of the first file: whoever reads them in this order reads every record
        front to back. Any other order gives the same checks, at the price of reading some records twice.

    Notes
    -----
    Which tensor answers for a record depends on the names alone, not on what was read before: a conversion that is
    interrupted and resumed reads that tensor either before or after. Every layer answers for the records that it
    touches, since a conversion may take some layers and leave the others.
    """
    order: list[str] = []
    layers: dict[str, list[str]] = {}
    for name in merged:
        layers.setdefault(_layer(name), []).append(name)
    for names in layers.values():
        order += sorted(names, key=lambda name: merged[name].extents[0].begin)
    last: dict[tuple[str, str, str], tuple[str, int]] = {}
    for name in order:
        for index, extent in enumerate(merged[name].extents):
            last[extent.path, extent.record, _layer(name)] = (name, index)
    answers = set(last.values())
    return {
        name: _checked_by(merged[name].ref, [p for i, p in enumerate(merged[name].parts) if (name, i) in answers])
        for name in order
    }


def _layer(name: str) -> str:
    """Return ``layers.3`` for a tensor of a layer, and the name itself for any other."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else name


def _checked_by(ref: TensorRef, parts: Iterable[TensorRef]) -> TensorRef:
    parts = tuple(parts)

    def verify() -> None:
        for part in parts:
            part.verify()

    return replace(ref, verify=verify)


def _join(entry: Expected, parts: Sequence[TensorRef], file: str) -> TensorRef:
    """Choose, by the shapes alone, how the parts make the whole."""
    count, local = len(parts), parts[0].shape
    axes = (0, 1) if entry.name == EMBEDDING else (entry.shard_axis,)
    for axis in axes:
        if axis is None and local == entry.shape:
            return _replicated(parts)
        if axis is not None and _grown(local, axis, count) == entry.shape:
            return _concatenated(parts, axis)
    if entry.name.endswith(_KEYS_AND_VALUES) and local[1:] == entry.shape[1:]:
        # More shards than key/value heads: each head is repeated in neighbouring shards.
        copies, rest = divmod(count * local[0], entry.shape[0])
        if copies > 1 and rest == 0 and count % copies == 0:
            return _concatenated([_replicated(parts[i : i + copies]) for i in range(0, count, copies)], 0)
    raise ConfigMismatchError(
        f"{entry.name} has the shape {local} in each of {count} shards, which does not add up to {entry.shape}",
        file=file,
        remedy="A shard is missing, or params.json belongs to another model.",
    )


def _grown(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return tuple(length * count if index == axis else length for index, length in enumerate(shape))


def _replicated(parts: Sequence[TensorRef]) -> TensorRef:
    """Return the first of several parts that must be equal, comparing every block that is read."""
    first, others = parts[0], parts[1:]

    def read_rows(start: int, stop: int) -> Array:
        block = first.read_rows(start, stop)
        for other in others:
            _compare(first, block, other, other.read_rows(start, stop))
        return block

    return replace(first, read_rows=read_rows, nbytes=sum(part.nbytes for part in parts))


def _compare(first: TensorRef, block: Array, other: TensorRef, found: Array) -> None:
    if np.array_equal(block.reshape(-1).view(np.uint8), found.reshape(-1).view(np.uint8)):
        return
    with np.errstate(invalid="ignore"):
        difference = np.abs(widen(block, first.dtype, np.float64) - widen(found, other.dtype, np.float64)).max()
    raise ShardError(
        f"{first.name} must be equal in all shards, but {other.where} differs from {first.where} by up to "
        f"{difference:.3g}",
        remedy=_MIXED,
    )


def _concatenated(parts: Sequence[TensorRef], axis: int) -> TensorRef:
    """Join equal shapes along axis 0 or 1."""
    first = parts[0]
    read_rows = _rows_in_turn(parts) if axis == 0 else _rows_side_by_side(parts)
    return TensorRef(
        name=first.name,
        shape=_grown(first.shape, axis, len(parts)),
        dtype=first.dtype,
        where=f"{first.where} and {len(parts) - 1} more",
        read_rows=read_rows,
        nbytes=sum(part.nbytes for part in parts),
        alias=(axis, *(part.alias for part in parts)),
    )


def _rows_in_turn(parts: Sequence[TensorRef]) -> RowReader:
    height = parts[0].n_rows

    def read_rows(start: int, stop: int) -> Array:
        first = start // height
        blocks = [
            part.read_rows(max(start - base, 0), min(stop - base, height))
            for base, part in (
                (index * height, parts[index]) for index in range(first, max(first + 1, -(-stop // height)))
            )
        ]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    return read_rows


def _rows_side_by_side(parts: Sequence[TensorRef]) -> RowReader:
    width = parts[0].shape[1]

    def read_rows(start: int, stop: int) -> Array:
        strip = parts[0].read_rows(start, stop)
        block = np.empty((stop - start, width * len(parts)), strip.dtype)
        block[:, :width] = strip
        for index, part in enumerate(parts[1:], 1):
            block[:, index * width : (index + 1) * width] = part.read_rows(start, stop)
        return block

    return read_rows
