"""GGUF files: metadata and the tensor directory, without trusting any number in them.

The format is ggml's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little endian. Only
the header is read here; a tensor's bytes are read when its rows are asked for. The format has no checksums: a damaged
weight cannot be noticed, a damaged header is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from npllama.checkpoint.detect import detect
from npllama.checkpoint.gguf.blocks import ENCODINGS, UNREAD, Encoding
from npllama.checkpoint.gguf.values import UINT32, Cursor
from npllama.checkpoint.source import Source
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import Array
from npllama.errors import (
    NotACheckpointError,
    TruncatedFileError,
    UnsupportedError,
)

_MAGIC_BYTES = 4
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32

# ggml's own limits.
_MAX_DIMS = 4
_MAX_NAME = 64
_MAX_KEY = (1 << 16) - 1
_MAX_NUMBERS = (1 << 63) - 1

# The smallest entry of each list: a bool under a key of one letter, a scalar with a name of one letter.
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """A GGUF file whose header was read.

    Attributes
    ----------
    metadata : mapping of str to object
        Python numbers, bools and strings; lists of str; read-only one-dimensional ndarrays for arrays of numbers.
    tensors : dict of str to TensorRef
        In the file's order, under the file's names. Shapes are in NumPy's order, the slowest axis first. A tensor of
        more than two axes, the matrices of E experts (E, M, N), is one matrix (E*M, N): they stand under one another.
        F32, F16, BF16 and F64 keep their dtype; block-quantised tensors yield float32 and carry their ``encoding``.
    stacks : mapping of str to int
        How many matrices stand under one another in each tensor that the file gives more than two axes.
    source : Source
        The open file.
    """

    metadata: Mapping[str, Any]
    tensors: dict[str, TensorRef]
    stacks: Mapping[str, int]
    source: Source


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a GGUF file and read its header.

    Parameters
    ----------
    path : path-like
        Local, or with a scheme.

    Raises
    ------
    NotACheckpointError, EmptyFileError
        Not a GGUF file.
    UnsupportedError
        Another version or byte order, nested arrays, or a tensor in an encoding that npllama does not read.
    TruncatedFileError
        The file ends before what its header promises.
    CorruptDataError
        The header contradicts itself.
    ResourceLimitError
        The header is larger than any real one.
    FileAccessError
        The file cannot be read.
    """
    source = Source(path)
    try:
        return _parse(source)
    except BaseException:
        source.close()
        raise


def _parse(source: Source) -> GgufFile:
    cursor = Cursor(source)
    _check_magic(cursor)
    n_tensors = _count(cursor, "tensors", _MIN_TENSOR_BYTES)
    n_pairs = _count(cursor, "metadata pairs", _MIN_PAIR_BYTES)
    metadata = _read_metadata(cursor, n_pairs)
    alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
    entries = _read_directory(cursor, n_tensors, alignment)
    data_start = _align(cursor.position, alignment)
    return GgufFile(
        metadata,
        tensors={entry.name: _tensor(source, entry, data_start + entry.offset) for entry in entries},
        stacks={entry.name: prod(entry.dims[:-2]) for entry in entries if len(entry.dims) > 2},
        source=source,
    )


def _check_magic(cursor: Cursor) -> None:
    path = cursor.source.path
    kind = detect(cursor.source)
    if kind != "gguf":
        raise NotACheckpointError(f"this is a {kind} file", file=path, remedy="Name a GGUF file.")
    cursor.take(_MAGIC_BYTES)
    version = cursor.number(UINT32)
    if version and not version & 0xFFFF:
        raise UnsupportedError(
            "a big-endian GGUF file", file=path, remedy="Use the little-endian release of the model."
        )
    if version not in _VERSIONS:
        raise UnsupportedError(
            f"GGUF version {version}; versions 2 and 3 are read",
            file=path,
            remedy="Use a current release of the model.",
        )


def _count(cursor: Cursor, what: str, smallest: int) -> int:
    count = cursor.length()
    left = cursor.source.size - cursor.position
    if count > left // smallest:
        raise cursor.corrupt(f"the header promises {count} {what}, and {left} bytes follow")
    return count


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        cursor.record = f"metadata pair {index}"
        key = cursor.name(_MAX_KEY)
        cursor.record = f"key {key!r}"
        if key in metadata:
            raise cursor.corrupt("the key appears twice")
        kind = cursor.number(UINT32)
        if key == _ALIGNMENT and kind != UINT32:
            raise cursor.corrupt(f"the alignment has value type {kind}, expected {UINT32} (uint32)")
        metadata[key] = cursor.value(kind)
    return metadata


