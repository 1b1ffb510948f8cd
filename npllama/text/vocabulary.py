"""What every tokenizer file is turned into: one plain record, from which a `Tokenizer` is built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

#: Where an encoder puts a space that is no part of the text: nowhere, before the text, or before each piece of it
#: (the beginning, and what follows a special token).
AddedSpace = Literal["none", "first", "each"]


class Encoder(Protocol):
    """Turns ordinary text, in which nothing is a special token, into ids."""

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Turn ordinary text into ids.

        Parameters
        ----------
        text : str
            Any text; a lone surrogate becomes U+FFFD. No text has no ids.
        first : bool
            Nothing stands before it; otherwise a special token does.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Special:
    """The tokens that are recognised as a whole, and only where that is asked for.

    Attributes
    ----------
    ids : mapping of str to int
        Text -> id.
    take_before, take_behind : frozenset of str
        Texts of the tokens that take white space before or behind them with them.
    """

    ids: Mapping[str, int]
    take_before: frozenset[str] = frozenset()
    take_behind: frozenset[str] = frozenset()


def whole(text: str) -> Iterable[str]:
    """Return the text in one part: the cut of encoders that take text of any length."""
    return (text,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A checkpoint's tokenizer as data.

    Attributes
    ----------
    encoder : Encoder
        Makes ids of ordinary text.
    tokens : mapping of int to bytes
        Token id -> its bytes, for ordinary tokens, those that text never encodes to included.
    special : Special
        The special tokens.
    cut : callable
        Text -> its parts, in order: over-long text is cut before special tokens are looked for.
    added_space : {"none", "first", "each"}
        Where ``encoder`` puts a space of its own, which decoding takes away.
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

    encoder: Encoder
    tokens: Mapping[int, bytes]
    special: Special
    cut: Callable[[str], Iterable[str]] = whole
    added_space: AddedSpace = "none"
    bos: int | None = None
    adds_bos: bool = False
    stop_ids: frozenset[int] = frozenset()
    chat_template: str | None = None
    template_names: Mapping[str, str] = field(default_factory=dict)
