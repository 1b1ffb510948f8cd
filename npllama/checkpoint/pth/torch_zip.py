"""The zip archive that ``torch.save`` writes, read strictly.

Only what torch writes is accepted: stored (uncompressed) records in one folder, nothing before, between the parts of,
or after the archive that a second reader could see differently. The layout is that of PKWARE's APPNOTE 6.3.10; what
torch puts in it is in ``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from npllama.checkpoint.pth.zip_record import Record, RecordReader
from npllama.checkpoint.source import Source
from npllama.errors import CorruptDataError, NpllamaError, TruncatedFileError, UnsafeFileError, UnsupportedError

_END = struct.Struct("<4s4H2IH")
_END_MAGIC = b"PK\x05\x06"
_LOCATOR64 = struct.Struct("<4sIQI")
_LOCATOR64_MAGIC = b"PK\x06\x07"
_END64 = struct.Struct("<4sQ2H2I4Q")
_END64_MAGIC = b"PK\x06\x06"
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_CENTRAL_MAGIC = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3I2H")
_LOCAL_MAGIC = b"PK\x03\x04"
_ZIP64_FIELD = 1

_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
#: Bit 3: sizes follow the data. Bit 11: names are UTF-8.
_KNOWN_FLAGS = 0x0808

#: The attribute that makes other readers take a record for an empty folder.
_FOLDER = 0x10

_MAX_RECORDS = 200_000
_MAX_DIRECTORY = 64 << 20
_MAX_NAME = 512
_MAX_MARKER = 1024
_MAX_COMMENT = 0xFFFF

_STORAGE = re.compile(r"data/[0-9]{1,9}")
_MARKERS = frozenset({"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"})
_OTHER_ARCHIVES = {
    "constants.pkl": "a TorchScript model",
    "code": "a TorchScript model",
    "archive_format": "a torch.export archive (.pt2)",
    "archive_version": "a torch.export archive (.pt2)",
    "models": "a torch.export archive (.pt2)",
}
_FETCH_AGAIN = "The file is damaged; fetch it again."
_SAVE_AGAIN = "Load it with torch and save the state dict again with torch.save."


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of a torch archive.

    Attributes
    ----------
    root : str
        The one folder that holds them, for example ``consolidated.00``.
    records : mapping of str to Record
        By name below the root: ``data.pkl``, ``data/0``, ``byteorder``.
    """

    root: str
    records: Mapping[str, Record]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the central directory, as far as it matters."""

    name: str
    flags: int
    size: int
    crc: int
    header: int


def read_archive(source: Source, *, verify_crc: bool) -> Archive:
    """Read and check an archive's directory, and its small marker records.

    Parameters
    ----------
    source : Source
        The file.
    verify_crc : bool
        Whether the marker records' checksums must hold.

    Raises
    ------
    TruncatedFileError
        The directory at the end is missing.
    CorruptDataError
        The directory, the local headers and the file's size contradict one another, or bytes belong to no record.
    UnsafeFileError
        Record names that are not plain relative paths under one root.
    UnsupportedError
        Compression, encryption, big-endian data, TorchScript and other archives, more records than any checkpoint.
    """
    count, start, size = _find_directory(source)
    entries = _read_directory(source, count, start, size)
    root = _check_names(source.path, entries)
    spans = sorted((_local_span(source, entry, start) for entry in entries), key=lambda span: span[0])
    end_of_previous = 0
    for position, record in spans:
        if position < end_of_previous:
            raise _corrupt(source.path, "the record overlaps the one before", record.name, position)
        end_of_previous = record.offset + record.size
    if spans[0][0] != 0:
        raise _corrupt(source.path, f"{spans[0][0]} unexpected bytes before the archive")
    records = {record.name[len(root) + 1 :]: record for _, record in spans}
    if "data.pkl" not in records:
        raise UnsupportedError(
            "the zip archive has no data.pkl: it was not written by torch.save", file=source.path, remedy=_SAVE_AGAIN
        )
    _check_markers(source, records, verify_crc)
    return Archive(root, records)


def _corrupt(file: str, message: str, record: str | None = None, offset: int | None = None) -> CorruptDataError:
    return CorruptDataError(message, file=file, record=record, offset=offset, remedy=_FETCH_AGAIN)


def _find_directory(source: Source) -> tuple[int, int, int]:
    """Return (entries, first byte, bytes) of the central directory."""
    end = source.size - _END.size
    if end < 0:
        raise _without_end(source)
    magic, disk, first_disk, here, count, size, start, comment = _END.unpack(source.read(end, _END.size))
    if magic != _END_MAGIC or comment:
        raise _without_end(source)
    if max(disk, first_disk) not in (0, _FULL16):
        raise UnsupportedError("a zip archive in several volumes", file=source.path, offset=end)
    narrow = (here, count, size, start)
    wide = _find_directory64(source, end)
    directory_end = end
    if wide is not None:
        directory_end, values = wide
        limits = (_FULL16, _FULL16, _FULL32, _FULL32)
        if any(short not in (full, limit) for short, full, limit in zip(narrow, values, limits, strict=True)):
            raise _corrupt(source.path, "the two ends of the zip directory disagree", offset=end)
        here, count, size, start = values
    if here != count or start + size != directory_end:
        raise _corrupt(
            source.path, f"the zip directory ends at byte {start + size}, expected {directory_end}", offset=end
        )
    if count > _MAX_RECORDS or size > _MAX_DIRECTORY:
        raise UnsupportedError(
            f"too many records: {count} in a directory of {size} bytes, at most {_MAX_RECORDS} in {_MAX_DIRECTORY}",
            file=source.path,
            remedy="No checkpoint has so many.",
        )
    return count, start, size


def _find_directory64(source: Source, end: int) -> tuple[int, tuple[int, int, int, int]] | None:
    """Return the zip64 end's position and its (here, count, size, start), if the archive has one before ``end``."""
    at = end - _LOCATOR64.size
    if at < _END64.size:
        return None
    magic, disk, position, disks = _LOCATOR64.unpack(source.read(at, _LOCATOR64.size))
    if magic != _LOCATOR64_MAGIC:
        return None
    if disk != 0 or disks != 1 or position != at - _END64.size:
        raise _corrupt(source.path, f"the zip64 locator points to {position}, expected {at - _END64.size}", offset=at)
    magic, length, _, _, disk, first_disk, here, count, size, start = _END64.unpack(source.read(position, _END64.size))
    if magic != _END64_MAGIC or length != _END64.size - 12 or disk or first_disk:
        raise _corrupt(source.path, "the zip64 end of the directory is malformed", offset=position)
    return position, (here, count, size, start)


