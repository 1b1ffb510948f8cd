"""The boundary between what a chat template writes and what people write.

A template's own ``<|im_start|>`` must become one token, the same characters in a message must stay text. So before a
template sees a message, each character with which a special token begins or ends is replaced by a stand-in. What comes
out of the template then holds special tokens only where the template wrote them, however it cuts and joins the
messages; the stand-ins are turned back in the ordinary text between them.

The stand-ins are lone surrogates: no valid text holds one, so no message can bring its own.

A template may look into a message (``'</think>' in content``, ``content.split('</think>')``). `Shielded` text answers
such questions as the original would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from npllama.errors import ChatTemplateError

_FIRST_STAND_IN, _STAND_INS = 0xD800, 0x800


def _with_other_cases(text: str) -> set[str]:
    """Return the characters of a text and those that they become in capitals or small letters."""
    return {*text, *text.upper(), *text.lower(), *text.title(), *text.casefold()}


def without_surrogates(text: str) -> str:
    """Return the text with lone surrogates replaced by U+FFFD, and pairs of them by the character they stand for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Shield:
    """Hides characters of messages from the search for special tokens.

    Parameters
    ----------
    special : iterable of str
        The special tokens.
    texts : iterable of str
        All texts that will be shielded.

    Raises
    ------
    ChatTemplateError
        The texts hold more different first and last characters of special tokens, in capitals or not, than there are
        stand-ins (2,048).
    """

    def __init__(self, special: Iterable[str], texts: Iterable[str]) -> None:
        ends = {end for token in special for end in (token[0], token[-1])}
        present = set(map(chr, range(128))).union(*map(_with_other_cases, texts))
        hidden = sorted(character for character in present if ends & _with_other_cases(character))
        if len(hidden) > _STAND_INS:
            raise ChatTemplateError(
                f"{len(hidden)} different characters of special tokens in one dialog, at most {_STAND_INS} can be told "
                "from them",
                remedy="Shorten the dialog.",
            )
        self._hide = {ord(character): _FIRST_STAND_IN + n for n, character in enumerate(hidden)}
        self._show = {stand_in: code for code, stand_in in self._hide.items()}

    def hide(self, text: str) -> Shielded:
        """Return the text of a message in a form that spells no special token."""
        return Shielded(self, without_surrogates(text).translate(self._hide))

    def show(self, text: str) -> str:
        """Return what a template wrote, or a part of it, in its real characters."""
        return str.translate(text, self._show)

    def plain(self, value: Any) -> Any:
        """Return a value that a template made, with every text in it in its real characters."""
        if isinstance(value, str):
            return self.show(value)
        if isinstance(value, dict):
            return {self.plain(key): self.plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.plain(item) for item in value)
        return value

    def wrapped(self, value: Any) -> Any:
        """Shield the texts in what a method of `str` returned."""
        if isinstance(value, str):
            return Shielded(self, value.translate(self._hide))
        if isinstance(value, (list, tuple)):
            return type(value)(self.wrapped(item) for item in value)
        return value


#: Methods of `str` that answer about, or give parts of, the real characters.
_METHODS = (
    "__repr__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __contains__ __getitem__ capitalize casefold center count "
    "endswith expandtabs find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isprintable isspace "
    "istitle isupper ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
).split()


def _real(name: str) -> Callable[..., Any]:
    """Make a method that calls the one of `str` on the real characters and shields the result."""
    method = getattr(str, name)

    def call(self: Shielded, *arguments: Any, **named: Any) -> Any:
        shield = self._shield
        return shield.wrapped(method(shield.show(self), *map(shield.plain, arguments), **shield.plain(named)))

    call.__name__ = name
    return call


class _RealMethods(type):
    """Adds the methods above to a class while it is made."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _RealMethods:
        return super().__new__(mcs, name, bases, {**{method: _real(method) for method in _METHODS}, **namespace})


class Shielded(str, metaclass=_RealMethods):
    """Text whose characters hold stand-ins, and whose methods work on, and compare with, the real ones.

    Whatever is not among ``_METHODS`` (joining, formatting, ``+``) works on the stand-ins and stays safe.
    """

    _shield: Shield

    def __new__(cls, shield: Shield, hidden: str) -> Shielded:
        """Wrap text that is hidden already."""
        self = super().__new__(cls, hidden)
        self._shield = shield
        return self

    def __str__(self) -> str:
        return self

    def __hash__(self) -> int:
        return hash(self._shield.show(self))

    def __iter__(self) -> Iterator[Any]:
        return iter([self[place] for place in range(len(self))])
