"""One tensor from its source to its files, a block of rows at a time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from npllama.checkpoint.quantize import quantize
from npllama.checkpoint.store.disk import disk_errors, new_file
from npllama.checkpoint.store.manifest import Entry
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import LARGEST, PACKINGS, SCALE, STORAGE, Array, cast, widen
from npllama.errors import CorruptDataError

_BLOCK_BYTES = 1 << 23  # of a block as read or as float32, whichever is larger


def write_tensor(
    folder: Path,
    entry: Entry,
    ref: TensorRef,
    *,
    allow_nan: bool,
    advance: Callable[[int], None],
    importance: Array | None = None,
) -> tuple[str, ...]:
    """Write a tensor's files.

    Parameters
    ----------
    folder : Path
        Folder of the store.
    entry : Entry
        What to write: files, dtype and shape.
    ref : TensorRef
        Where the numbers come from; same shape.
    allow_nan : bool
        Let NaN and infinities pass.
    advance : callable
        Called with the number of bytes written, block by block.
    importance : ndarray of shape (N,), optional
        By how much an error counts in each column of a matrix that becomes integers; see `quantize`.

    Returns
    -------
    tuple of str
        SHA-256 of each file.

    Raises
    ------
    CorruptDataError
        The tensor has NaN or infinities, or its source is damaged.
    DiskSpaceError, FileAccessError
        The disk.
    """
    digests = [hashlib.sha256(part.header) for part in entry.parts]
    with disk_errors(folder / entry.parts[0].file), contextlib.ExitStack() as stack:
        files = [stack.enter_context(new_file(folder / part.file, part.file_bytes)) for part in entry.parts]
        for part, file in zip(entry.parts, files, strict=True):
            file.write(part.header)
        for arrays in _finite(ref, entry, importance, allow_nan):
            for array, file, digest in zip(arrays, files, digests, strict=True):
                file.write(array.data)
                digest.update(array.data)
            advance(sum(array.nbytes for array in arrays))
        ref.verify()
    return tuple(digest.hexdigest() for digest in digests)


def _blocks(ref: TensorRef) -> Iterator[Array]:
    """Yield the source's numbers in blocks of whole rows."""
    rows = max(1, _BLOCK_BYTES // max(ref.row_bytes, 4 * ref.row_bytes // STORAGE[ref.dtype].itemsize))
    for start in range(0, ref.n_rows, rows):
        stop = min(start + rows, ref.n_rows)
        values = ref.read_rows(start, stop)
        if values.size != (stop - start) * ref.row_bytes // values.itemsize:
            raise CorruptDataError(f"rows {start} to {stop} have {values.size} numbers", file=ref.where)
        yield values


def _stored(values: Array, ref: TensorRef, dtype: str, importance: Array | None) -> tuple[Array, ...]:
    """Return a block's arrays as they are written."""
    if dtype in PACKINGS:
        return quantize(cast(values, ref.dtype, "float32"), dtype, importance)
    return (np.ascontiguousarray(cast(values, ref.dtype, dtype), dtype=STORAGE[dtype]),)


def _finite(ref: TensorRef, entry: Entry, importance: Array | None, allow_nan: bool) -> Iterator[tuple[Array, ...]]:
    """Yield the arrays of each block, and raise behind the last one if any number was NaN or infinite."""
    position, first, n_nan, n_infinite = 0, -1, 0, 0
    for block in _blocks(ref):
        arrays = _stored(block, ref, entry.dtype, importance)
        yield arrays
        if _has_bad(arrays, entry.dtype):
            bad, nan = _bad(block, ref.dtype, entry.dtype)
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


def _has_bad(arrays: tuple[Array, ...], dtype: str) -> bool:
    """Tell whether a block has NaN or infinities: of integers, a group that has them has NaN for a scale."""
    stored, dtype = (arrays[1], SCALE) if dtype in PACKINGS else (arrays[0], dtype)
    return bool(_not_finite(stored, dtype).any())


def _bad(block: Array, source: str, dtype: str) -> tuple[Array, Array]:
    """Tell which numbers of a block cannot be stored, and which of these are NaN."""
    if dtype in PACKINGS:
        numbers = np.abs(cast(block, source, "float32"))
        return ~(numbers <= LARGEST), np.isnan(numbers)
    numbers = cast(block, source, dtype)
    bad = _not_finite(numbers, dtype)
    return bad, bad & np.isnan(widen(numbers, dtype))


def _not_finite(block: Array, dtype: str) -> Array:
    """Tell NaN and infinities: all bits of the exponent are set."""
    if dtype == "bfloat16":
        return np.asarray((block & 0x7F80) == 0x7F80)
    return ~np.isfinite(block)
