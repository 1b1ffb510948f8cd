"""Writes torch archives without torch, honest and dishonest ones, byte by byte."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

STORAGE_NAMES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int8": "CharStorage",
    "bool": "BoolStorage",
}


@dataclass(frozen=True)
class Raw:
    """Pickle opcodes, put in as they are."""

    code: bytes


@dataclass(frozen=True)
class View:
    """A tensor as torch pickles it; every part of it can be made wrong."""

    key: Any
    numel: Any
    shape: Any
    stride: Any
    offset: Any = 0
    storage: str = "torch FloatStorage"
    location: Any = "cpu"
    more: tuple[Any, ...] = ()
    hooks: Any = field(default_factory=lambda: Raw(b"ccollections\nOrderedDict\n)R"))


def symbol(module: str, name: str) -> Raw:
    return Raw(f"c{module}\n{name}\n".encode())


def call(module: str, name: str, *arguments: Any) -> Raw:
    return Raw(symbol(module, name).code + opcodes(arguments) + b"R")


def opcodes(value: Any) -> bytes:
    """Pickle a value, without the protocol and the stop."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, View):
        storage = ("storage", symbol(*value.storage.split()), value.key, value.location, value.numel)
        parts = (Raw(opcodes(storage) + b"Q"), value.offset, value.shape, value.stride, False, value.hooks, *value.more)
        return call("torch._utils", "_rebuild_tensor_v2", *parts).code
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(16, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(key) + opcodes(entry) for key, entry in value.items()) + b"u"
    raise TypeError(type(value))


def program(value: Any) -> bytes:
    """Pickle a value with protocol 2."""
    return b"\x80\x02" + opcodes(value) + b"."


@dataclass
class Member:
    """A zip record; what is not given is what is true."""

    name: str
    data: bytes
    flags: int = 0x800
    method: int = 0
    crc: int | None = None
    size: int | None = None
    packed: int | None = None
    header: int | None = None
    local_name: str | None = None
    local_flags: int | None = None
    comment: bytes = b""

    def local(self, position: int, align: int) -> bytes:
        name = (self.name if self.local_name is None else self.local_name).encode()
        padding = -(position + 30 + len(name) + 4) % align
        extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        flags = self.flags if self.local_flags is None else self.local_flags
        lengths = (len(name), len(extra))
        return struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, self.method, 0, 0, 0, 0, 0, *lengths) + name + extra

    def central(self, position: int) -> bytes:
        name = self.name.encode()
        size = len(self.data) if self.size is None else self.size
        packed = size if self.packed is None else self.packed
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        header = position if self.header is None else self.header
        wide = [(value, 0xFFFFFFFF) for value in (size, packed, header) if value >= 0xFFFFFFFF]
        extra = b"".join(struct.pack("<Q", value) for value, _ in wide)
        extra = struct.pack("<HH", 1, len(extra)) + extra if wide else b""
        size, packed, header = (min(value, 0xFFFFFFFF) for value in (size, packed, header))
        return (
            struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 0, 0, self.flags, self.method, 0, 0, crc, packed, size,
                len(name), len(extra), len(self.comment), 0, 0, 0, header,
            )
            + name + extra + self.comment
        )  # fmt: skip


def directory_end(count: int, size: int, start: int, *, zip64: bool = True, comment: int = 0) -> bytes:
    """Everything after the central directory."""
    wide = b""
    if zip64:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, size, start)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1)
    short = (min(count, 0xFFFF), min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF))
    return wide + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *short, comment)


def archive(members: Sequence[Member], *, align: int = 64, zip64: bool = True, before: bytes = b"") -> bytes:
    """Lay out a zip archive as torch does: stored records, padded to ``align``, behind some bytes if need be."""
    body, directory = bytearray(before), bytearray()
    for member in members:
        directory += member.central(len(body))
        body += member.local(len(body), align) + member.data
    return bytes(body + directory) + directory_end(len(members), len(directory), len(body), zip64=zip64)


def torch_members(value: Any, storages: Mapping[str, bytes], *, root: str = "archive") -> list[Member]:
    """The records of a checkpoint whose data.pkl holds ``value``."""
    records = {
        "data.pkl": program(value),
        "byteorder": b"little",
        **{f"data/{key}": data for key, data in storages.items()},
        "version": b"3\n",
    }
    return [Member(f"{root}/{name}", data) for name, data in records.items()]


def c_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    steps = [1]
    for length in reversed(shape[1:]):
        steps.insert(0, steps[0] * length)
    return tuple(steps[: len(shape)])


def checkpoint_members(
    tensors: Mapping[str, np.ndarray], *, bfloat16: bool = False, wrap: str | None = None
) -> list[Member]:
    """The records of a state dict with one storage for each tensor; uint16 arrays can stand for bfloat16 bits."""
    views, storages = {}, {}
    for key, (name, array) in enumerate(tensors.items()):
        dtype = "bfloat16" if bfloat16 else array.dtype.name
        storage = f"torch {STORAGE_NAMES[dtype]}"
        views[name] = View(str(key), array.size, array.shape, c_stride(array.shape), storage=storage)
        storages[str(key)] = array.tobytes()
    return torch_members({wrap: views} if wrap else views, storages)


def write_checkpoint(path: Path, tensors: Mapping[str, np.ndarray], **options: Any) -> Path:
    """Write `checkpoint_members` to a file."""
    path.write_bytes(archive(checkpoint_members(tensors, **options)))
    return path
