"""The values that a GGUF header is made of, read one after the other from a file that may lie about every length."""

from __future__ import annotations

from typing import Any

import numpy as np

from npllama.checkpoint.source import Source
from npllama.dtypes import Array
from npllama.errors import CorruptDataError, ResourceLimitError, TruncatedFileError, UnsupportedError

#: Metadata value types that are numbers; 7 is a bool, in one byte.
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

# Several times what the largest vocabularies need. Short strings take up to seven times their place in the file.
_MAX_HEADER = 128 << 20
_BLOCK = 1 << 20


class Cursor:
    """Reads forward from the start of a file; holds what it has read, and fetches no further than it must.

    ``record`` names what is being read, for messages.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position = 0
        self.record = "header"
        self._data = bytearray()

    def corrupt(self, message: str) -> CorruptDataError:
        """Return an error that says where the file contradicts itself."""
        return CorruptDataError(
            message,
            file=self.source.path,
            record=self.record,
            offset=self.position,
            remedy="The file is damaged; fetch it again.",
        )

    def _reach(self, end: int) -> None:
        """Have the file's first ``end`` bytes at hand."""
        if end > self.source.size:
            raise TruncatedFileError(
                f"{end - self.position} bytes are needed, but the file ends at {self.source.size}",
                file=self.source.path,
                record=self.record,
                offset=self.position,
                remedy="The file is incomplete or damaged; fetch it again.",
            )
        if end > _MAX_HEADER:
            raise ResourceLimitError(
                f"the header is larger than {_MAX_HEADER} bytes",
                file=self.source.path,
                record=self.record,
                remedy="No real model has one; the file is damaged.",
            )
        have = len(self._data)
        if end > have:
            self._data += self.source.read(have, min(max(end - have, _BLOCK), self.source.size - have))

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes."""
        end = self.position + count
        self._reach(end)
        taken = bytes(self._data[self.position : end])
        self.position = end
        return taken

    def number(self, kind: int) -> Any:
        """Return the next number as a Python int, float or bool."""
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> Array:
        """Return the next ``count`` numbers of one type, read-only."""
        dtype = _NUMBERS[kind]
        values: Array = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind != BOOL:
            return values
        if (values > 1).any():
            raise self.corrupt(f"a bool has the value {values.max()}")
        return values.view(np.bool_)

    def length(self) -> int:
        """Return the next 64-bit length."""
        return int.from_bytes(self.take(8), "little")

    def strings(self, count: int) -> list[str]:
        """Return the next ``count`` strings.

        Vocabularies have hundreds of thousands, so the loop does no more than it must.
        """
        self._reach(self.position + 8 * count)
        found = []
        data, position = self._data, self.position
        for _ in range(count):
            self.position = position
            start = position + 8
            if start > len(data):
                self._reach(start)
            position = start + int.from_bytes(data[position:start], "little")
            if position > len(data):
                self._reach(position)
            try:
                found.append(data[start:position].decode())
            except UnicodeDecodeError as problem:
                raise self.corrupt(f"string {len(found)} is not UTF-8 at its byte {problem.start}") from None
        self.position = position
        return found

    def name(self, longest: int) -> str:
        """Return a key's or tensor's name."""
        start = self.position
        size = self.length()
        self.position = start
        if not 1 <= size <= longest:
            raise self.corrupt(f"a name has {size} bytes, expected 1 to {longest}")
        return self.strings(1)[0]

    def value(self, kind: int) -> Any:
        """Return the next metadata value: a number, a bool, a str, a list of str, or an ndarray of numbers."""
        if kind != ARRAY:
            return self._single(kind)
        kind, count = self.number(UINT32), self.length()
        if kind == STRING:
            return self.strings(count)
        if kind in _NUMBERS:
            return self.numbers(kind, count)
        if kind == ARRAY:
            raise UnsupportedError("an array of arrays", file=self.source.path, record=self.record)
        raise self.corrupt(f"there is no value type {kind}")

    def _single(self, kind: int) -> Any:
        if kind == STRING:
            return self.strings(1)[0]
        if kind in _NUMBERS:
            return self.number(kind)
        raise self.corrupt(f"there is no value type {kind}")
