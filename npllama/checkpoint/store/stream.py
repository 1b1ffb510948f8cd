"""One tensor from its source to its file, a block of rows at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from npllama.checkpoint.store.disk import disk_errors, new_file
from npllama.checkpoint.store.manifest import Entry
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import STORAGE, Array, cast
from npllama.errors import CorruptDataError

_BLOCK_BYTES = 1 << 23  # of a block as read or as written, whichever is larger


def write_tensor(folder: Path, entry: Entry, ref: TensorRef, *, allow_nan: bool, advance: Callable[[int], None]) -> str:
    """Write a tensor's file.

    Parameters
    ----------
    folder : Path
        Folder of the store.
    entry : Entry
        What to write: file, dtype and shape.
    ref : TensorRef
        Where the numbers come from; same shape.
    allow_nan : bool
        Let NaN and infinities pass.
    advance : callable
        Called with the number of bytes written, block by block.

    Returns
    -------
    str
        SHA-256 of the file.

    Raises
    ------
    CorruptDataError
        The tensor has NaN or infinities, or its source is damaged.
    DiskSpaceError, FileAccessError
        The disk.
    """
    path = folder / entry.file
    digest = hashlib.sha256(entry.header)
    with disk_errors(path), new_file(path, entry.file_bytes) as file:
        file.write(entry.header)
        for block in _finite(ref, entry, _blocks(ref, entry), allow_nan):
            file.write(block.data)
            digest.update(block.data)
            advance(block.nbytes)
        ref.verify()
    return digest.hexdigest()


def _blocks(ref: TensorRef, entry: Entry) -> Iterator[Array]:
    """Yield the converted numbers, flat, in blocks of whole rows."""
    rows = max(1, _BLOCK_BYTES // max(ref.row_bytes, entry.data_bytes // ref.n_rows))
    for start in range(0, ref.n_rows, rows):
        stop = min(start + rows, ref.n_rows)
        values = ref.read_rows(start, stop)
        if values.size != (stop - start) * ref.row_bytes // values.itemsize:
            raise CorruptDataError(f"rows {start} to {stop} have {values.size} numbers", file=ref.where)
        converted = cast(values, ref.dtype, entry.dtype)
        yield np.ascontiguousarray(converted, dtype=STORAGE[entry.dtype]).reshape(-1)


def _finite(ref: TensorRef, entry: Entry, blocks: Iterator[Array], allow_nan: bool) -> Iterator[Array]:
    """Pass blocks on, and raise behind the last one if any number was NaN or infinite."""
    position, first, n_nan, n_infinite = 0, -1, 0, 0
    for block in blocks:
        yield block
        bad = _not_finite(block, entry.dtype)
        if bad.any():
            nan = _nan(block, entry.dtype)
            first = position + int(bad.argmax()) if first < 0 else first
            n_nan += int(nan.sum())
            n_infinite += int(bad.sum()) - int(nan.sum())
        position += block.size
    if first >= 0 and not allow_nan:
        index = [int(axis) for axis in np.unravel_index(first, entry.shape)]
        raise CorruptDataError(
            f"{entry.name} has {n_nan} NaN and {n_infinite} infinite numbers, the first at {index}",
            file=ref.where,
            remedy="Fetch the file again; to convert it as it is, use --allow-nan (allow_nan=True).",
        )


def _not_finite(block: Array, dtype: str) -> Array:
    """Tell NaN and infinities: all bits of the exponent are set."""
    if dtype == "bfloat16":
        return np.asarray((block & 0x7F80) == 0x7F80)
    return ~np.isfinite(block)


def _nan(block: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return np.asarray((block & 0x7FFF) > 0x7F80)
    return np.asarray(np.isnan(block))
