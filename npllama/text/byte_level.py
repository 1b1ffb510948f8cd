"""Byte-level byte-pair encoding: words by a regular expression, merges by tiktoken."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import tiktoken


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


class ByteLevel:
    """The encoder.

    Parameters
    ----------
    pattern : str
        Regular expression (fancy-regex) whose matches are the words that are encoded one by one.
    ranks : mapping of bytes to int
        Bytes of a token -> the order in which pairs merge into it; every single byte has a rank.
    ids : sequence of int
        Rank -> token id; -1 for a byte that the vocabulary lacks, which is left out of the result.
    prepare : callable
        Applied to text before it is encoded: Unicode normalisation and the like.

    Attributes
    ----------
    ids : sequence of int
        As given.
    """

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        ids: Sequence[int],
        prepare: Callable[[str], str] = unchanged,
    ) -> None:
        self.ids = ids
        self._drops = -1 in ids
        self._prepare = prepare
        self._encoding = tiktoken.Encoding("npllama", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Turn ordinary text into ids; see `npllama.text.vocabulary.Encoder`."""
        ids = self.ids
        found = [ids[rank] for rank in self._encoding.encode_ordinary(self._prepare(text))]
        return [index for index in found if index >= 0] if self._drops else found
