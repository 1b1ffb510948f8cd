"""A tokenizer.json with SentencePiece's pieces: what the tokenizers library gives for the whole file."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.errors import NpllamaError, TokenizerError, UnsupportedError
from npllama.text.tokenizer import Tokenizer
from tests.text.pieces import FORMS, added, dump, json_document, processor, train
from tests.text.samples import hard_strings, own_source

N = 700
#: Phi-3's: all but the first take the white space behind them with them.
MORE = [
    added(N, "<|endoftext|>"),
    added(N + 1, "<|assistant|>", rstrip=True),
    added(N + 2, "<|user|>", rstrip=True),
    added(N + 3, "<|end|>", rstrip=True),
    added(N + 4, "<|left|>", lstrip=True),
    added(N + 5, "<|plain|>", special=False),
]
CHATS = [
    "<s><|user|>\n Hello  there<|end|>\n<|assistant|>\n",
    "<|user|><|end|> <|end|>\u3000x \n <|left|> \n <|left|>y<|left|>",
    "a<|plain|>b <|plain|> c<|endoftext|> d</s>e <s> f",
    "</s>",
    " <s> ",
    "<|assistant|>\x1c\x1d x<|assistant|>\x85\xa0\u2003y",
]


def make(form: str, **config: Any) -> tuple[Tokenizer, Any]:
    """Return our reading of a file, and the library's."""
    document = json_document(train(), form, MORE)
    files = {"tokenizer.json": dump(document)} | ({"tokenizer_config.json": dump(config)} if config else {})
    return Tokenizer.from_files(files), tokenizers.Tokenizer.from_str(dump(document).decode())


@pytest.mark.parametrize("form", FORMS)
def test_text_gives_the_librarys_ids(form: str) -> None:
    ours, theirs = make(form)
    for text in [*hard_strings(300), own_source()[:30_000]]:
        if not any(token in text for token in ours.special_tokens):
            assert ours.encode(text) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", CHATS)
def test_special_tokens_and_the_spaces_around_them_give_the_librarys_ids(form: str, text: str) -> None:
    ours, theirs = make(form)
    assert ours.encode(text, allow_special=True) == theirs.encode(text).ids


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(st.lists(st.sampled_from([*(token["content"] for token in MORE), "</s>", " ", "\n", "a", "the", "é▁"])))
def test_any_mixture_gives_the_librarys_ids(form: str, parts: list[str]) -> None:
    ours, theirs = PAIRS[form]
    assert ours.encode("".join(parts), allow_special=True) == theirs.encode("".join(parts)).ids


PAIRS = {form: make(form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_decoding_gives_the_librarys_text(form: str) -> None:
    ours, theirs = make(form)
    for text in hard_strings(100):
        ids = ours.encode(text, bos=False)
        if form != "old":  # the decoder of such a file strips a space, its encoder adds one only where none is
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


def test_text_that_spells_a_special_token_is_text() -> None:
    ours, _ = make("legacy")
    text = "a<|user|>b</s><s><|plain|>"
    assert not {*range(3), *range(N, N + 6)} & {*ours.encode(text, bos=False)}
    assert ours.decode(ours.encode(text, bos=False)) == text


def test_both_files_of_one_model_agree() -> None:
    ours, _ = make("legacy")
    model = Tokenizer.from_files({"tokenizer.model": train()})
    for text in hard_strings(300):
        assert ours.encode(text) == model.encode(text) == [1, *processor(train()).encode(text)]


def test_the_json_goes_before_the_model_when_both_are_there() -> None:
    files = {"tokenizer.json": dump(json_document(train(), "first", MORE)), "tokenizer.model": train()}
    assert Tokenizer.from_files(files).special_tokens["<|user|>"] == N + 2


def test_other_files_and_own_tokens_add_to_it() -> None:
    document = json_document(train(), "legacy", MORE)
    files = {"tokenizer.json": dump(document), "tokenizer_config.json": dump({"eos_token": "<|end|>"})}
    tokenizer = Tokenizer.from_files(files, special_tokens=["<|zh|>"])
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.stop_ids) == (1, True, {N + 3})
    assert tokenizer.special_tokens["<|zh|>"] == N + 6
    assert tokenizer.decode(tokenizer.encode("你<|zh|>好", bos=False, allow_special=True)) == "你<|zh|>好"


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UnsupportedError) as caught:
        make("legacy")
    assert 'pip install "npllama[tokenizers]"' in str(caught.value)
    assert str(caught.value).startswith("tokenizer:tokenizer.json")


SPLIT = {"type": "Split", "pattern": {"String": "▁"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("pre_tokenizer", SPLIT, "pre_tokenizer: unknown step"),
        ("normalizer", {"type": "Prepend", "prepend": "x▁"}, "normalizer: unknown step"),
        ("pre_tokenizer", {**FORMS["always"]["pre_tokenizer"], "prepend_scheme": []}, "pre_tokenizer: unknown step"),
        ("normalizer", {"type": "Sequence", "normalizers": ["▁"]}, "normalizer: unknown step"),
        ("decoder", {"type": "WordPiece", "prefix": "▁"}, "decoder: unknown step"),
        ("pre_tokenizer", FORMS["always"]["pre_tokenizer"], "two steps put a space"),
        ("added_tokens", [added(1, "<s>", normalized=True)], "'<s>' has normalized set"),
        ("added_tokens", [added(1, "<s>", single_word=True)], "'<s>' has single_word set"),
        ("post_processor", {"type": "BertProcessing"}, "unknown post_processor"),
    ],
)
def test_forms_that_are_not_read_are_named(key: str, value: Any, says: str) -> None:
    document = json_document(train(), "legacy", MORE) | {key: value}
    with pytest.raises(UnsupportedError) as caught:
        Tokenizer.from_files({"tokenizer.json": dump(document)})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("vocab", [], "vocab: expected dict"),
        ("vocab", {"a": "1"}, "the id of 'a' is '1'"),
        ("vocab", {"a": 1, "b": 1}, "there twice"),
        ("merges", [["a", "nothing"]], "the tokenizers library refuses the file"),
    ],
)
def test_contradictions_are_errors(key: str, value: Any, says: str) -> None:
    document = json_document(train(), "legacy")
    document["model"][key] = value
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_files({"tokenizer.json": dump(document)})
    assert says in str(caught.value)


KEYS = [
    "type",
    "normalizers",
    "decoders",
    "pretokenizers",
    "replacement",
    "prepend_scheme",
    "processors",
    "content",
    "id",
]


@settings(max_examples=60)
@given(
    st.sampled_from(["normalizer", "pre_tokenizer", "decoder", "added_tokens", "model", "post_processor"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["▁", "Sequence", "Metaspace"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    ),
)
def test_other_content_raises_only_typed_errors(key: str, value: Any) -> None:
    document = json_document(train(), "legacy") | {key: value}
    with contextlib.suppress(NpllamaError):
        Tokenizer.from_files({"tokenizer.json": dump(document)})
