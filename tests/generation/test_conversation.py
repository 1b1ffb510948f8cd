"""A dialog computes only what is new, and survives what goes wrong in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from npllama.dtypes import Array
from npllama.errors import ContextOverflowError
from npllama.generation.conversation import Conversation
from tests.generation.fakes import ASSISTANT, EOS, SYSTEM, USER, FakeModel, byte_tokenizer, one_hot

ANSWER = b"yes"


def answering(**settings: Any) -> Any:
    """Return a model that answers every message with the same word."""

    def logits(tokens: Sequence[int]) -> Array:
        said = len(tokens) - 1 - max(place for place, token in enumerate(tokens) if token == ASSISTANT)
        return one_hot(ANSWER[said] if said < len(ANSWER) else EOS)

    return FakeModel(logits, tokenizer=byte_tokenizer(adds_bos=False), **settings)


def say(conversation: Conversation, text: str, **settings: Any) -> str:
    return "".join(step.text for step in conversation.reply(text, **settings))


def test_messages_and_answers_alternate_behind_the_system_message() -> None:
    conversation = Conversation(answering(), system="s", capacity=100)
    assert say(conversation, "a") == "yes"
    assert say(conversation, "b") == "yes"
    roles = [(message["role"], message["content"]) for message in conversation.messages]
    assert roles == [("system", "s"), ("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "yes")]


def test_a_later_turn_feeds_only_what_the_cache_lacks() -> None:
    model = answering()
    conversation = Conversation(model, system="s", capacity=100)
    say(conversation, "a")
    say(conversation, "b")
    prompts = [call for call in model.calls if ASSISTANT in call]
    assert prompts == [[SYSTEM, ord("s"), USER, ord("a"), ASSISTANT], [USER, ord("b"), ASSISTANT]]


def test_an_interrupted_answer_stays_in_the_dialog() -> None:
    conversation = Conversation(answering(), capacity=100)
    steps = conversation.reply("a")
    assert next(steps).text + next(steps).text == "ye"
    steps.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "ye"}
    assert say(conversation, "b") == "yes"


def test_a_turn_without_any_text_is_forgotten() -> None:
    conversation = Conversation(answering(), capacity=100)
    conversation.reply("a").close()
    assert conversation.messages == []


def test_a_message_that_does_not_fit_leaves_the_dialog_as_it_was() -> None:
    conversation = Conversation(answering(), capacity=20)
    say(conversation, "a")
    before = list(conversation.messages)
    with pytest.raises(ContextOverflowError, match="the context holds 20"):
        conversation.reply("x" * 30)
    assert conversation.messages == before
    assert say(conversation, "b") == "yes"


def test_a_message_given_twice_is_fed_at_least_by_one_token() -> None:
    model = answering()
    conversation = Conversation(model, capacity=100)
    conversation.reply("a", max_new_tokens=1).close()
    for _ in range(2):
        steps = conversation.reply("a", max_new_tokens=1)
        conversation.messages.clear()
        assert next(steps).text == "y"
        steps.close()
        conversation.messages.clear()
    assert model.calls == [[USER, ord("a"), ASSISTANT], [ASSISTANT]]
