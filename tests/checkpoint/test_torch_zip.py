"""The zip directory must be read exactly as torch and Python write it, and contradictions in it must be errors."""

from __future__ import annotations

import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from npllama.checkpoint.pth.torch_zip import Archive, read_archive
from npllama.checkpoint.pth.zip_record import RecordReader
from npllama.checkpoint.source import Source
from npllama.errors import (
    CorruptDataError,
    NpllamaError,
    TruncatedFileError,
    UnsafeFileError,
    UnsupportedError,
)
from tests.checkpoint.archives import Member, archive, directory_end

RECORDS = {"data.pkl": b"\x80\x02}.", "byteorder": b"little", "data/0": b"abcdefgh", "data/1": b"", "version": b"3\n"}


def members(**changes: Member) -> list[Member]:
    """An honest archive's records, with some replaced or added."""
    found = {name: Member(f"root/{name}", data) for name, data in RECORDS.items()}
    found.update(changes)
    return list(found.values())


def with_record(name: str, data: bytes, **fields: object) -> list[Member]:
    return members(**{name: Member(f"root/{name}", data, **fields)})  # type: ignore[arg-type]


def read(path: Path, content: bytes, *, verify_crc: bool = True) -> Archive:
    path.write_bytes(content)
    with closing(Source(path)) as source:
        return read_archive(source, verify_crc=verify_crc)


@pytest.mark.parametrize("zip64", [True, False])
@pytest.mark.parametrize("align", [1, 64])
def test_every_record_is_found_where_it_lies(tmp_path: Path, zip64: bool, align: int) -> None:
    content = archive(members(), zip64=zip64, align=align)
    found = read(tmp_path / "x.pth", content)
    assert found.root == "root"
    assert {name: content[r.offset : r.offset + r.size] for name, r in found.records.items()} == RECORDS
    assert all(record.offset % align == 0 for record in found.records.values())


def test_archives_of_pythons_zipfile_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w") as file:
        for name, data in RECORDS.items():
            file.writestr(f"root/{name}", data)
    content = path.read_bytes()
    found = read(path, content)
    assert {name: content[r.offset : r.offset + r.size] for name, r in found.records.items()} == RECORDS


@pytest.mark.torch
def test_archives_of_torch_are_read_as_pythons_zipfile_reads_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "consolidated.00.pth"
    torch.save({"a": torch.arange(10), "e": torch.zeros(0)}, path)
    content = path.read_bytes()
    found = read(path, content)
    assert found.root == "consolidated.00"
    with zipfile.ZipFile(path) as file:
        expected = {info.filename: file.read(info) for info in file.infolist()}
    assert {r.name: content[r.offset : r.offset + r.size] for r in found.records.values()} == expected


def test_offsets_beyond_four_gigabytes_are_followed(tmp_path: Path) -> None:
    path, hole = tmp_path / "x.pth", (4 << 30) + 12345
    big, small = Member("root/data/0", b"", crc=0, size=hole), Member("root/data.pkl", b"\x80\x02}.")
    with path.open("wb") as file:
        file.write(big.local(0, 64))
        file.seek(hole, 1)
        position = file.tell()
        file.write(small.local(position, 64) + small.data)
        start = file.tell()
        directory = big.central(0) + small.central(position)
        file.write(directory + directory_end(2, len(directory), start))
    with closing(Source(path)) as source:
        found = read_archive(source, verify_crc=True)
        assert found.records["data/0"].size == hole
        assert RecordReader(source, found.records["data.pkl"], verify_crc=True).read() == small.data


def test_more_than_65535_records_are_counted_right(tmp_path: Path) -> None:
    many = [Member("r/data.pkl", b""), *(Member(f"r/data/{i}", b"") for i in range(66_000))]
    assert len(read(tmp_path / "x.pth", archive(many, align=1)).records) == 66_001


def too_many() -> bytes:
    return archive(members()) + directory_end(10_000_000, 0, 0)


