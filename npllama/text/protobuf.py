"""The wire format of protocol buffers: a message as numbered fields, read without knowing its schema.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from npllama.errors import TokenizerError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT = 10


@dataclass(slots=True)  # frozen ones take twice as long to make, and a file has 100,000
class Message:
    """A message inside a file.

    Attributes
    ----------
    data : memoryview
        The whole file.
    start, stop : int
        Where the message is in it.
    source : str
        The file's name, for messages.
    """

    data: memoryview
    start: int
    stop: int
    source: str

    def fields(self) -> Iterator[Field]:
        """Yield the fields in the order in which they are written; raises TokenizerError where they break off."""
        at = self.start
        while at < self.stop:
            begin = at
            key, at = self._varint(at)
            number, kind = key >> 3, key & 7
            size, value = 0, 0
            if kind == _VARINT:
                value, at = self._varint(at)
            elif kind == _BYTES:
                size, at = self._varint(at)
            elif kind in _FIXED:
                size = _FIXED[kind]
            else:
                raise self.error(f"a field of the wire type {kind}, which does not exist", begin)
            if number == 0 or size > self.stop - at:
                raise self.error(f"field {number} of {size} bytes, but {self.stop - at} are left", begin)
            yield Field(self, number, kind, value, at, at + size)
            at += size

    def error(self, message: str, offset: int) -> TokenizerError:
        """Make the error that says where the file is damaged."""
        return TokenizerError(
            message, file=self.source, offset=offset, remedy="The file is damaged or incomplete; fetch it again."
        )

    def _varint(self, at: int) -> tuple[int, int]:
        """Read a number of seven bits a byte, the lowest first; return it and the place behind it."""
        if at < self.stop and self.data[at] < 0x80:  # nearly always
            return self.data[at], at + 1
        value = 0
        for shift, byte in enumerate(self.data[at : min(at + _MAX_VARINT, self.stop)]):
            value |= (byte & 0x7F) << (7 * shift)
            if byte < 0x80:
                return value, at + shift + 1
        raise self.error("the file ends in a number, or the number is too long", at)


@dataclass(slots=True)  # frozen ones take twice as long to make, and a file has 100,000
class Field:
    """One field: its number, and the value in the form that the caller's schema says."""

    _message: Message
    number: int
    _kind: int
    _value: int
    _start: int
    _stop: int

    def integer(self) -> int:
        """Return a number of any width; a negative one as two's complement of 64 bits."""
        self._require(_VARINT, "a number")
        return self._value

    def real(self) -> float:
        """Return a float of 32 bits."""
        self._require(_FIXED32, "a float")
        found: float = struct.unpack_from("<f", self._message.data, self._start)[0]
        return found

    def text(self) -> str:
        """Return a string."""
        self._require(_BYTES, "a string")
        try:
            return bytes(self._message.data[self._start : self._stop]).decode("utf-8")
        except UnicodeDecodeError as problem:
            raise self._message.error(f"a string that is not UTF-8: {problem.reason}", self._start) from None

    def size(self) -> int:
        """Return the number of bytes."""
        self._require(_BYTES, "bytes")
        return self._stop - self._start

    def message(self) -> Message:
        """Return an embedded message."""
        self._require(_BYTES, "a message")
        return Message(self._message.data, self._start, self._stop, self._message.source)

    def error(self, message: str) -> TokenizerError:
        """Make the error that says that this field is damaged."""
        return self._message.error(message, self._start)

    def _require(self, kind: int, what: str) -> None:
        if self._kind != kind:
            raise self.error(f"field {self.number} has the wire type {self._kind}, expected {what}")


def values(message: Message, schema: Mapping[int, tuple[str, str]], known: Mapping[str, Any]) -> dict[str, Any]:
    """Read a message of single values.

    Parameters
    ----------
    message : Message
        The message.
    schema : mapping
        Field number -> (name, method of `Field` that reads it). Other fields are passed over.
    known : mapping
        Name -> value where the message does not say; as in every protobuf, the last of several values counts.
    """
    found: dict[str, Any] = dict(known)
    for field in message.fields():
        if field.number in schema:
            name, read = schema[field.number]
            found[name] = getattr(field, read)()
    return found
