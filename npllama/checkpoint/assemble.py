"""A checkpoint's tensors brought to the canonical ones: found, split, joined, transposed, their rotated rows in pairs.

Nothing is read here: every step wraps the row reader of the step before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from npllama.checkpoint.names import OUTPUT, Expected, Format, check_names, expected, mismatch
from npllama.checkpoint.rope import interleaved
from npllama.checkpoint.spellings import Spelling
from npllama.checkpoint.tensor import TensorRef
from npllama.config import ModelConfig
from npllama.dtypes import Array

_LAYER = re.compile(r"layers\.(\d+)\.")
_TRANSPOSED = "^T"


@dataclass(frozen=True, slots=True)
class _Source:
    """A tensor of the file, and the canonical tensors that are its blocks of rows."""

    spelling: str
    blocks: tuple[Expected, ...]

    @property
    def name(self) -> str:
        return self.spelling.removesuffix(_TRANSPOSED)

    @property
    def transposed(self) -> bool:
        return self.spelling.endswith(_TRANSPOSED)

    @property
    def files(self) -> tuple[str, ...]:
        """Names in the file: one, or one for each expert."""
        if "{e}" not in self.name:
            return (self.name,)
        return tuple(self.name.format(e=e) for e in range(self.blocks[0].stacked))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each tensor of the file."""
        rows = sum(block.shape[0] for block in self.blocks) // len(self.files)
        shape = (rows, *self.blocks[0].shape[1:])
        return shape[::-1] if self.transposed else shape


def assemble(
    found: Mapping[str, TensorRef], config: ModelConfig, form: Format, spelling: Spelling, file: str
) -> dict[str, TensorRef]:
    """Make the canonical tensors of a checkpoint's own, strictly: nothing missing, unknown, or of another shape.

    Parameters
    ----------
    found : mapping of str to TensorRef
        As the checkpoint spells them.
    config : ModelConfig
        What the checkpoint says it is.
    form : {"hf", "gguf"}
        Column of the table of names.
    spelling : Spelling
        What the family does otherwise.
    file : str
        Place for messages.

    Returns
    -------
    dict of str to TensorRef
        Canonical name -> tensor, in the order of the forward pass.

    Raises
    ------
    ConfigMismatchError
        Tensors are missing, unknown, or of another shape.
    """
    if spelling.prefix and not any(name.startswith(spelling.prefix) for name in found):
        found = {spelling.prefix + name: ref for name, ref in found.items()}
    table = expected(config)
    sources = list(_sources(table, form, spelling, found))
    wanted = {name: source.shape for source in sources for name in source.files}
    if config.tied:
        # Some checkpoints bring a copy of the embedding under the output matrix's name.
        (output,) = _sources({OUTPUT: expected(replace(config, tied=False))[OUTPUT]}, form, spelling, found)
        found = {name: ref for name, ref in found.items() if name != output.name}
    found = {name: _flattened(ref, wanted.get(name)) for name, ref in found.items()}
    check_names(found, wanted, file)
    parts = {part.name: part for source in sources for part in _parts(source, found)}
    if not spelling.half_split:
        return {name: parts[name] for name in table}
    return {
        name: interleaved(parts[name], entry.heads, config.head_dim) if entry.heads else parts[name]
        for name, entry in table.items()
    }


def _sources(
    table: Mapping[str, Expected], form: Format, spelling: Spelling, found: Mapping[str, TensorRef]
) -> Iterator[_Source]:
    """Yield the tensors that a file must have, each with the canonical tensors that it holds."""
    blocks: dict[str, list[Expected]] = {}
    for entry in table.values():
        layer = _LAYER.match(entry.name)
        general = _LAYER.sub("layers.{i}.", entry.name)
        text = (spelling.experts if entry.stacked else {}).get(general) or spelling.names.get(general)
        if text is None:
            text = getattr(entry, form)
        elif layer:
            text = text.replace("{i}", layer[1])
        blocks.setdefault(_present(text.split("|"), found), []).append(entry)
    for text, entries in blocks.items():
        yield _Source(text, tuple(entries))


def _present(spellings: Sequence[str], found: Mapping[str, TensorRef]) -> str:
    """Return the spelling that a file uses; the first if it uses none."""
    for text in spellings:
        if text.removesuffix(_TRANSPOSED).replace("{e}", "0") in found:
            return text
    return spellings[0]


def _parts(source: _Source, found: Mapping[str, TensorRef]) -> Iterator[TensorRef]:
    """Yield the canonical tensors of a source, under their canonical names."""
    refs = [found[name] for name in source.files]
    if source.transposed:
        refs = [_transposed(ref) for ref in refs]
    whole = refs[0] if len(refs) == 1 else _stacked(refs)
    start = 0
    for block in source.blocks:
        stop = start + block.shape[0]
        part = whole if len(source.blocks) == 1 else _rows(whole, start, stop)
        yield replace(part, name=block.name)
        start = stop


def _flattened(ref: TensorRef, shape: tuple[int, ...] | None) -> TensorRef:
    """Give a vector the shape of the one row that it is, where one row is wanted."""
    if shape is None or len(shape) != 2 or shape[0] != 1 or ref.shape != shape[1:]:
        return ref
    return replace(ref, shape=shape, read_rows=lambda start, stop: ref.read_rows(0, shape[1])[None][start:stop])


def _rows(ref: TensorRef, first: int, last: int) -> TensorRef:
    """Return rows [first, last) of a tensor."""
    return replace(
        ref,
        shape=(last - first, *ref.shape[1:]),
        read_rows=lambda start, stop: ref.read_rows(first + start, first + stop),
        nbytes=ref.nbytes * (last - first) // max(1, ref.shape[0]),
        alias=None,
    )


def _transposed(ref: TensorRef) -> TensorRef:
    """Return the transposed matrix: its rows are columns of the file's, and each block of them reads all of it."""

    def read_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(ref.read_rows(0, ref.shape[0])[:, start:stop].T)

    return replace(ref, shape=ref.shape[::-1], read_rows=read_rows, alias=None)


def _stacked(refs: Sequence[TensorRef]) -> TensorRef:
    """Put matrices of one shape under one another."""
    each = refs[0].shape[0]

    def read_rows(start: int, stop: int) -> Array:
        blocks = []
        for i in range(start // each, -(-stop // each)):
            first, last = max(start - i * each, 0), min(stop - i * each, each)
            blocks.append(refs[i].read_rows(first, last))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def verify() -> None:
        for ref in refs:
            ref.verify()

    if len({ref.dtype for ref in refs}) > 1:
        raise mismatch("dtypes differ between experts", [f"{ref.name} is {ref.dtype}" for ref in refs], refs[0].where)
    return replace(
        refs[0],
        shape=(each * len(refs), *refs[0].shape[1:]),
        read_rows=read_rows,
        nbytes=sum(ref.nbytes for ref in refs),
        alias=None,
        verify=verify,
    )
