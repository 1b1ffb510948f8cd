"""Which words a Hugging Face ``tokenizer.json`` cuts text into, as one regular expression for tiktoken.

Only known forms are accepted. tiktoken drops text that its expression does not match, so an unknown expression could
lose characters without a word; and two engines read the same expression differently more often than one would think.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from npllama.errors import UnsupportedError
from npllama.text.meta_model import LLAMA3_PATTERN

#: Words of GPT-2 (the ``ByteLevel`` pre-tokenizer with ``use_regex``): the same, whatever the file says.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

#: GPT-2's words in a text where every digit already stands alone (SmolLM2, StarCoder). A digit ends the piece before
#: it, so spaces in front of a digit are the end of *their* piece: the look-ahead takes a digit for the end.
DIGITS_GPT2_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: Expressions of a ``Split`` pre-tokenizer that are known to match every character.
_SPLITS = {pattern: pattern for pattern in (LLAMA3_PATTERN, QWEN2_PATTERN, GPT2_PATTERN)}

Step = tuple[Any, ...]


def word_pattern(pre_tokenizer: Any, source: str) -> str:
    """Combine the steps of a pre-tokenizer into one expression.

    Parameters
    ----------
    pre_tokenizer : parsed JSON
        The ``pre_tokenizer`` of a ``tokenizer.json``.
    source : str
        The file's name, for messages.

    Returns
    -------
    str
        An expression of fancy-regex, the engine of tiktoken.

    Raises
    ------
    UnsupportedError
        Any other form; the message shows it.
    """
    steps = _flatten(pre_tokenizer)
    described = [_describe(step) for step in steps]
    match described:
        case [("ByteLevel", True)]:
            return GPT2_PATTERN
        case [("Digits", True), ("ByteLevel", True)]:
            return DIGITS_GPT2_PATTERN
        case [("Split", pattern), ("ByteLevel", False)] if pattern in _SPLITS:
            return _SPLITS[pattern]
    shown = json.dumps(pre_tokenizer, ensure_ascii=False)
    raise UnsupportedError(
        f"unknown pre_tokenizer {shown[:600]}",
        file=source,
        remedy="npllama reads the byte-level forms of GPT-2, SmolLM2, Llama 3 and Qwen2.",
    )


def _flatten(node: Any) -> list[Any]:
    """List the steps of a pre-tokenizer that may be a (nested) ``Sequence``."""
    if isinstance(node, Mapping) and node.get("type") == "Sequence" and isinstance(node.get("pretokenizers"), list):
        return [step for inner in node["pretokenizers"] for step in _flatten(inner)]
    return [node]


def _describe(step: Any) -> Step:
    """Reduce a step to what distinguishes the known forms; an unknown step matches none of them."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "ByteLevel", step.get("use_regex", True)
        case {"type": "Digits", "individual_digits": individual}:
            return "Digits", individual
        case {"type": "Split", "pattern": {"Regex": str() as pattern}, "behavior": "Isolated"} if not step.get(
            "invert"
        ):
            return "Split", pattern
    return ("unknown",)
