"""The pickle machine must build plain values exactly, and must refuse everything else cheaply and by name."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.checkpoint.pth.pickle_values import Call, PersistentId, Role, Symbol
from npllama.checkpoint.pth.pickle_vm import run
from npllama.errors import (
    CorruptDataError,
    NpllamaError,
    ResourceLimitError,
    UnsafeFileError,
    UnsupportedError,
)
from tests.checkpoint.archives import Raw, call, opcodes, program, symbol

SYMBOLS = {
    ("collections", "OrderedDict"): Role.MAPPING,
    ("torch._utils", "_rebuild_tensor_v2"): Role.FUNCTION,
    ("torch", "FloatStorage"): Role.NAME,
}


def execute(code: bytes) -> Any:
    return run(code, SYMBOLS, file="x.pth", record="x/data.pkl")


def body(code: bytes) -> Any:
    return execute(b"\x80\x02" + code + b".")


integers = st.integers(-(2**127), 2**127 - 1)  # of 16 bytes
plain_values = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | integers, inner),
    max_leaves=30,
)


@given(plain_values)
@settings(max_examples=150, deadline=None)
def test_plain_values_are_those_that_pythons_pickle_wrote(value: Any) -> None:
    found = execute(pickle.dumps(value, protocol=2))
    assert found == value
    assert type(found) is type(value)


def test_an_ordered_dict_becomes_a_dict_and_its_attributes_are_dropped() -> None:
    ordered = OrderedDict([("a", 1), ("b", [2.5])])
    ordered._metadata = {"version": 1}  # type: ignore[attr-defined]
    assert execute(pickle.dumps(ordered, protocol=2)) == {"a": 1, "b": [2.5]}


def test_a_mapping_made_of_a_list_of_pairs_is_read() -> None:
    assert body(b"ccollections\nOrderedDict\n" + opcodes(([("a", 1), ["b", 2]],)) + b"R") == {"a": 1, "b": 2}


def test_shared_values_stay_one_object() -> None:
    first, second = body(opcodes(Raw(b"(]q\x05h\x05t")))
    assert first is second


def test_a_call_and_a_persistent_id_are_kept_with_their_place_and_never_made() -> None:
    asked = call("torch._utils", "_rebuild_tensor_v2", 1)
    made, reference = body(opcodes([asked, Raw(opcodes("s") + b"Q")]))
    assert isinstance(made, Call)
    assert isinstance(made.function, Symbol)
    assert (str(made.function), made.arguments) == ("torch._utils._rebuild_tensor_v2", (1,))
    assert isinstance(reference, PersistentId)
    assert (reference.value, reference.offset) == ("s", 2 + len(b"](") + len(asked.code) + len(opcodes("s")))


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (b"(S'echo'\nios\nsystem\n", "STRING"),
        (b"(ios\nsystem\n", "INST"),
        (b"(o", "OBJ"),
        (b"))\x81", "NEWOBJ"),
        (b"))}\x92", "NEWOBJ_EX"),
        (b"\x82\x01", "EXT1"),
        (b"\x84\x01\0\0\0", "EXT4"),
        (b"\x8c\x02os\x8c\x06system\x93", "SHORT_BINUNICODE"),
        (b"\x93", "STACK_GLOBAL"),
        (b"P0\n", "PERSID"),
        (b"N0", "POP"),
        (b"(N1", "POP_MARK"),
        (b"N2", "DUP"),
        (b"I1\n", "INT"),
        (b"L1L\n", "LONG"),
        (b"Va\n", "UNICODE"),
        (b"g0\n", "GET"),
        (b"Np0\n", "PUT"),
        (b"(d", "DICT"),
        (b"(l", "LIST"),
        (b"\x8b\xff\xff\xff\x7f", "LONG4"),
        (b"B\xff\xff\xff\xff", "BINBYTES"),
        (b"\x8e" + struct.pack("<Q", 1 << 40), "BINBYTES8"),
        (b"\x96" + struct.pack("<Q", 8 << 30), "BYTEARRAY8"),
        (b"\x97", "NEXT_BUFFER"),
        (b"\x95" + bytes(8), "FRAME"),
        (b"\x94", "MEMOIZE"),
        (b"\x8f", "EMPTY_SET"),
        (b"\x80\x02", "PROTO"),
        (b"\xfe", "unknown"),
    ],
)
def test_an_opcode_that_no_checkpoint_needs_is_refused_by_name_and_offset(code: bytes, name: str) -> None:
    with pytest.raises(UnsafeFileError, match=rf"opcode {name} \(0x.*Nothing was executed") as caught:
        body(code)
    assert caught.value.offset is not None
    assert 2 <= caught.value.offset < 2 + len(code)
    assert caught.value.record == "x/data.pkl"


@pytest.mark.parametrize("name", ["os system", "builtins eval", "torch.hub load", "torch load", "numpy dtype"])
def test_a_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(UnsafeFileError, match=f"asks to import {name.replace(' ', '.')}; refused"):
        body(symbol(*name.split()).code)


@pytest.mark.parametrize("name", [b"cos\x1b[2J\nsystem\n", "cös\nsystem\n".encode()])
def test_a_name_that_could_disturb_a_terminal_is_shown_escaped(name: bytes) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        body(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (symbol("torch", "FloatStorage").code + b")R", "asks to call torch.FloatStorage"),
        (b"N)R", "asks to call a NoneType"),
        (symbol("torch._utils", "_rebuild_tensor_v2").code + b"]R", "asks to call"),
        (symbol("torch._utils", "_rebuild_tensor_v2").code + b")RK\x01K\x02s", "items are set on a result of"),
        (b"}K\x01a", "appended to a dict"),
        (b"}(K\x01e", "appended to a dict"),
        (b"](K\x01K\x02u", "set on a list"),
        (symbol("torch._utils", "_rebuild_tensor_v2").code + b")R}b", "attributes are set on a result of"),
        (symbol("torch", "FloatStorage").code + b"}b", "attributes are set on a Symbol"),
        (b"}Nb", "attributes are set"),
        (b"})K\x01s", "a tuple is used as a key"),
        (b"}\x88K\x01s", "a bool is used as a key"),
        (b"]q\0h\0a", "recursive structure"),
        (b"}q\0X\1\0\0\0ah\0s", "recursive structure"),
        (b"]q\0(h\0ta", "recursive structure"),
    ],
)
def test_misuse_of_values_is_unsafe(code: bytes, words: str) -> None:
    with pytest.raises(UnsafeFileError, match=words):
        body(code)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"\x80\x02", "the pickle ends after 2 bytes"),
        (b"\x80\x02K", "the pickle ends"),
        (b"\x80\x02X\x05\0\0\0ab.", "the pickle ends"),
        (b"\x80\x02J\x01", "the pickle ends"),
        (b"\x80\x02N", "the pickle ends"),
        (b"\x80\x02.", "ends with 0 values"),
        (b"\x80\x02NN.", "ends with 2 values"),
        (b"\x80\x02N(.", "ends with 1 values"),
        (b"\x80\x02N.N", "1 bytes follow"),
        (b"\x80\x02\x85.", "takes more from its stack"),
        (b"\x80\x02N(a.", "takes more from its stack"),
        (b"\x80\x02N(\x85t.", "takes more from its stack"),
        (b"\x80\x02q\0.", "takes more from its stack"),
        (b"\x80\x02Nt.", "mark is missing"),
        (b"\x80\x02h\x07.", "memo has no entry 7"),
        (b"\x80\x02}(K\x01u.", "a key has no value"),
        (b"\x80\x02}(K\x01NK\x01Nu.", "key 1 appears twice"),
        (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
        (b"\x80\x02cos", "does not end within"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "something else than a list"),
        (b"\x80\x02ccollections\nOrderedDict\n](K\x01e\x85R.", "expected a pair"),
    ],
)
def test_a_broken_program_is_corrupt(code: bytes, words: str) -> None:
    with pytest.raises(CorruptDataError, match=words):
        execute(code)


def test_a_text_longer_than_any_name_is_refused() -> None:
    with pytest.raises(UnsafeFileError, match="a text of 1048577 bytes, at most 1048576"):
        body(opcodes("a" * ((1 << 20) + 1)))


@pytest.mark.parametrize(
    ("code", "protocol"),
    [(b"", "0 or 1"), (b"(lp0\n.", "0 or 1"), (b"]q\0.", "0 or 1"), (b"\x80\x03N.", "3"), (b"\x80\x04N.", "4")],
)
def test_other_protocols_are_unsupported_by_number(code: bytes, protocol: str) -> None:
    with pytest.raises(UnsupportedError, match=f"protocol {protocol}, expected 2"):
        execute(code)


def laughs(depth: int) -> bytes:
    """Lists that contain the one before them ten times."""
    code = b"]q\0K\x01a"
    for level in range(1, depth):
        code += b"]q" + bytes([level]) + b"(" + (b"h" + bytes([level - 1])) * 10 + b"e"
    return code


@pytest.mark.parametrize(
    "code",
    [
        b"(" + laughs(20) + b"t",
        b"]" + b"]" * 300 + b"a" * 300,
        b")" + b"\x85" * 300,
        b"(" + b"N" * 400_000 + b"t",
    ],
    ids=["billion laughs", "nested lists", "nested tuples", "many opcodes"],
)
def test_a_program_larger_than_any_checkpoints_is_stopped(code: bytes) -> None:
    with pytest.raises(ResourceLimitError, match="No checkpoint is so large"):
        body(code)


@pytest.mark.parametrize(
    "code",
    [
        b"Nr\x00\x00\x00\x80",
        b"X\xff\xff\xff\xff",
        b"X\xff\xff\x0f\0",
        b"\x8a\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"\x96" + struct.pack("<Q", 8 << 30),
        b"}" * 400_000,
        b"(" * 400_000,
        b"".join(b"Nr" + struct.pack("<I", i) for i in range(130_000)),
        b"\x85".join([b")"] * 100_000),
    ],
    ids=["memo", "text 4G", "text cut", "long", "long4", "bytearray8", "dicts", "marks", "memos", "tuples"],
)
def test_a_hostile_program_costs_little_memory(code: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(NpllamaError):
            body(code)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_random_bytes_give_a_value_or_a_typed_error(code: bytes) -> None:
    with suppress(NpllamaError):
        execute(b"\x80\x02" + code)


@given(plain_values, st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_byte_gives_a_value_or_a_typed_error(value: Any, data: st.DataObject) -> None:
    code = bytearray(program(value) if isinstance(value, dict | list) else pickle.dumps(value, protocol=2))
    code[data.draw(st.integers(0, len(code) - 1))] = data.draw(st.integers(0, 255))
    with suppress(NpllamaError):
        execute(bytes(code))
