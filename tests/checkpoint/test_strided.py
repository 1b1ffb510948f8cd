"""Views must be read exactly, front to back, in little memory, whatever their strides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.checkpoint.pth import strided
from npllama.checkpoint.pth.strided import is_disjoint, read_view, span


class Disk:
    """A byte buffer that notes what is read from it."""

    def __init__(self, values: np.ndarray) -> None:
        self._bytes = values.tobytes()
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= len(self._bytes)
        buffer[:] = self._bytes[offset : offset + len(buffer)]
        self.reads.append((offset, len(buffer)))

    @property
    def bytes_read(self) -> int:
        return sum(count for _, count in self.reads)


@st.composite
def views(draw: st.DrawFn) -> np.ndarray:
    """A permuted slice of a contiguous array."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
    base = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    index = tuple(slice(draw(st.integers(0, n - 1)), draw(st.integers(1, n)), draw(st.integers(1, 3))) for n in shape)
    return base[index].transpose(draw(st.permutations(range(len(shape)))))


@pytest.mark.parametrize(("window", "gap"), [(1 << 23, 1 << 14), (64, 0), (32, 16), (4, 1 << 14)])
@given(view=views())
@settings(max_examples=80, deadline=None)
def test_every_permuted_slice_is_read_exactly(window: int, gap: int, view: np.ndarray) -> None:
    base = view if view.base is None else view.base
    stride = tuple(step // view.itemsize for step in view.strides)
    offset = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // view.itemsize
    assert is_disjoint(view.shape, stride)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "_WINDOW", window)
        patch.setattr(strided, "_SMALL_GAP", gap)
        found = read_view(Disk(base).read_into, view.dtype, offset, view.shape, stride)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, view)


def test_contiguous_rows_are_one_read() -> None:
    disk = Disk(np.arange(600, dtype=np.float32))
    read_view(disk.read_into, np.dtype(np.float32), 100, (5, 100), (100, 1))
    assert disk.reads == [(400, 2000)]


def test_a_transposed_matrix_is_read_forward_once() -> None:
    base = np.arange(4096 * 512, dtype=np.float32).reshape(4096, 512)
    disk = Disk(base)
    found = read_view(disk.read_into, base.dtype, 0, (512, 4096), (1, 512))
    np.testing.assert_array_equal(found, base.T)
    assert disk.bytes_read == base.nbytes
    assert disk.reads == sorted(disk.reads)


def test_some_rows_of_a_wide_transposed_matrix_do_not_read_the_rest() -> None:
    base = np.zeros((64, 100_000), np.float32)
    disk = Disk(base)
    read_view(disk.read_into, base.dtype, 0, (1000, 64), (1, 100_000))
    assert disk.bytes_read == 1000 * 64 * 4


def test_a_buffer_never_exceeds_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strided, "_WINDOW", 1 << 12)
    base = np.zeros((300, 100), np.float32)
    disk = Disk(base)
    read_view(disk.read_into, base.dtype, 0, (100, 300), (1, 100))
    assert max(count for _, count in disk.reads) <= 1 << 12


@pytest.mark.parametrize(
    ("shape", "stride", "disjoint"),
    [
        ((), (), True),
        ((5,), (1,), True),
        ((3, 4), (4, 1), True),
        ((4, 3), (1, 4), True),
        ((3, 1), (1, 0), True),
        ((4, 3), (0, 1), False),
        ((3, 3), (1, 1), False),
        ((3, 4), (3, 1), False),
        ((2, 2), (2, 3), True),
        ((3, 2), (2, 3), False),
    ],
)
def test_views_whose_elements_share_memory_are_recognised(
    shape: tuple[int, ...], stride: tuple[int, ...], disjoint: bool
) -> None:
    assert is_disjoint(shape, stride) is disjoint


def test_span_counts_both_ends() -> None:
    assert span((), ()) == 1
    assert span((3, 4), (4, 1)) == 12
    assert span((2, 3), (100, 7)) == 1 + 100 + 14
