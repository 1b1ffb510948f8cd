"""Files put together byte by byte, so that a test can get exactly one byte wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    """Spell one metadata pair of a GGUF file."""
    return string(key) + u32(kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    """Spell the value of a pair of the kind ARRAY."""
    return u32(kind) + u64(count) + payload


def tensor(name: str | bytes, dims: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    """Spell one line of a GGUF tensor directory; ``dims`` in the file's order, fastest axis first."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Spell a GGUF file; the counts can be made to lie."""
    counts = u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(pairs) if n_pairs is None else n_pairs)
    head = magic + u32(version) + counts + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def safetensors(header: dict[str, Any] | str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Spell a safetensors file; the header may be anything, and its length can be made to lie."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw + data