def _without_end(source: Source) -> NpllamaError:
    """Tell a cut file from one with something after its end."""
    reach = min(source.size, _END.size + _MAX_COMMENT)
    found = source.read(source.size - reach, reach).rfind(_END_MAGIC)
    extra = reach - found - _END.size
    if found >= 0 and extra >= 0:
        what = f"{extra} unexpected bytes after the archive" if extra else "the end of the zip directory is malformed"
        return _corrupt(source.path, what)
    return TruncatedFileError(
        f"the zip directory is not at the end of the file's {source.size} bytes: the file was cut short",
        file=source.path,
        remedy="Download it again, or resume the download.",
    )


def _read_directory(source: Source, count: int, start: int, size: int) -> list[_Entry]:
    directory = source.read(start, size)
    entries: list[_Entry] = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            raise _corrupt(source.path, f"the zip directory has fewer than its {count} entries", offset=start + at)
        entry, length = _read_entry(source.path, directory, at, start)
        entries.append(entry)
        at += length
    if at != size or not entries:
        raise _corrupt(source.path, f"the zip directory's {count} entries take {at} bytes, expected {size}")
    return entries


def _read_entry(file: str, directory: bytes, at: int, start: int) -> tuple[_Entry, int]:
    """Return the entry at ``at`` and its length."""
    fields = _CENTRAL.unpack_from(directory, at)
    magic, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment, disk, _, attributes, header = (
        fields
    )
    length = _CENTRAL.size + n_name + n_extra + n_comment
    if magic != _CENTRAL_MAGIC or n_comment or attributes & _FOLDER or at + length > len(directory):
        raise _corrupt(file, "an entry of the zip directory is malformed", offset=start + at)
    raw = directory[at + _CENTRAL.size : at + _CENTRAL.size + n_name]
    name = raw.decode("ascii", "backslashreplace")
    if not raw.isascii() or n_name > _MAX_NAME:
        raise UnsafeFileError(f"a record name of {n_name} bytes is not short and ASCII", file=file, offset=start + at)
    if flags & ~_KNOWN_FLAGS:
        raise UnsupportedError(f"zip flags 0x{flags:04x}: encrypted or patched data", file=file, record=name)
    if method:
        raise UnsupportedError("the record is compressed", file=file, record=name, remedy=_SAVE_AGAIN)
    extra = directory[at + length - n_extra : at + length]
    size, packed, header, disk = _widen(file, name, extra, (size, packed, header, disk))
    if packed != size:
        raise _corrupt(file, f"a stored record has two sizes, {packed} and {size}", name)
    if disk:
        raise UnsupportedError("a zip archive in several volumes", file=file, record=name)
    return _Entry(name, flags, size, crc, header), length


