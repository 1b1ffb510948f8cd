"""A stop string ends the text wherever the pieces are cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from npllama.errors import ParameterError
from npllama.generation.stop import StopStrings

_letters = st.text("ab\n", max_size=12)


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """Feed pieces until one completes a stop string; return what was shown, and whether there was one."""
    watch = StopStrings(stops)
    shown = []
    for piece in pieces:
        text, stopped = watch.feed(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, watch.finish()], False


def letter_by_letter(text: str, stops: list[str]) -> tuple[str, bool]:
    """Stop at the first end of a stop string; of those that end there the longest is cut off."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(st.lists(_letters, max_size=6), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@example(["ab", "c"], ["abc", "b"])
@example(["aab", ""], ["ab", "aab"])
def test_how_the_text_is_cut_makes_no_difference(pieces: list[str], stops: list[str]) -> None:
    shown, stopped = run(pieces, stops)
    assert ("".join(shown), stopped) == letter_by_letter("".join(pieces), stops)


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    watch = StopStrings(["\nUser:"])
    assert watch.feed("Yes.\nUs") == ("Yes.", False)
    assert watch.feed("ually\n") == ("\nUsually", False)
    assert watch.feed("User") == ("", False)
    assert watch.feed(": next") == ("", True)


def test_what_is_held_back_comes_out_at_the_end() -> None:
    watch = StopStrings(["</s>"])
    assert watch.feed("a < b </") == ("a < b ", False)
    assert watch.finish() == "</"
    assert watch.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3], [None]])
def test_a_stop_string_of_nothing_is_an_error(stops: Any) -> None:
    with pytest.raises(ParameterError, match="expected strings of at least one character"):
        StopStrings(stops)


def test_one_string_in_place_of_a_list_is_an_error() -> None:
    with pytest.raises(ParameterError, match="expected a list of strings"):
        StopStrings("\n\n")
