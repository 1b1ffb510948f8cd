"""Views with strides, read from a file in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from npllama.dtypes import Array

#: Most bytes read at once for a part that must be rearranged.
_WINDOW = 1 << 23
#: A hole of this many bytes costs less to read over than another system call.
_SMALL_GAP = 1 << 14


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a view that is not empty, both included."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def is_disjoint(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether the view's axes nest: every step is longer than what the shorter steps reach.

    True for every transposed or sliced contiguous tensor, false for expanded ones (stride 0), whose elements share
    memory.
    """
    reach = 1
    for step, length in sorted((s, n) for n, s in zip(shape, stride, strict=True) if n > 1):
        if step < reach:
            return False
        reach += (length - 1) * step
    return True


def read_view(
    read_into: Callable[[int, memoryview], None],
    dtype: np.dtype[Any],
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> Array:
    """Read a view into a new C-ordered array.

    Parameters
    ----------
    read_into : callable
        ``read_into(position, buffer)`` fills a byte buffer from a byte position.
    dtype : numpy dtype
        Of the elements.
    offset : int
        Elements before the view's first one.
    shape, stride : tuple of int
        In elements; `is_disjoint`.

    Returns
    -------
    ndarray
        Of ``shape``. Beside it, at most 8 MiB are used. Reading goes forward through the file.
    """
    out = np.empty(shape, dtype)
    if out.size:
        steps = [step for step, length in zip(stride, shape, strict=True) if length > 1]
        order = sorted(range(len(steps)), key=steps.__getitem__, reverse=True)
        in_file_order = out.squeeze().transpose(order) if steps else out.reshape(1)
        _fill(read_into, in_file_order, offset, tuple(steps[axis] for axis in order) or (1,))
    return out


def _fill(read_into: Callable[[int, memoryview], None], out: Array, offset: int, steps: tuple[int, ...]) -> None:
    """Fill ``out``, whose axes have falling ``steps`` in the file."""
    size = out.itemsize
    if out.flags.c_contiguous and span(out.shape, steps) == out.size:
        read_into(offset * size, out.reshape(-1).view(np.uint8).data)
        return
    inner = span(out.shape[1:], steps[1:])
    if inner * size > _WINDOW or _has_large_gap(out.shape[1:], steps[1:], size):
        for index in range(len(out)):
            _fill(read_into, out[index], offset + index * steps[0], steps[1:])
        return
    apart = (steps[0] - inner) * size > _SMALL_GAP
    together = 1 if apart else 1 + (_WINDOW // size - inner) // steps[0]
    for start in range(0, len(out), together):
        part = out[start : start + together]
        buffer = np.empty(span(part.shape, steps), out.dtype)
        read_into((offset + start * steps[0]) * size, buffer.view(np.uint8).data)
        part[...] = as_strided(buffer, part.shape, tuple(step * size for step in steps), writeable=False)


def _has_large_gap(shape: Sequence[int], steps: Sequence[int], size: int) -> bool:
    """Tell whether the file has a large hole between two elements of the view; ``steps`` fall."""
    return any(
        (steps[axis] - span(shape[axis + 1 :], steps[axis + 1 :])) * size > _SMALL_GAP for axis in range(len(shape))
    )
