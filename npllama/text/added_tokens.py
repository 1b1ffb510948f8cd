"""The ``added_tokens`` of a tokenizer: recognised as a whole, with or without the white space around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from npllama.errors import UnsupportedError
from npllama.text.json_files import member, tokenizer_error
from npllama.text.vocabulary import Special

#: More than any tokenizer has; an id beyond would only cost memory.
MAX_ID = 1 << 24


def read_added_tokens(entries: Iterable[tuple[str, Any]], source: str) -> Special:
    """Read added tokens.

    Parameters
    ----------
    entries : iterable of (str, parsed JSON)
        Place in the file, and an object with ``content``, ``id`` and flags.
    source : str
        The file's name, for messages.

    Raises
    ------
    UnsupportedError
        A token that is recognised only as a word of its own.
    TokenizerError
        A token without text or id, or with those of another.

    Notes
    -----
    A token with ``lstrip`` takes the white space before it with it, one with ``rstrip`` that behind it. ``special``
    makes no difference: a text becomes one of these tokens only where that was asked for.
    """
    found: dict[str, int] = {}
    ids: set[int] = set()
    flagged: dict[str, set[str]] = {"lstrip": set(), "rstrip": set()}
    for record, entry in entries:
        if not isinstance(entry, Mapping):
            raise tokenizer_error(f"expected an object, found {type(entry).__name__}", source, record)
        text, index = member(entry, "content", str, source), member(entry, "id", int, source)
        if not text or text in found or index in ids or not 0 <= index < MAX_ID:
            raise tokenizer_error(f"the token {text!r} with id {index} is empty, out of range or there twice", source)
        if entry.get("single_word"):
            raise UnsupportedError(
                f"the token {text!r} has single_word set",
                file=source,
                record=record,
                remedy="npllama recognises added tokens wherever they are spelled.",
            )
        found[text] = index
        ids.add(index)
        for flag, texts in flagged.items():
            if entry.get(flag):
                texts.add(text)
    return Special(ids=found, take_before=frozenset(flagged["lstrip"]), take_behind=frozenset(flagged["rstrip"]))
