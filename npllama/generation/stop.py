"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from npllama.errors import ParameterError


class StopStrings:
    """Let a text through until a stop string is complete; what could still become part of one waits.

    The pieces that the text arrives in make no difference: the stop string that ends first wins, and of those that end
    together the longest.

    Parameters
    ----------
    stops : sequence of str
        None of them empty; no strings at all let everything through.

    Raises
    ------
    ParameterError
        An empty stop string, something that is not a string, or one string in place of a sequence of them.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise ParameterError(f"stop is the string {stops!r}, expected a list of strings")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise ParameterError(f"stop contains {stop!r}, expected strings of at least one character")
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return what is safe to show, and whether a stop string (not shown) is complete."""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            shown, self._held = self._held[:start], ""
            return shown, True
        waiting = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - waiting
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def finish(self) -> str:
        """Return what was waiting: no more text will come."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
