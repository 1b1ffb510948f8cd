"""safetensors files, read strictly: a JSON header and tensors that fill the rest of the file without gap or overlap.

The format is https://github.com/huggingface/safetensors#format. It has no checksums: a damaged weight cannot be
noticed, a damaged header is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from npllama.checkpoint.detect import detect
from npllama.checkpoint.source import Source
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import STORAGE, Array
from npllama.errors import (
    CorruptDataError,
    NotACheckpointError,
    ResourceLimitError,
    TruncatedFileError,
    UnsupportedError,
)
from npllama.strict_json import parse_object

#: The format's dtype -> logical dtype, for those that npllama reads.
_DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS = 8
_MAX_NUMBERS = (1 << 60) - 1
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_REMEDY = "The file is damaged; fetch it again."


@dataclass(frozen=True, slots=True, eq=False)
class SafetensorsFile:
    """A safetensors file whose header was read.

    Attributes
    ----------
    tensors : dict of str to TensorRef
        In the order of the file's header, under the file's names.
    metadata : mapping of str to str
        The header's ``__metadata__``; empty when there is none.
    source : Source
        The open file.
    """

    tensors: dict[str, TensorRef]
    metadata: Mapping[str, str]
    source: Source


def open_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Open a safetensors file and read its header.

    Parameters
    ----------
    path : path-like
        Local, or with a scheme.

    Raises
    ------
    NotACheckpointError, EmptyFileError
        Not a safetensors file.
    ResourceLimitError
        A header longer than the format allows.
    TruncatedFileError
        The file ends before what its header promises.
    CorruptDataError
        The header is not the JSON that the format asks for, or it contradicts itself or the file's size.
    UnsupportedError
        A data type that npllama does not read.
    FileAccessError
        The file cannot be read.

    Notes
    -----
    As the format's description has it, and stricter than some readers, the header begins with ``{``.
    """
    source = Source(path)
    try:
        return _parse(source)
    except BaseException:
        source.close()
        raise


def _parse(source: Source) -> SafetensorsFile:
    text = _read_header(source)
    header = parse_object(text, error=CorruptDataError, file=source.path)
    metadata = _metadata(header.pop(_METADATA, {}), source)
    data_start = _LENGTH_BYTES + len(text)
    entries = [_entry(name, description, source) for name, description in header.items()]
    _check_layout(entries, source, data_start)
    return SafetensorsFile({entry.name: _tensor(source, entry, data_start) for entry in entries}, metadata, source)


def _read_header(source: Source) -> bytes:
    if 0 < source.size <= _LENGTH_BYTES:
        raise TruncatedFileError(
            f"the file has {source.size} bytes, and its header begins at {_LENGTH_BYTES}",
            file=source.path,
            remedy=_REMEDY,
        )
    if source.size == 0 or source.read(_LENGTH_BYTES, 1) != b"{":
        raise NotACheckpointError(
            f"this is a {detect(source)} file", file=source.path, remedy="Name a safetensors file."
        )
    length = int.from_bytes(source.read(0, _LENGTH_BYTES), "little")
    if length > _MAX_HEADER:
        raise ResourceLimitError(
            f"a header of {length} bytes, the format allows {_MAX_HEADER}", file=source.path, remedy=_REMEDY
        )
    if _LENGTH_BYTES + length > source.size:
        raise TruncatedFileError(
            f"a header of {length} bytes, but the file has {source.size}", file=source.path, remedy=_REMEDY
        )
    return source.read(_LENGTH_BYTES, length)


def _metadata(found: Any, source: Source) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _corrupt(source, _METADATA, "expected an object of strings")
    return found


def _corrupt(source: Source, record: str, message: str) -> CorruptDataError:
    return CorruptDataError(message, file=source.path, record=record, remedy=_REMEDY)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the header; bytes [begin, end) count from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(name: str, description: Any, source: Source) -> _Entry:
    if not isinstance(description, dict) or set(description) != _FIELDS:
        raise _corrupt(
            source, name, f"the description is {str(description)[:80]}, expected {', '.join(sorted(_FIELDS))}"
        )
    shape, offsets = description["shape"], description["data_offsets"]
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(map(_is_count, shape)):
        raise _corrupt(source, name, f"the shape is {str(shape)[:80]}, expected up to {_MAX_DIMS} integers from 0")
    if prod(max(length, 1) for length in shape) > _MAX_NUMBERS:
        raise _corrupt(source, name, f"a shape of {str(shape)[:80]} is impossible")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _corrupt(source, name, f"the offsets are {str(offsets)[:80]}, expected two integers from 0")
    dtype = _DTYPES.get(description["dtype"]) if isinstance(description["dtype"], str) else None
    if dtype is None:
        raise UnsupportedError(
            f"stored as {str(description['dtype'])[:40]}, which npllama does not read",
            file=source.path,
            record=name,
            remedy=f"Use a release in one of: {', '.join(_DTYPES)}.",
        )
    begin, end = offsets
    expected = prod(shape) * STORAGE[dtype].itemsize
    if end - begin != expected:
        raise _corrupt(
            source, name, f"bytes {begin} to {end} are said to hold it, but its shape needs {expected} bytes"
        )
    return _Entry(name, dtype, tuple(shape), begin, end)


def _check_layout(entries: list[_Entry], source: Source, data_start: int) -> None:
    """Hold the tensors to the file: one begins where the one before it ends, and the last ends where the file does."""
    free = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != free:
            what = "overlaps the tensor before it" if entry.begin < free else "leaves a gap before it"
            raise _corrupt(source, entry.name, f"begins at {entry.begin} and {what}, which ends at {free}")
        free = entry.end
        if data_start + free > source.size:
            raise TruncatedFileError(
                f"ends at {data_start + free}, but the file has {source.size} bytes",
                file=source.path,
                record=entry.name,
                remedy="The file is incomplete; fetch it again.",
            )
    if data_start + free != source.size:
        raise CorruptDataError(
            f"{source.size - data_start - free} unexpected bytes after the last tensor",
            file=source.path,
            offset=data_start + free,
            remedy=_REMEDY,
        )


def _tensor(source: Source, entry: _Entry, data_start: int) -> TensorRef:
    return TensorRef(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        where=f"{source.name}:{entry.name}",
        read_rows=_row_reader(source, entry, data_start + entry.begin),
        nbytes=entry.end - entry.begin,
    )


def _row_reader(source: Source, entry: _Entry, tensor_start: int) -> Callable[[int, int], Array]:
    dtype, tail = STORAGE[entry.dtype], entry.shape[1:]
    row_bytes = prod(tail) * dtype.itemsize

    def read_rows(start: int, stop: int) -> Array:
        raw = np.empty((stop - start) * row_bytes, np.uint8)
        source.read_into(tensor_start + start * row_bytes, raw.data)
        return raw.view(dtype).reshape(stop - start, *tail)

    return read_rows
