"""Drafts: tokens that a text may go on with, since it went on so before."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST_GRAM = 3
_LONGEST_PAUSE = 16


class Lookup:
    """Guesses the next tokens of a text from what followed its last ones where they stood before.

    Of the places where the last three tokens stood before, the latest counts; failing that, the last two or the last
    one. What follows there is copied, the copy itself included where it reaches the end: a text of period two goes on
    so. Known as prompt-lookup decoding.

    Guesses that are wrong cost time. After one that was wrong from its first token on there is none for a token, then
    for two, four, and so on up to 16, until one is right again; and each makes the next half as long, as one whose
    first token was right makes it twice as long.

    Parameters
    ----------
    tokens : iterable of int
        The text so far.
    size : int
        Most tokens to guess at a time; 0 guesses none.
    """

    def __init__(self, tokens: Iterable[int], size: int) -> None:
        self._size = size
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token behind its latest place
        self._guess: int | None = None  # first token of a draft that is not judged yet
        self._longest = size  # tokens of the next draft
        self._pause = 0  # tokens that the latest pause took, 0 if the latest draft was right
        self._rest = 0  # tokens of it to come
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Take the next token of the text."""
        if self._size == 0:
            return
        if self._guess is not None:
            if token == self._guess:
                self._longest, self._pause = min(2 * self._longest, self._size), 0
            else:
                self._longest, self._pause = max(1, self._longest // 2), min(max(1, 2 * self._pause), _LONGEST_PAUSE)
            self._rest = self._pause
            self._guess = None
        elif self._rest:
            self._rest -= 1
        # A gram is entered once something follows it: the last one finds the places before its own.
        self._followers.update(dict.fromkeys(self._last_grams(), len(self._tokens)))
        self._tokens.append(token)

    def draft(self, limit: int) -> list[int]:
        """Guess how the text goes on, by at most ``limit`` tokens."""
        length = min(self._longest, limit)
        if length <= 0 or self._rest:
            return []
        begin = next((self._followers[gram] for gram in self._last_grams() if gram in self._followers), None)
        if begin is None:
            return []
        period = len(self._tokens) - begin
        draft = [self._tokens[begin + i % period] for i in range(length)]
        self._guess = draft[0]
        return draft

    def _last_grams(self) -> list[tuple[int, ...]]:
        """Return the last tokens as n-grams, the longest first."""
        longest = min(_LONGEST_GRAM, len(self._tokens))
        return [tuple(self._tokens[-n:]) for n in range(longest, 0, -1)]
