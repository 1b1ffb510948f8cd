"""Which token the ``post_processor`` of a ``tokenizer.json`` puts before every text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npllama.errors import UnsupportedError
from npllama.text.json_files import tokenizer_error


def leading_id(processor: Any, special: Mapping[str, int], source: str) -> int | None:
    """Return the id of the special token that a post-processor puts before every text, if any.

    Raises
    ------
    UnsupportedError
        It does anything else.
    TokenizerError
        The token is not among the special ones.
    """
    token = _leading_token(processor, source)
    if token is not None and token not in special:
        raise tokenizer_error(f"the token {token!r} begins every text, but is not among added_tokens", source)
    return None if token is None else special[token]


def _leading_token(processor: Any, source: str) -> str | None:
    """Return the special token that a post-processor puts before every text, if any."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return None
        case {"type": "Sequence", "processors": list() as steps}:
            leading = [token for step in steps if (token := _leading_token(step, source)) is not None]
            if len(leading) <= 1:
                return leading[0] if leading else None
        case {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return None
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str() as token}}, {"Sequence": _}]}:
            return token
    raise UnsupportedError(
        f"unknown post_processor {str(processor)[:300]}",
        file=source,
        remedy="npllama reads those that put at most one token before the text and nothing after it.",
    )
