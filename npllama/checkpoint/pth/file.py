"""Reader of ``torch.save`` checkpoints without torch: what is in the file, and tensors that are read when asked for.

Three layers stand below: `torch_zip` finds the records, `pickle_vm` runs the pickle without doing anything, and
`torch_pickle` says which of its values are tensors. No code from the file is ever executed, nothing outside a
tensor's own record is read, and a damaged byte is noticed by the record's CRC-32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from npllama.checkpoint.detect import detect
from npllama.checkpoint.pth.pickle_vm import run
from npllama.checkpoint.pth.strided import read_view
from npllama.checkpoint.pth.torch_pickle import SYMBOLS, StateDict, StoredTensor
from npllama.checkpoint.pth.torch_zip import Archive, read_archive
from npllama.checkpoint.pth.zip_record import RecordReader
from npllama.checkpoint.source import Source
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import STORAGE, Array
from npllama.errors import ResourceLimitError, UnsupportedError

_PROGRAM = "data.pkl"
_MAX_PROGRAM = 16 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes that a tensor is made of; equal for two names of the same numbers.

    Attributes
    ----------
    path : str
        The file.
    record : str
        The zip record.
    begin : int
        Position of the first element in the file.
    dtype : str
        Logical dtype.
    shape, stride : tuple of int
        Lengths of the axes, and elements from one index to the next.
    """

    path: str
    record: str
    begin: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PthFile:
    """An open ``.pth`` file.

    Attributes
    ----------
    source : Source
        The file; the caller closes it.
    tensors : mapping of str to TensorRef
        By the file's own names, in its order. ``verify`` checks the CRC-32 of the whole record that the tensor lies
        in, reading again only what was not read in order.
    extents : mapping of str to Extent
        Where each of them lies.
    notes : tuple of str
        What a person should be told.
    """

    source: Source
    tensors: Mapping[str, TensorRef]
    extents: Mapping[str, Extent]
    notes: tuple[str, ...]


def open_pth(path: str | os.PathLike[str], *, verify_crc: bool = True) -> PthFile:
    """Open a checkpoint written by ``torch.save`` (torch 1.6 or later).

    Parameters
    ----------
    path : path-like
        The file, local or with a scheme.
    verify_crc : bool
        False reads files that were saved with torch's checksums switched off; damage then goes unnoticed.

    Returns
    -------
    PthFile
        Everything about its tensors is checked; none of their numbers are read yet.

    Raises
    ------
    NotACheckpointError, TruncatedFileError, CorruptDataError, UnsafeFileError, UnsupportedError, ResourceLimitError
        See `npllama.checkpoint.detect`, `torch_zip`, `pickle_vm` and `torch_pickle`.
    """
    source = Source(path)
    try:
        kind = detect(source)
        if kind != "pth":
            raise UnsupportedError(
                f"this is a {kind} file, not a .pth",
                file=source.path,
                remedy="Give it its own ending, or convert its folder.",
            )
        archive = read_archive(source, verify_crc=verify_crc)
        state = _read_state(source, archive, verify_crc)
        used = {f"data/{tensor.key}" for tensor in state.tensors.values()}
        readers = {name: RecordReader(source, archive.records[name], verify_crc=verify_crc) for name in sorted(used)}
        tensors, extents = {}, {}
        for name, tensor in state.tensors.items():
            reader = readers[f"data/{tensor.key}"]
            extents[name] = _extent(source, reader, tensor)
            tensors[name] = _tensor_ref(name, tensor, reader, extents[name], source.name)
    except BaseException:
        source.close()
        raise
    return PthFile(source, tensors, extents, state.notes)


def _read_state(source: Source, archive: Archive, verify_crc: bool) -> StateDict:
    record = archive.records[_PROGRAM]
    if record.size > _MAX_PROGRAM:
        raise ResourceLimitError(
            f"a pickle of {record.size} bytes, at most {_MAX_PROGRAM}",
            file=source.path,
            record=record.name,
            remedy="No checkpoint's is so large.",
        )
    program = RecordReader(source, record, verify_crc=verify_crc).read()
    root = run(program, SYMBOLS, file=source.path, record=record.name)
    sizes = {name[5:]: entry.size for name, entry in archive.records.items() if name.startswith("data/")}
    return StateDict(root, sizes, file=source.path, record=record.name)


def _extent(source: Source, reader: RecordReader, tensor: StoredTensor) -> Extent:
    begin = reader.record.offset + tensor.offset * STORAGE[tensor.dtype].itemsize
    return Extent(source.path, reader.record.name, begin, tensor.dtype, tensor.shape, tensor.stride)


def _tensor_ref(name: str, tensor: StoredTensor, reader: RecordReader, extent: Extent, file: str) -> TensorRef:
    dtype = STORAGE[tensor.dtype]

    def read_rows(start: int, stop: int) -> Array:
        if not tensor.shape:
            return read_view(reader.read_into, dtype, tensor.offset, (), ())
        offset = tensor.offset + start * tensor.stride[0]
        return read_view(reader.read_into, dtype, offset, (stop - start, *tensor.shape[1:]), tensor.stride)

    return TensorRef(
        name=name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        where=f"{file}:{reader.record.name}",
        read_rows=read_rows,
        nbytes=prod(tensor.shape) * dtype.itemsize,
        alias=extent,
        verify=reader.check,
    )
