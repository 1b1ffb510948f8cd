"""`npllama generate`: text to stdout and all else to stderr, or one JSON object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npllama.cli import main
from tests.generation.fakes import ASSISTANT, BOS, EOS, USER, bigram, byte_tokenizer, writes

Npllama = Callable[..., Any]


def test_the_text_is_all_that_stdout_gets(npllama: Npllama, loaded: Any) -> None:
    loaded(writes("Hällo 🦙", after=5))
    done = npllama("generate", "m", "hi")
    assert (done.code, done.out) == (0, "Hällo 🦙\n")
    assert "5 tokens at" in done.err
    assert "12 tokens at" in done.err


def test_a_newline_at_the_end_of_the_text_is_not_doubled(npllama: Npllama, loaded: Any) -> None:
    loaded(writes("Hi.\n", after=5))
    assert npllama("generate", "m", "hi").out == "Hi.\n"


def test_json_is_one_object_with_every_id(npllama: Npllama, loaded: Any) -> None:
    model = writes("ab", after=3, tokenizer=byte_tokenizer(adds_bos=False))
    loaded(model)
    found = npllama("generate", "m", "x", "--json").json
    assert set(found) == {
        "prompt_tokens", "tokens", "text", "finish_reason", "prefill_tokens_per_s", "decode_tokens_per_s",
    }  # fmt: skip
    assert found["prompt_tokens"] == [USER, ord("x"), ASSISTANT]
    assert (found["tokens"], found["text"], found["finish_reason"]) == ([97, 98, EOS], "ab", "stop")
    assert found["prefill_tokens_per_s"] > 0
    assert found["decode_tokens_per_s"] > 0


def test_one_token_has_no_decode_speed(npllama: Npllama, loaded: Any) -> None:
    loaded(writes("ab", after=4))
    done = npllama("generate", "m", "x", "-n", "1", "--json")
    assert "text: 1 tokens\n" in done.err
    found = done.json
    assert (found["finish_reason"], found["decode_tokens_per_s"]) == ("length", None)


@pytest.mark.parametrize(
    ("template", "options", "ids"),
    [
        (True, [], [BOS, USER, ord("x"), ASSISTANT]),
        (True, ["--raw"], [BOS, ord("x")]),
        (False, [], [BOS, ord("x")]),
    ],
)
def test_the_chat_template_serves_unless_raw(
    npllama: Npllama, loaded: Any, template: bool, options: list[str], ids: list[int]
) -> None:
    tokenizer = byte_tokenizer() if template else byte_tokenizer(chat_template=None)
    loaded(writes("", tokenizer=tokenizer))
    assert npllama("generate", "m", "x", "--json", *options).json["prompt_tokens"] == ids


@pytest.mark.parametrize(
    ("typed_text", "prompt"), [("ab", b"ab"), ("ab\n", b"ab"), ("ab\r\n", b"ab"), ("ab\n\n", b"ab\n"), ("", b"")]
)
def test_the_prompt_comes_from_stdin_without_its_last_newline(
    npllama: Npllama, loaded: Any, typed: Any, typed_text: str, prompt: bytes
) -> None:
    loaded(writes(""))
    typed(typed_text)
    assert npllama("generate", "m", "--raw", "--json").json["prompt_tokens"] == [BOS, *prompt]


def test_bytes_on_stdin_that_are_no_text_are_an_error(npllama: Npllama, loaded: Any, typed: Any) -> None:
    loaded(writes(""))
    typed(b"abc\xff")
    done = npllama("generate", "m")
    assert (done.code, done.out) == (3, "")
    assert "TokenizerError: stdin@3: byte 0xff is not UTF-8 text" in done.err


def test_show_tokens_lists_ids_and_pieces_on_stderr(npllama: Npllama, loaded: Any) -> None:
    loaded(writes("é\n", after=3))
    done = npllama("generate", "m", "a b", "--raw", "--show-tokens", "--stop", "\n")
    assert "prompt tokens: 256 '<bos>', 97 'a', 32 ' ', 98 'b'\n" in done.err
    assert r"generated tokens: 169 '\xa9', 10 '\n'" in done.err


def test_the_notice_of_a_model_goes_to_stderr(npllama: Npllama, loaded: Any) -> None:
    model = writes("a", after=4)
    model.notice = "This store keeps the first 2 of 30 layers."
    loaded(model)
    done = npllama("generate", "m", "x")
    assert "npllama: This store keeps the first 2 of 30 layers.\n" in done.err
    assert done.out == "a\n"


def test_sampling_options_reach_the_sampling(npllama: Npllama, loaded: Any) -> None:
    def tokens(*options: str) -> list[int]:
        loaded(bigram()[0])
        found: list[int] = npllama("generate", "m", "x", "-n", "20", "--json", *options).json["tokens"]
        return found

    sampled = tokens("--temperature", "1", "--seed", "1")
    assert sampled == tokens("--temperature", "1", "--seed", "1")
    assert sampled != tokens("--temperature", "1", "--seed", "2")
    greedy = tokens()
    assert sampled != greedy
    assert greedy == tokens("--temperature", "1", "--top-k", "1")
    assert greedy == tokens("--temperature", "1", "--top-p", "1e-9")
    assert greedy == tokens("--temperature", "1", "--min-p", "1")


def test_every_stop_text_stops(npllama: Npllama, loaded: Any) -> None:
    loaded(writes("One. Two! Three", after=4))
    assert npllama("generate", "m", "x", "--stop", "?", "--stop", "!").out == "One. Two\n"


@pytest.mark.parametrize("option", [["--temperature", "nan"], ["--top-p", "0"], ["--top-k", "-1"], ["--seed", "-1"]])
def test_a_setting_out_of_its_range_is_a_usage_error(npllama: Npllama, loaded: Any, option: list[str]) -> None:
    loaded(writes(""))
    done = npllama("generate", "m", "x", *option)
    assert (done.code, done.out) == (2, "")
    assert "npllama: ParameterError: " in done.err


def test_a_real_store_generates_with_the_textbook(npllama: Npllama, store: Path) -> None:
    first, second = (npllama("generate", store, "hi", "-n", "5", "--backend", "numpy", "--json").json for _ in range(2))
    assert first["tokens"] == second["tokens"]
    assert len(first["tokens"]) == 5


def test_ctrl_c_ends_quietly_after_what_was_written(
    loaded: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = writes("abcdef", after=4)
    forward = model.forward

    def interrupted(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        if len(model.calls) == 3:
            raise KeyboardInterrupt
        return forward(tokens, cache, last=last)

    monkeypatch.setattr(model, "forward", interrupted)
    loaded(model)
    assert main(["generate", "m", "x"]) == 130
    assert capsys.readouterr() == ("abc\n", "")


def test_text_appears_as_it_is_written(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    model = writes("ab", after=4)
    forward = model.forward

    def watched(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        events.append("forward")
        return forward(tokens, cache, last=last)

    class Out:
        def write(self, text: str) -> int:
            events.append(text)
            return len(text)

        def flush(self) -> None:
            events.append("flush")

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr("sys.stdout", Out())
    loaded(model)
    assert main(["generate", "m", "x"]) == 0
    shown = [event for event in events if event]
    assert shown[:6] == ["forward", "a", "flush", "forward", "b", "flush"]
