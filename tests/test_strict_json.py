"""The JSON parser for strangers' files: what Python's takes and should not, it refuses with the caller's error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.errors import ConfigError, CorruptDataError, NpllamaError
from npllama.strict_json import parse_object

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), values))
def test_what_json_writes_is_read_back(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    assert parse_object(text, error=ConfigError, file="x") == document
    assert parse_object(text.encode(), error=ConfigError, file="x") == document


@given(st.binary(max_size=40) | st.text(max_size=40))
def test_anything_else_is_the_caller_s_error_or_an_object(text: bytes | str) -> None:
    try:
        found = parse_object(text, error=ConfigError, file="x")
    except NpllamaError as problem:
        error: NpllamaError | None = problem
    else:
        error = None
        assert isinstance(found, dict)
    assert error is None or type(error) is ConfigError


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "not JSON"),
    "cut short": ('{"a": 1', "not JSON: .* at line 1, column 8"),
    "two documents": ("{} {}", "not JSON"),
    "a comma too many": ('{"a": 1,}', "not JSON"),
    "a list": ("[1]", "expected a JSON object, found list"),
    "a number": ("7", "found int"),
    "null": ("null", "found NoneType"),
    "the same key twice": ('{"a": 1, "a": 1}', "the key 'a' appears twice"),
    "the same key twice, deep": ('{"x": [{"a": 1, "a": 2}]}', "the key 'a' appears twice"),
    "NaN": ('{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": ('{"a": Infinity}', "Infinity is not a JSON number"),
    "-Infinity": ('{"a": -Infinity}', "-Infinity is not a JSON number"),
    "a number that overflows": ('{"a": 1e400}', "the number 1e400 is too large"),
    "a long integer": ('{"a": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
    "deep nesting": ('{"a":' * 100_000, "nested too deeply"),
    "deep lists": ('{"a":' + "[" * 100_000, "nested too deeply"),
    "a byte-order mark": (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le") + b"\xff\xff", "not UTF-8 text|not JSON"),
    "Latin-1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text at byte 7"),
    "a bare control character": ('{"a": "\n"}', "not JSON: Invalid control character"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("error", [ConfigError, CorruptDataError])
def test_refused(kind: str, error: type[NpllamaError]) -> None:
    text, message = REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        parse_object(text, error=error, file="params.json")
    assert str(caught.value).startswith("params.json: ")
    assert caught.value.remedy


def test_the_largest_numbers_are_fine() -> None:
    text = '{"a": 1.7976931348623157e308, "b": ' + "9" * 400 + "}"
    assert parse_object(text, error=ConfigError, file="x")["b"] == int("9" * 400)