CONTENT = archive(members())
EMPTY_DIRECTORY = Member("root/data.pkl", b"").local(0, 1) + directory_end(0, 0, 50)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (CONTENT[:-1], TruncatedFileError, "cut short"),
        (CONTENT[: len(CONTENT) // 2], TruncatedFileError, f"the file's {len(CONTENT) // 2} bytes"),
        (b"PK\3\4", TruncatedFileError, "cut short"),
        (CONTENT + b"\0", CorruptDataError, "1 unexpected bytes after the archive"),
        (CONTENT + b"x" * 3000, CorruptDataError, "3000 unexpected bytes after the archive"),
        (b"junk" + CONTENT, CorruptDataError, "zip64 locator|zip directory ends"),
        (archive(members(), before=b"PK\3\4junk"), CorruptDataError, "8 unexpected bytes before the archive"),
        (CONTENT[:-2] + b"\1\0", CorruptDataError, "end of the zip directory is malformed"),
        (EMPTY_DIRECTORY, CorruptDataError, "directory"),
        (archive(members(other=Member("root/data.pkl", b"N."))), CorruptDataError, "two records are named"),
        (archive(members(other=Member("root/DATA.pkl", b"N."))), CorruptDataError, "two records are named"),
        (archive(with_record("data/0", b"x", local_name="root/data/9")), CorruptDataError, "own header contradicts"),
        (archive(with_record("data/0", b"x", local_flags=8)), CorruptDataError, "own header contradicts"),
        (archive(with_record("data/0", b"x", flags=0x801)), UnsupportedError, "zip flags 0x0801"),
        (archive(with_record("data/0", b"x", flags=0x20)), UnsupportedError, "zip flags 0x0020"),
        (archive(with_record("data/0", b"x", flags=0x40)), UnsupportedError, "zip flags 0x0040"),
        (archive(with_record("data/0", b"x", method=8, size=40 << 30)), UnsupportedError, "compressed"),
        (archive(with_record("data/0", b"x", packed=2)), CorruptDataError, "two sizes, 2 and 1"),
        (archive(with_record("data/0", b"x", size=1 << 40)), CorruptDataError, "run into the zip directory"),
        (archive(with_record("data/0", b"x", size=100)), CorruptDataError, "overlaps the one before"),
        (archive(with_record("data/0", b"x", header=0)), CorruptDataError, "own header contradicts"),
        (archive(with_record("data/0", b"x", header=1 << 40)), CorruptDataError, "after the last one"),
        (archive(with_record("data/0", b"x", comment=b"hi")), CorruptDataError, "malformed"),
        (archive([Member("root/../x", b""), *members()]), UnsafeFileError, "not a plain relative path"),
        (archive([Member("/etc/x", b""), *members()]), UnsafeFileError, "not a plain relative path"),
        (archive([Member("root/data\\0", b""), *members()]), UnsafeFileError, "not a plain relative path"),
        (archive([Member("root/data/0\0", b""), *members()]), UnsafeFileError, "not a plain relative path"),
        (archive([Member("root/data/", b""), *members()]), UnsafeFileError, "not a plain relative path"),
        (archive([Member("r" * 600 + "/x", b""), *members()]), UnsafeFileError, "602 bytes"),
        (archive([Member("röot/x", b""), *members()]), UnsafeFileError, "ASCII"),
        (archive([*members(), Member("other/data/7", b"")]), UnsafeFileError, "outside the archive's folder"),
        (archive([*members(), Member("root/constants.pkl", b"")]), UnsupportedError, "TorchScript"),
        (archive([*members(), Member("root/code/__torch__.py", b"")]), UnsupportedError, "TorchScript"),
        (archive([*members(), Member("root/archive_format", b"pt2")]), UnsupportedError, "torch.export"),
        (archive([*members(), Member("root/readme.txt", b"")]), UnsupportedError, "does not write"),
        (archive([Member("root/version", b"3\n")]), UnsupportedError, "no data.pkl"),
        (archive(with_record("version", b"11\n")), UnsupportedError, "version is b'11'"),
        (archive(with_record("version", b"x")), UnsupportedError, "version is b'x'"),
        (archive(with_record("version", b"3" * 2000)), CorruptDataError, "2000 bytes"),
        (archive(with_record("version", b"3", crc=1)), CorruptDataError, "CRC-32"),
        (archive(with_record("byteorder", b"big")), UnsupportedError, "big-endian"),
        (archive(with_record("byteorder", b"purple")), CorruptDataError, "byte order is b'purple'"),
    ],
)
def test_a_directory_that_torch_would_not_write_is_refused(
    tmp_path: Path, content: bytes, error: type[NpllamaError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        read(tmp_path / "x.pth", content)
    assert type(caught.value) is error


def patched(find: bytes, change: Callable[[bytearray, int], None]) -> bytes:
    content = bytearray(CONTENT)
    change(content, content.rindex(find))
    return bytes(content)


def store(layout: str, at: int, value: int) -> Callable[[bytearray, int], None]:
    return lambda content, base: struct.pack_into(layout, content, base + at, value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (patched(b"PK\5\6", store("<H", 10, 4)), "two ends of the zip directory disagree"),
        (patched(b"PK\5\6", store("<I", 16, 5)), "two ends of the zip directory disagree"),
        (patched(b"PK\6\7", store("<Q", 8, 5)), "zip64 locator points to 5"),
        (patched(b"PK\6\6", store("<Q", 4, 45)), "zip64 end of the directory is malformed"),
        (patched(b"PK\5\6", store("<H", 4, 1)), "several volumes"),
        (patched(b"PK\1\2", store("<H", 34, 1)), "several volumes"),
        (patched(b"PK\1\2", store("<H", 28, 60_000)), "malformed"),
        (patched(b"PK\1\2", store("<H", 30, 1)), "malformed"),
        (patched(b"PK\1\2", store("<I", 38, 0x10)), "malformed"),
    ],
)
def test_contradictions_at_the_end_are_noticed(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises((CorruptDataError, UnsupportedError), match=words):
        read(tmp_path / "x.pth", content)


def test_a_directory_of_ten_million_records_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path, size = tmp_path / "x.pth", 460_000_000
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.truncate(size)
        file.seek(size)
        file.write(directory_end(10_000_000, size, 0))
    tracemalloc.start()
    try:
        with closing(Source(path)) as source, pytest.raises(UnsupportedError, match="too many records: 10000000"):
            read_archive(source, verify_crc=True)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_checksums_can_be_left_unchecked(tmp_path: Path) -> None:
    content = archive(with_record("version", b"3", crc=1))
    assert read(tmp_path / "x.pth", content, verify_crc=False).records["version"].crc == 1


class TestRecordReader:
    @staticmethod
    def reader(path: Path, data: bytes, **fields: int) -> tuple[Source, RecordReader]:
        path.write_bytes(archive(with_record("data/0", data, **fields)))
        source = Source(path)
        record = read_archive(source, verify_crc=True).records["data/0"]
        return source, RecordReader(source, record, verify_crc=True)

    @pytest.mark.parametrize(
        "reads",
        [
            [(0, 100_000)],
            [(0, 40_000), (40_000, 60_000)],
            [(0, 40_000), (20_000, 80_000)],
            [(0, 40_000), (45_000, 55_000)],
            [(50_000, 50_000), (0, 50_000)],
            [(10, 10)],
            [],
        ],
        ids=["whole", "blocks", "overlap", "hole", "backwards", "part", "nothing"],
    )
    def test_the_checksum_holds_however_the_record_is_read(self, tmp_path: Path, reads: list[tuple[int, int]]) -> None:
        data = bytes(range(256)) * 391
        data = data[:100_000]
        source, reader = self.reader(tmp_path / "x.pth", data)
        with closing(source):
            for offset, count in reads:
                buffer = bytearray(count)
                reader.read_into(offset, memoryview(buffer))
                assert bytes(buffer) == data[offset : offset + count]
            reader.check()

    @pytest.mark.parametrize("position", [0, 49_999, 99_999])
    @pytest.mark.parametrize("front_to_back", [True, False])
    def test_one_wrong_byte_is_noticed_every_time(self, tmp_path: Path, position: int, front_to_back: bool) -> None:
        path = tmp_path / "x.pth"
        source, reader = self.reader(path, bytes(100_000))
        with closing(source):
            with path.open("r+b") as file:
                file.seek(reader.record.offset + position)
                file.write(b"\1")
            if front_to_back:
                reader.read_into(0, memoryview(bytearray(100_000)))
            for _ in range(2):
                with pytest.raises(CorruptDataError, match=r"x\.pth:root/data/0: the CRC-32 is .*verify_crc=False"):
                    reader.check()
