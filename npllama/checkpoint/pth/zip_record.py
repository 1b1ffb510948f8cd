"""One record of a zip archive: its bytes, and its checksum, computed as the bytes go by."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from npllama.checkpoint.source import Source
from npllama.errors import CorruptDataError

_BLOCK = 1 << 22
#: A hole of this many bytes between two reads is cheaper to read than to come back for.
_SMALL_GAP = 1 << 16


@dataclass(frozen=True, slots=True)
class Record:
    """Where a stored record lies.

    Attributes
    ----------
    name : str
        Full name in the archive, ``consolidated.00/data/17``.
    offset : int
        Position of its first data byte in the file.
    size : int
        Bytes of data.
    crc : int
        CRC-32 that the archive's directory promises.
    """

    name: str
    offset: int
    size: int
    crc: int


class RecordReader:
    """Reads a record, keeping the CRC-32 of the part read so far from its beginning.

    Reads that move forward extend the checksum, so a record read front to back is read once. `check` reads only what
    is still missing, and nothing when it has succeeded before.

    Parameters
    ----------
    source : Source
        The archive.
    record : Record
        What to read.
    verify_crc : bool
        False: `check` accepts anything.
    """

    def __init__(self, source: Source, record: Record, *, verify_crc: bool) -> None:
        self.record = record
        self._source = source
        self._settled = not verify_crc
        self._covered = 0
        self._crc = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a writable byte buffer from ``offset`` within the record; errors as those of `Source.read_into`."""
        if not self._settled and self._covered < offset <= self._covered + _SMALL_GAP:
            self._cover(offset)
        self._source.read_into(self.record.offset + offset, buffer)
        known = self._covered - offset
        if not self._settled and 0 <= known < len(buffer):
            self._crc = zlib.crc32(buffer[known:], self._crc)
            self._covered = offset + len(buffer)

    def read(self) -> bytes:
        """Read and check the whole record."""
        data = bytearray(self.record.size)
        self.read_into(0, memoryview(data))
        self.check()
        return bytes(data)

    def check(self) -> None:
        """Compare the CRC-32 of the whole record with the promised one.

        Raises
        ------
        CorruptDataError
            They differ.
        """
        if self._settled:
            return
        self._cover(self.record.size)
        if self._crc != self.record.crc:
            raise CorruptDataError(
                f"the CRC-32 is {self._crc:08x}, expected {self.record.crc:08x}: the data is damaged",
                file=self._source.path,
                record=self.record.name,
                remedy="Fetch the file again. If it was saved with torch's checksums switched off, read it with "
                "verify_crc=False.",
            )
        self._settled = True

    def _cover(self, end: int) -> None:
        """Extend the checksum to ``end`` by reading what lies before it."""
        buffer = memoryview(bytearray(min(_BLOCK, max(0, end - self._covered))))
        while self._covered < end:
            part = buffer[: end - self._covered]
            self._source.read_into(self.record.offset + self._covered, part)
            self._crc = zlib.crc32(part, self._crc)
            self._covered += len(part)
