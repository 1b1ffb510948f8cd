"""`npllama generate`: text to stdout and all else to stderr, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npllama.cli import main
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config
from tests.generation.fakes import ASSISTANT, BOS, EOS, USER, VOCABULARY, bigram, byte_tokenizer, writes
from tests.generation.test_lookup import LONGROPE

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


# --- drafts, caches, long texts -----------------------------------------------------------------------------------


def test_lookup_changes_nothing_but_the_passes(npllama: Npllama, loaded: Any) -> None:
    def found(*options: str) -> Any:
        model = writes("tick tack " * 5, after=12)
        loaded(model)
        done = npllama("generate", "m", "tick tack", *options, "--json")
        return [done.json[key] for key in ("tokens", "text", "finish_reason")], len(model.calls), done.err

    plain, passes, err = found()
    same, fewer, told = found("--lookup", "8")
    assert same == plain
    assert passes == 51
    assert fewer <= 15
    assert f"{51 - fewer} of them drafted\n" in told
    assert "drafted" not in err


@pytest.mark.parametrize(("option", "dtype"), [([], "float32"), (["--cache-dtype", "bf16"], "bfloat16")])
def test_the_cache_is_of_the_dtype_that_was_asked_for(
    npllama: Npllama, loaded: Any, monkeypatch: pytest.MonkeyPatch, option: list[str], dtype: str
) -> None:
    model = writes("ab", after=4)
    forward = model.forward
    caches = []

    def watched(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        caches.append(cache.dtype)
        return forward(tokens, cache, last=last)

    monkeypatch.setattr(model, "forward", watched)
    loaded(model)
    assert npllama("generate", "m", "x", *option).code == 0
    assert set(caches) == {dtype}


@pytest.mark.parametrize(
    ("length", "tokens", "outgrown"), [(30, 11, False), (30, 12, True), (39, 5, True), (41, 5, False)]
)
def test_a_text_that_outgrows_the_original_context_is_said_to(
    npllama: Npllama, loaded: Any, length: int, tokens: int, outgrown: bool
) -> None:
    config = loud_config(family="phi3", vocab_size=VOCABULARY, rope_scaling=LONGROPE)
    loaded(loud_model(config, tokenizer=byte_tokenizer(adds_bos=False)))
    done = npllama("generate", "m", "x" * length, "--raw", "-n", tokens, "--json")
    assert len(done.json["tokens"]) == tokens
    assert ("the text outgrew the 40 tokens" in done.err) == outgrown


# --- many prompts -------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "prompts"
    file.write_bytes("One\n\nthrée\r\nthe\u2028fourth".encode())
    return file


def test_every_line_of_a_batch_gets_the_object_that_it_gets_alone(npllama: Npllama, loaded: Any, lines: Path) -> None:
    loaded(bigram()[0])
    options = ("-n", "9", "--temperature", "1", "--stop", "e")
    done = npllama("generate", "m", "--batch", lines, "--lanes", "3", "--seed", "7", *options)
    found = {entry.pop("index"): entry for entry in map(json.loads, done.out.splitlines())}
    assert done.code == 0
    for index, prompt in enumerate(["One", "", "thrée", "the\u2028fourth"]):
        alone = npllama("generate", "m", prompt, "--seed", 7 + index, "--json", *options).json
        assert found.pop(index) == {key: alone[key] for key in ("prompt_tokens", "tokens", "text", "finish_reason")}
    assert found == {}


def test_a_batch_comes_from_stdin_too(npllama: Npllama, loaded: Any, typed: Any) -> None:
    loaded(writes("", tokenizer=byte_tokenizer(adds_bos=False)))
    typed("a\nb\n")
    done = npllama("generate", "m", "--batch", "-", "--raw")
    assert [json.loads(line)["prompt_tokens"] for line in done.out.splitlines()] == [[97], [98]]


def test_an_empty_batch_is_no_output(npllama: Npllama, loaded: Any, typed: Any) -> None:
    loaded(writes(""))
    typed("")
    done = npllama("generate", "m", "--batch", "-")
    assert (done.code, done.out) == (0, "")


def test_a_line_that_is_no_prompt_is_named(npllama: Npllama, loaded: Any, lines: Path) -> None:
    loaded(writes("", tokenizer=byte_tokenizer(adds_bos=False)))
    done = npllama("generate", "m", "--batch", lines, "--raw")
    assert (done.code, done.out) == (2, "")
    assert "ParameterError: prompts[1]: the prompt is empty" in done.err


@pytest.mark.parametrize("more", [["x"], ["--lookup", "4"]])
def test_a_batch_goes_with_neither_a_prompt_nor_drafts(npllama: Npllama, lines: Path, more: list[str]) -> None:
    done = npllama("generate", "m", "--batch", lines, *more)
    assert (done.code, done.out) == (2, "")
    assert "--batch goes with neither a PROMPT nor --lookup" in done.err


def test_a_batch_that_is_not_there_is_an_error(npllama: Npllama, tmp_path: Path) -> None:
    done = npllama("generate", "m", "--batch", tmp_path / "none")
    assert (done.code, done.out) == (5, "")
    assert "FileAccessError" in done.err
