"""A pickle machine that cannot do anything: it turns a program into inert values and never calls, imports or looks up.

Python's own unpickler, however restricted, resolves names to live objects and reserves whatever memory a program asks
for. This machine knows the opcodes that ``torch.save`` writes (pickle protocol 2), builds dicts, lists, tuples and
numbers, and represents everything else by a `Symbol`, a `Call` that is never made, or a `PersistentId`. Any other
opcode, any name that is not in the caller's table, and any program that is larger than a checkpoint's is an error
with the byte offset of the opcode. Opcodes are described in CPython's ``Lib/pickletools.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from npllama.checkpoint.pth.pickle_values import Call, PersistentId, Role, Symbol, Symbols, kind, survey
from npllama.errors import CorruptDataError, ResourceLimitError, UnsafeFileError, UnsupportedError

_MAX_STEPS = 250_000
_MAX_STRING = 1 << 20
_MAX_NAME = 200
_MAX_LONG = 16
_MAX_MEMO_ID = 1 << 24

_DAMAGED = "The file is damaged, or was not written by torch.save."
_REFUSED = "Nothing was executed. No checkpoint needs this: do not trust the file."


def run(program: bytes, symbols: Symbols, *, file: str, record: str) -> Any:
    """Run a pickle program symbolically.

    Parameters
    ----------
    program : bytes
        A pickle of protocol 2.
    symbols : mapping of (module, name) to Role
        Every name that the program may mention.
    file, record : str
        Place for messages.

    Returns
    -------
    object
        None, bool, int, float, str, tuple, list, dict, `Symbol`, `Call` or `PersistentId`, nested; without cycles.

    Raises
    ------
    UnsafeFileError
        An opcode or a name that no checkpoint needs, a change of something that is not a dict or a list, or a
        structure that contains itself.
    CorruptDataError
        A program that ends early, goes on after its end, or uses an empty stack or an unknown memo entry.
    UnsupportedError
        Another pickle protocol.
    ResourceLimitError
        More steps, nesting or expansion than any checkpoint has.
    """
    machine = _Machine(program, symbols, file, record)
    if program[:2] != bytes([_PROTO, 2]):
        protocol = str(program[1]) if len(program) > 1 and program[0] == _PROTO else "0 or 1"
        raise UnsupportedError(
            f"pickle protocol {protocol}, expected 2",
            file=file,
            record=record,
            offset=0,
            remedy="Save the checkpoint again with torch.save and its default protocol.",
        )
    machine.at = 2
    for _ in range(_MAX_STEPS):
        machine.start = machine.at
        opcode = machine.byte()
        if opcode == _STOP:
            return machine.result()
        handler = _HANDLERS.get(opcode)
        if handler is None:
            name = _REFUSED_OPCODES.get(opcode, "unknown")
            raise machine.unsafe(f"the pickle opcode {name} (0x{opcode:02x}) is refused")
        handler(machine)
    raise machine.excess(f"more than {_MAX_STEPS} pickle opcodes")


class _Machine:
    """State of a run: the program, a stack with marks, and the memo."""

    def __init__(self, program: bytes, symbols: Symbols, file: str, record: str) -> None:
        self.program = program
        self.symbols = symbols
        self.file = file
        self.record = record
        self.at = 0
        self.start = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    # errors, at the current opcode

    def corrupt(self, message: str) -> CorruptDataError:
        return CorruptDataError(message, file=self.file, record=self.record, offset=self.start, remedy=_DAMAGED)

    def unsafe(self, message: str) -> UnsafeFileError:
        return UnsafeFileError(message, file=self.file, record=self.record, offset=self.start, remedy=_REFUSED)

    def excess(self, message: str) -> ResourceLimitError:
        return ResourceLimitError(
            message, file=self.file, record=self.record, offset=self.start, remedy="No checkpoint is so large."
        )

    # the program

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.program):
            raise self.corrupt(f"the pickle ends after {len(self.program)} bytes, {end} are needed")
        data = self.program[self.at : end]
        self.at = end
        return data

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        end = self.program.find(b"\n", self.at, self.at + _MAX_NAME)
        if end < 0:
            raise self.corrupt(f"a name does not end within {_MAX_NAME} bytes")
        raw = self.take(end - self.at + 1)[:-1]
        name = raw.decode("ascii", "replace")
        if not name.isprintable() or "\ufffd" in name:
            raise self.unsafe(f"the name {raw!r} is not printable ASCII")
        return name

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def need(self, count: int) -> None:
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < count:
            raise self.corrupt("the pickle takes more from its stack than is on it")

    def pop(self) -> Any:
        self.need(1)
        return self.stack.pop()

    def top(self) -> Any:
        self.need(1)
        return self.stack[-1]

    def pop_many(self, count: int) -> tuple[Any, ...]:
        self.need(count)
        values = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return values

    def pop_to_mark(self) -> tuple[Any, ...]:
        if not self.marks:
            raise self.corrupt("the pickle's mark is missing")
        floor = self.marks.pop()
        values = tuple(self.stack[floor:])
        del self.stack[floor:]
        return values

    # containers

    def append(self, values: Iterable[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.unsafe(f"items are appended to a {kind(target)}")
        target.extend(values)

    def set_items(self, items: tuple[Any, ...]) -> None:
        target = self.top()
        if type(target) is not dict:
            raise self.unsafe(f"items are set on a {kind(target)}")
        if len(items) % 2:
            raise self.corrupt("a key has no value")
        self.fill(target, zip(items[::2], items[1::2], strict=True))

    def fill(self, target: dict[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
        for key, value in pairs:
            if type(key) not in (str, int):
                raise self.unsafe(f"a {kind(key)} is used as a key")
            if key in target:
                raise self.corrupt(f"the key {_short(key)} appears twice")
            target[key] = value

    def reduce(self) -> None:
        function, arguments = self.pop_many(2)
        if type(function) is not Symbol or function.role is Role.NAME or type(arguments) is not tuple:
            what = function if type(function) is Symbol else f"a {kind(function)}"
            raise self.unsafe(f"the file asks to call {what}")
        if function.role is Role.FUNCTION:
            self.push(Call(function, arguments, self.start))
            return
        mapping: dict[Any, Any] = {}
        if arguments:
            self.fill(mapping, self.pairs(arguments))
        self.push(mapping)

    def pairs(self, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
        items = arguments[0]
        if len(arguments) != 1 or type(items) is not list:
            raise self.corrupt("a mapping is made of something else than a list of pairs")
        for item in items:
            if type(item) not in (list, tuple) or len(item) != 2:
                raise self.corrupt(f"a mapping is made of a {kind(item)}, expected a pair")
            yield item[0], item[1]

    def build(self) -> None:
        """Drop the attributes that a state dict carries (``_metadata``); nothing else may have any."""
        state, target = self.pop(), self.top()
        if type(target) is not dict or type(state) is not dict:
            raise self.unsafe(f"attributes are set on a {kind(target)}")

    # the memo

    def remember(self, index: int) -> None:
        if index > _MAX_MEMO_ID:
            raise self.unsafe(f"the memo entry {index} is beyond {_MAX_MEMO_ID}")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise self.corrupt(f"the memo has no entry {index}")
        self.push(self.memo[index])

    # longer operands

    def push_symbol(self) -> None:
        module, name = self.line(), self.line()
        role = self.symbols.get((module, name))
        if role is None:
            raise self.unsafe(f"the file asks to import {module}.{name}; refused")
        self.push(Symbol(module, name, role))

    def push_text(self) -> None:
        length = self.number(_U32)
        if length > _MAX_STRING:
            raise self.unsafe(f"a text of {length} bytes, at most {_MAX_STRING}")
        try:
            self.push(self.take(length).decode("utf-8"))
        except UnicodeDecodeError:
            raise self.corrupt("a text is not UTF-8") from None

    def push_long(self) -> None:
        length = self.byte()
        if length > _MAX_LONG:
            raise self.unsafe(f"an integer of {length} bytes, at most {_MAX_LONG}")
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def result(self) -> Any:
        if self.at != len(self.program):
            raise self.corrupt(f"{len(self.program) - self.at} bytes follow the end of the pickle")
        if len(self.stack) != 1 or self.marks:
            raise self.corrupt(f"the pickle ends with {len(self.stack)} values, expected 1")
        survey(self.stack[0], file=self.file, record=self.record)
        return self.stack[0]


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= 80 else text[:77] + "..."


_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_F64 = struct.Struct(">d")

_PROTO = 0x80
_STOP = ord(".")

#: opcode -> what it does to the machine. APPENDS and SETITEMS take their items before they look at their target.
_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    ord("("): lambda m: m.marks.append(len(m.stack)),  # MARK
    ord("N"): lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    ord("J"): lambda m: m.push(m.number(_I32)),  # BININT
    ord("K"): lambda m: m.push(m.byte()),  # BININT1
    ord("M"): lambda m: m.push(m.number(_U16)),  # BININT2
    0x8A: _Machine.push_long,  # LONG1
    ord("G"): lambda m: m.push(m.number(_F64)),  # BINFLOAT
    ord("X"): _Machine.push_text,  # BINUNICODE
    ord("c"): _Machine.push_symbol,  # GLOBAL
    ord(")"): lambda m: m.push(()),  # EMPTY_TUPLE
    ord("]"): lambda m: m.push([]),  # EMPTY_LIST
    ord("}"): lambda m: m.push({}),  # EMPTY_DICT
    ord("t"): lambda m: m.push(m.pop_to_mark()),  # TUPLE
    0x85: lambda m: m.push(m.pop_many(1)),  # TUPLE1
    0x86: lambda m: m.push(m.pop_many(2)),  # TUPLE2
    0x87: lambda m: m.push(m.pop_many(3)),  # TUPLE3
    ord("a"): lambda m: m.append(m.pop_many(1)),  # APPEND
    ord("e"): lambda m: m.append(m.pop_to_mark()),  # APPENDS
    ord("s"): lambda m: m.set_items(m.pop_many(2)),  # SETITEM
    ord("u"): lambda m: m.set_items(m.pop_to_mark()),  # SETITEMS
    ord("R"): _Machine.reduce,  # REDUCE
    ord("b"): _Machine.build,  # BUILD
    ord("Q"): lambda m: m.push(PersistentId(m.pop(), m.start)),  # BINPERSID
    ord("q"): lambda m: m.remember(m.byte()),  # BINPUT
    ord("r"): lambda m: m.remember(m.number(_U32)),  # LONG_BINPUT
    ord("h"): lambda m: m.recall(m.byte()),  # BINGET
    ord("j"): lambda m: m.recall(m.number(_U32)),  # LONG_BINGET
}

#: Names of the other opcodes, for messages.
_REFUSED_OPCODES: dict[int, str] = {
    _PROTO: "PROTO",
    **{
        ord(code): name
        for code, name in (
            pair.split(":")
            for pair in "i:INST o:OBJ P:PERSID 0:POP 1:POP_MARK 2:DUP I:INT L:LONG F:FLOAT S:STRING V:UNICODE g:GET "
            "p:PUT d:DICT l:LIST T:BINSTRING U:SHORT_BINSTRING B:BINBYTES C:SHORT_BINBYTES".split()
        )
    },
    **dict(enumerate("NEWOBJ EXT1 EXT2 EXT4".split(), 0x81)),
    0x8B: "LONG4",
    **dict(
        enumerate(
            "SHORT_BINUNICODE BINUNICODE8 BINBYTES8 EMPTY_SET ADDITEMS FROZENSET NEWOBJ_EX STACK_GLOBAL MEMOIZE FRAME "
            "BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER".split(),
            0x8C,
        )
    ),
}
