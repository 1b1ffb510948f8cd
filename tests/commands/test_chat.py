"""`npllama chat`: answers to stdout, and nothing that goes wrong in one ends the dialog."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config
from tests.generation.fakes import ASSISTANT, VOCABULARY, FakeModel, byte_tokenizer
from tests.generation.test_conversation import answering
from tests.generation.test_lookup import LONGROPE

Npllama = Callable[..., Any]


def prompts(model: FakeModel) -> list[bytes]:
    """Return what was fed before each answer, special tokens aside."""
    return [bytes(token for token in call if token < 256) for call in model.calls if ASSISTANT in call]


def test_every_line_of_stdin_gets_an_answer(npllama: Npllama, loaded: Any, typed: Any) -> None:
    model = answering()
    loaded(model)
    typed("one\n\n two \nthree")
    done = npllama("chat", "m", "--temperature", "0")
    assert (done.code, done.out, done.err) == (0, "yes\nyes\nyes\n", "")
    assert prompts(model) == [b"one", b"two", b"three"]


def test_the_system_message_comes_first(npllama: Npllama, loaded: Any, typed: Any) -> None:
    model = answering()
    loaded(model)
    typed("one\n")
    npllama("chat", "m", "--system", "Be brief.")
    assert prompts(model) == [b"Be brief.one"]


def test_clear_starts_anew(npllama: Npllama, loaded: Any, typed: Any) -> None:
    model = answering()
    loaded(model)
    typed("one\n/clear\ntwo\n")
    npllama("chat", "m", "--system", "s")
    assert prompts(model) == [b"sone", b"stwo"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    npllama: Npllama, loaded: Any, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = answering()
    forward = model.forward

    def interrupted(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        if len(model.calls) == 2 and "done" not in vars(model):
            vars(model)["done"] = True
            raise KeyboardInterrupt
        return forward(tokens, cache, last=last)

    monkeypatch.setattr(model, "forward", interrupted)
    loaded(model)
    typed("one\ntwo\n")
    done = npllama("chat", "m")
    assert (done.code, done.out, done.err) == (0, "ye\nyes\n", " [stopped]")


def test_a_message_that_does_not_fit_is_said_and_the_chat_goes_on(npllama: Npllama, loaded: Any, typed: Any) -> None:
    loaded(answering())
    typed(f"one\n{'x' * 50}\ntwo\n")
    done = npllama("chat", "m", "--context", "30")
    assert (done.code, done.out) == (0, "yes\nyes\n")
    assert "ContextOverflowError: the prompt has" in done.err
    assert "but the context holds 30. Shorten the prompt. Or type /clear to start anew." in done.err


def test_a_context_beyond_the_models_is_an_error(npllama: Npllama, loaded: Any, typed: Any) -> None:
    loaded(answering(max_seq_len=64))
    typed("one\n")
    done = npllama("chat", "m", "--context", "65")
    assert done.code == 3
    assert "65" in done.err
    assert "64" in done.err


def test_a_model_without_a_tokenizer_cannot_chat(npllama: Npllama, loaded: Any, typed: Any) -> None:
    model = answering()
    model.tokenizer = None
    loaded(model)
    typed("one\n")
    done = npllama("chat", "m")
    assert done.code == 3
    assert "TokenizerError" in done.err


class Keyboard:
    """What a person types: lines, and exceptions for the keys that raise them."""

    def __init__(self, *typed: str | BaseException) -> None:
        self._typed = iter(typed)

    def __call__(self, prompt: str) -> str:
        event = next(self._typed)
        if isinstance(event, BaseException):
            raise event
        return event


def test_at_a_terminal_ctrl_c_at_the_prompt_does_not_leave_but_ctrl_d_does(
    npllama: Npllama, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(answering())
    monkeypatch.setattr("npllama.commands.chat._is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", Keyboard("one", KeyboardInterrupt(), "two", EOFError()))
    done = npllama("chat", "m")
    assert (done.code, done.out) == (0, "yes\nyes\n\n")
    assert "Ctrl-C stops an answer, Ctrl-D leaves, /clear starts anew" in done.err


def test_drafts_come_from_the_whole_dialog(npllama: Npllama, loaded: Any, typed: Any) -> None:
    def passes(*options: str) -> int:
        model = answering()
        loaded(model)
        typed("one\ntwo\nthree")
        assert npllama("chat", "m", "--temperature", "0", *options).out == "yes\nyes\nyes\n"
        return len(model.calls)

    assert passes() == 3 * 4
    assert passes("--lookup", "4") < 3 * 4


def test_the_cache_is_of_the_dtype_that_was_asked_for(
    npllama: Npllama, loaded: Any, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = answering()
    forward = model.forward
    caches = []

    def watched(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        caches.append(cache.dtype)
        return forward(tokens, cache, last=last)

    monkeypatch.setattr(model, "forward", watched)
    loaded(model)
    typed("one\n/clear\ntwo")
    npllama("chat", "m", "--cache-dtype", "bf16")
    assert set(caches) == {"bfloat16"}


def test_a_dialog_that_outgrows_the_original_context_is_said_to_once(npllama: Npllama, loaded: Any, typed: Any) -> None:
    config = loud_config(family="phi3", vocab_size=VOCABULARY, rope_scaling=LONGROPE)
    loaded(loud_model(config, tokenizer=byte_tokenizer(adds_bos=False)))
    typed("one\ntwo\nthree\nfour\nfive\n")
    done = npllama("chat", "m", "--temperature", "0", "-n", "8")
    assert done.code == 0
    assert done.err.count("the text outgrew the 40 tokens") == 1


def test_a_first_message_beyond_the_original_context_outgrows_nothing(
    npllama: Npllama, loaded: Any, typed: Any
) -> None:
    config = loud_config(family="phi3", vocab_size=VOCABULARY, rope_scaling=LONGROPE)
    loaded(loud_model(config, tokenizer=byte_tokenizer(adds_bos=False)))
    typed("x" * 50 + "\ntwo\n")
    assert "outgrew" not in npllama("chat", "m", "--temperature", "0", "-n", "8").err
