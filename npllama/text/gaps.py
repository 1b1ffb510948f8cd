r"""Characters that a vocabulary has no token for.

Some vocabularies lack bytes that never occurred in their training text (SmolLM2 lacks U+0004 and others). The
Hugging Face tokenizer drops such a byte *after* text was cut into words: ``!\x04!`` is one word and becomes ``!!``,
while ``a\x04b`` stays two words. tiktoken cannot drop anything, so a lacking byte gets a rank that nothing merges with
and that the result leaves out. What remains is to bring its neighbours together where they are in one word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection


def bridge_gaps(lacking: Collection[int]) -> Callable[[str], str]:
    r"""Make a function that removes lacking characters from inside words of punctuation.

    Parameters
    ----------
    lacking : collection of int
        Bytes without a token; those below 128 are characters. (Bytes of longer characters are only dropped. SmolLM2
        lacks two that begin the characters from U+40000 to U+BFFFF, none of which Unicode has assigned.)

    Returns
    -------
    callable
        str -> str, for patterns in which a word of punctuation is ``" ?[^\s\p{L}\p{N}]+"`` (GPT-2's family).
        A lacking character at the start or the end of such a word is left for the encoder to drop: without it the
        word might be cut in another place (``\x04's`` holds no contraction), and nothing merges across it anyway.
    """
    characters = "".join(re.escape(chr(byte)) for byte in sorted(lacking) if byte < 128)
    gap = re.compile(f"(?<=(.))[{characters}]+(?=([^{characters}]))", re.DOTALL) if characters else None

    def close(found: re.Match[str]) -> str:
        before, after = found[1], found[2]
        inside = (before == " " or _is_punctuation(before)) and _is_punctuation(after)
        return "" if inside else found[0]

    def prepare(text: str) -> str:
        return gap.sub(close, text) if gap else text

    return prepare


def _is_punctuation(character: str) -> bool:
    r"""Tell whether a character matches ``[^\s\p{L}\p{N}]``."""
    if "\x1c" <= character <= "\x1f":  # spaces to Python, controls to Unicode's White_Space
        return True
    return not character.isspace() and unicodedata.category(character)[0] not in "LN"
