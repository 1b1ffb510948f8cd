"""Shielded text answers as the original does, and never spells a special token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.errors import ChatTemplateError
from npllama.text.shield import Shield, Shielded, without_surrogates

SPECIAL = ("<|im_start|>", "</think>", "[INST]", "<s>")
texts = st.text("<>|/[]sthink INST\n", max_size=30)


def shielded(text: str) -> Shielded:
    return Shield(SPECIAL, [text]).hide(text)


@given(texts)
def test_hidden_text_holds_no_end_of_a_special_token_and_shows_as_it_was(text: str) -> None:
    shield = Shield(SPECIAL, [text])
    hidden = shield.hide(text)
    assert not set("<>[]") & set(str.__str__(hidden).translate({}))
    assert shield.show(hidden) == text


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("split", ("</think>",)),
        ("split", ()),
        ("partition", (">",)),
        ("strip", ("<>",)),
        ("strip", ()),
        ("replace", ("<s>", "[]")),
        ("startswith", ("<s>",)),
        ("endswith", (("</think>", "]"),)),
        ("find", ("<",)),
        ("count", (">",)),
        ("upper", ()),
        ("__repr__", ()),
        ("splitlines", ()),
        ("removeprefix", ("<s>",)),
        ("__contains__", ("</think>",)),
        ("__eq__", ("<s>",)),
        ("__getitem__", (slice(1, 5),)),
    ],
)
@given(text=texts)
def test_methods_answer_as_the_originals_do(method: str, arguments: tuple[Any, ...], text: str) -> None:
    shield = Shield(SPECIAL, [text, "<s>[]"])
    result = getattr(shield.hide(text), method)(*arguments)
    assert normal(shield, result) == normal(shield, getattr(text, method)(*arguments))


def normal(shield: Shield, value: Any) -> Any:
    value = shield.plain(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def test_shielded_text_serves_as_a_key() -> None:
    assert {"<s>": 1}[shielded("<s>")] == 1
    assert shielded("<s>") in ("a", "<s>")


def test_iterating_gives_characters_that_compare() -> None:
    assert [character == "<" for character in shielded("<a")] == [True, False]


def test_whatever_a_template_does_to_a_message_the_stand_ins_stay() -> None:
    text = shielded("<|im_start|>")
    made = [
        "x" + text,
        text + "x",
        text * 2,
        "%s" % (text,),  # noqa: UP031 - templates do
        f"{text}",
        "".join([text]),
        str(text),
        text.upper().lower(),
    ]
    assert not any("<|im_start|>" in str.__str__(result).translate({}) for result in made)


def test_a_message_cannot_bring_its_own_stand_in() -> None:
    shield = Shield(SPECIAL, ["<"])
    stand_in = str.__str__(shield.hide("<")).translate({})
    assert shield.show(shield.hide(stand_in + "a<")) == "\ufffda<"


def test_surrogates_are_replaced_or_joined() -> None:
    assert without_surrogates("a\ud800b\ud83e\udd17") == "a\ufffdb🤗"


def test_more_different_characters_than_stand_ins_is_an_error() -> None:
    many = [chr(0x4E00 + number) for number in range(2049)]
    with pytest.raises(ChatTemplateError, match="2049 different characters"):
        Shield(many, ["".join(many)])