def _widen(file: str, name: str, extra: bytes, narrow: tuple[int, ...]) -> tuple[int, ...]:
    """Replace saturated 32-bit fields by those of the zip64 extra field."""
    wide, at = b"", 0
    while at < len(extra):
        kind, length = struct.unpack_from("<HH", extra, at) if at + 4 <= len(extra) else (0, len(extra))
        if at + 4 + length > len(extra) or (kind == _ZIP64_FIELD and wide):
            raise _corrupt(file, "the record's extra fields are malformed", name)
        if kind == _ZIP64_FIELD:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    values, at = [], 0
    for value, full, layout in zip(narrow, (_FULL32, _FULL32, _FULL32, _FULL16), ("<Q", "<Q", "<Q", "<I"), strict=True):
        if value == full:
            if at + struct.calcsize(layout) > len(wide):
                raise _corrupt(file, "a zip64 size or offset is missing", name)
            (value,) = struct.unpack_from(layout, wide, at)
            at += struct.calcsize(layout)
        values.append(value)
    return tuple(values)


def _check_names(file: str, entries: list[_Entry]) -> str:
    """Return the one root folder of the records."""
    root = entries[0].name.partition("/")[0]
    seen: set[str] = set()
    for entry in entries:
        name = entry.name
        first, _, rest = name.partition("/")
        if {"", ".", ".."} & set(name.split("/")) or "\\" in name or not name.isprintable():
            raise UnsafeFileError(f"the record name {name!r} is not a plain relative path", file=file)
        if first != root or not rest:
            raise UnsafeFileError(f"the record {name!r} is outside the archive's folder {root!r}", file=file)
        if name.casefold() in seen:
            raise _corrupt(file, f"two records are named {name!r}")
        seen.add(name.casefold())
        other = _OTHER_ARCHIVES.get(rest) or _OTHER_ARCHIVES.get(rest.partition("/")[0])
        if other:
            raise UnsupportedError(f"this is {other}, not a checkpoint", file=file, record=name, remedy=_SAVE_AGAIN)
        if rest != "data.pkl" and rest not in _MARKERS and not _STORAGE.fullmatch(rest):
            raise UnsupportedError("a record that torch.save does not write", file=file, record=name)
    return root


def _local_span(source: Source, entry: _Entry, directory: int) -> tuple[int, Record]:
    """Check a record's local header; return its position and the record.

    The data begins after the *local* name and extra fields, whose length differs from the directory's: torch pads
    there to align the data.
    """
    length = _LOCAL.size + len(entry.name)
    if entry.header + length > directory:
        raise _corrupt(source.path, f"the record begins at {entry.header}, after the last one", entry.name)
    header = source.read(entry.header, length)
    magic, _, flags, method, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack_from(header)
    same = magic == _LOCAL_MAGIC and flags == entry.flags and method == 0 and n_name == len(entry.name)
    if not same or header[_LOCAL.size :] != entry.name.encode("ascii"):
        raise _corrupt(source.path, "the record's own header contradicts the zip directory", entry.name, entry.header)
    begin = entry.header + length + n_extra
    if begin + entry.size > directory:
        raise _corrupt(
            source.path, f"{entry.size} bytes at {begin} run into the zip directory at {directory}", entry.name
        )
    return entry.header, Record(entry.name, begin, entry.size, entry.crc)


def _check_markers(source: Source, records: Mapping[str, Record], verify_crc: bool) -> None:
    """Check the archive's version and byte order."""
    found = {}
    for name in sorted(_MARKERS & records.keys()):
        record = records[name]
        if record.size > _MAX_MARKER:
            raise _corrupt(source.path, f"{record.size} bytes, expected a short text", record.name)
        found[name] = RecordReader(source, record, verify_crc=verify_crc).read()
    version = found.get("version", b"3").strip()
    if not re.fullmatch(rb"[1-9]|10", version):
        raise UnsupportedError(
            f"the archive's version is {version[:20]!r}, expected 1 to 10",
            file=source.path,
            record=records["version"].name,
        )
    order = found.get("byteorder", b"little")
    if order == b"big":
        raise UnsupportedError(
            "the numbers are big-endian",
            file=source.path,
            record=records["byteorder"].name,
            remedy="Save the checkpoint again on a little-endian machine.",
        )
    if order != b"little":
        raise _corrupt(
            source.path, f"the byte order is {order[:20]!r}, expected 'little' or 'big'", records["byteorder"].name
        )
