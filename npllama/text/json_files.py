"""Typed access to the JSON files of a Hugging Face tokenizer: every surprise is a `TokenizerError`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from npllama.errors import TokenizerError

_T = TypeVar("_T")


def tokenizer_error(message: str, source: str, record: str | None = None) -> TokenizerError:
    """Make the error that says a tokenizer's file is damaged."""
    return TokenizerError(message, file=source, record=record, remedy="The file is damaged; fetch it again.")


def parse_object(data: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object; text that is not UTF-8, a duplicate key and anything but an object are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise tokenizer_error(f"the key {twice!r} appears twice", source)
        return found

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise tokenizer_error(f"not a JSON document: {problem}", source) from None
    if not isinstance(document, dict):
        raise tokenizer_error(f"expected a JSON object, found {type(document).__name__}", source)
    return document


def member(document: Mapping[str, Any], key: str, kind: type[_T], source: str) -> _T:
    """Return ``document[key]``, which must be of the given type."""
    value = document.get(key)
    if type(value) is not kind:
        found = "nothing" if key not in document else type(value).__name__
        raise tokenizer_error(f"expected {kind.__name__}, found {found}", source, key)
    return value