@dataclass(frozen=True, slots=True)
class _Entry:
    """One line of the tensor directory; ``offset`` counts from the start of the data."""

    name: str
    dims: tuple[int, ...]
    encoding: Encoding
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Matrices under one another are one matrix."""
        return self.dims if len(self.dims) <= 2 else (prod(self.dims[:-1]), self.dims[-1])

    @property
    def nbytes(self) -> int:
        return prod(self.dims) // self.encoding.block_size * self.encoding.block_bytes


def _read_directory(cursor: Cursor, count: int, alignment: int) -> list[_Entry]:
    """Read the directory; tensors must lie one after the other, each at the next aligned offset, inside the file."""
    if alignment < 1 or alignment & (alignment - 1):
        cursor.record = f"key {_ALIGNMENT!r}"
        raise cursor.corrupt(f"the alignment is {alignment}, expected a power of two")
    entries: dict[str, _Entry] = {}
    free = 0
    for index in range(count):
        cursor.record = f"tensor {index}"
        entry = _read_entry(cursor)
        if entry.name in entries:
            raise cursor.corrupt("two tensors have this name")
        if entry.offset != free:
            raise cursor.corrupt(f"the data are said to be at {entry.offset}, but {free} is the next aligned place")
        entries[entry.name] = entry
        free = _align(entry.offset + entry.nbytes, alignment)
    return list(entries.values())


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _read_entry(cursor: Cursor) -> _Entry:
    name = cursor.name(_MAX_NAME)
    cursor.record = f"tensor {name!r}"
    n_dims = cursor.number(UINT32)
    if n_dims > _MAX_DIMS:
        raise cursor.corrupt(f"{n_dims} dimensions, expected at most {_MAX_DIMS}")
    dims = tuple(cursor.length() for _ in range(n_dims))[::-1]
    if not 1 <= prod(dims) <= _MAX_NUMBERS:
        raise cursor.corrupt(f"a shape of {' x '.join(map(str, dims))} is impossible")
    number = cursor.number(UINT32)
    encoding = ENCODINGS.get(number)
    if encoding is None:
        raise UnsupportedError(
            f"stored as {UNREAD.get(number, f'the unknown type {number}')}, which npllama does not read",
            file=cursor.source.path,
            record=cursor.record,
            remedy=f"Use a release in one of: {', '.join(known.name for known in ENCODINGS.values())}.",
        )
    row = dims[-1] if dims else 1
    if row % encoding.block_size:
        raise cursor.corrupt(f"a row of {row} numbers is not a multiple of {encoding.name}'s {encoding.block_size}")
    return _Entry(name, dims, encoding, cursor.length())


def _tensor(source: Source, entry: _Entry, start: int) -> TensorRef:
    """Make the reference to a tensor whose bytes begin at ``start`` of the file."""
    if start + entry.nbytes > source.size:
        raise TruncatedFileError(
            f"its {entry.nbytes} bytes begin at {start}, but the file ends at {source.size}",
            file=source.path,
            record=f"tensor {entry.name!r}",
            remedy="The file is incomplete; fetch it again.",
        )
    return TensorRef(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.encoding.dtype,
        where=f"{source.name}:{entry.name}",
        read_rows=_row_reader(source, entry, start),
        nbytes=entry.nbytes,
        encoding=entry.encoding.name if entry.encoding.unpack else "",
    )


def _row_reader(source: Source, entry: _Entry, tensor_start: int) -> Callable[[int, int], Array]:
    encoding, tail = entry.encoding, entry.shape[1:]
    row = prod(tail)

    def read_rows(start: int, stop: int) -> Array:
        # A row of one number (the tensor has one axis) can begin inside a block: read whole ones, then cut.
        first = start * row // encoding.block_size
        last = -(-stop * row // encoding.block_size)
        raw = np.empty((last - first) * encoding.block_bytes, np.uint8)
        source.read_into(tensor_start + first * encoding.block_bytes, raw.data)
        skip = start * row - first * encoding.block_size
        numbers = encoding.decode(raw)[skip : skip + (stop - start) * row]
        return numbers.reshape(stop - start, *tail)

    return read_rows
