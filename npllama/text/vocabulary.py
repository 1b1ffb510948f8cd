"""What every tokenizer file is turned into: one plain record, from which a `Tokenizer` is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Where over-long text is cut before it is split into words.

    Attributes
    ----------
    piece : int or None
        Texts are first cut every so many characters; None leaves them whole.
    pattern : str
        Regular expression of one character whose runs are too long; alternatives separated by ``|``.
    run : int
        A run longer than this is cut every ``run`` characters.
    """

    piece: int | None
    pattern: str
    run: int

    def cut(self, text: str) -> Iterator[str]:
        """Yield the parts of ``text``, in order; together they are ``text``."""
        kinds = "|".join(f"{kind}{{{self.run + 1},}}" for kind in self.pattern.split("|"))
        long_run = re.compile(kinds)
        size = self.piece or max(len(text), 1)
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            done = 0
            for found in long_run.finditer(piece):
                for stop in range(found.start() + self.run, found.end(), self.run):
                    yield piece[done:stop]
                    done = stop
            yield piece[done:]


def unchanged(text: str) -> str:
    """Return the text as it is: the preparation of tokenizers that need none."""
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A byte-level byte-pair tokenizer as data.

    Attributes
    ----------
    pattern : str
        Regular expression (fancy-regex) whose matches are the words that are encoded one by one.
    ranks : mapping of bytes to int
        Bytes of a token -> the order in which pairs merge into it; every single byte has a rank.
    ids : sequence of int
        Rank -> token id; -1 for a byte that the vocabulary lacks, which is left out of the result.
    tokens : mapping of int to bytes
        Token id -> its bytes, for ordinary tokens, those that text never encodes to included.
    special : mapping of str to int
        Text of a special token -> its id.
    limits : RunLimits
        Where over-long text is cut.
    prepare : callable
        Applied to ordinary text before it is encoded: Unicode normalisation and the like.
    bos : int or None
        Id of the token that begins a text.
    adds_bos : bool
        Whether the checkpoint's own tokenizer begins every text with it.
    stop_ids : frozenset of int
        Ids after which a model's answer is complete.
    chat_template : str or None
        Jinja source.
    template_names : mapping of str to str
        ``bos_token`` and the like: the special tokens that a chat template may name.
    """

    pattern: str
    ranks: Mapping[bytes, int]
    ids: Sequence[int]
    tokens: Mapping[int, bytes]
    special: Mapping[str, int]
    limits: RunLimits
    prepare: Callable[[str], str] = unchanged
    bos: int | None = None
    adds_bos: bool = False
    stop_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    template_names: Mapping[str, str] = field(default_factory=dict)
