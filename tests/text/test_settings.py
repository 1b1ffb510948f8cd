"""The files beside tokenizer.json: beginning, end and chat template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from npllama.errors import TokenizerError, UnsupportedError
from npllama.text.tokenizer import Tokenizer
from tests.text.samples import MERGES, small_files, tokenizer_document

END = 263  # id of <|end|> in the small tokenizer


def make(document: dict[str, Any] | None = None, **others: Any) -> Tokenizer:
    files = small_files(**others)
    if document is not None:
        files["tokenizer.json"] = json.dumps(document).encode()
    return Tokenizer.from_files(files)


def with_bos(processor: Any) -> dict[str, Any]:
    return {**tokenizer_document(MERGES), "post_processor": processor}


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}


def test_without_other_files_there_is_no_bos_no_stop_and_no_template() -> None:
    tokenizer = make()
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.stop_ids) == (None, False, frozenset())
    assert tokenizer.chat_template is None
    assert tokenizer.special_tokens["<|end|>"] == END


@pytest.mark.parametrize("processor", [TEMPLATE, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}])
def test_bos_comes_from_the_post_processor(processor: Any) -> None:
    tokenizer = make(with_bos(processor))
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (END, True)
    assert tokenizer.encode("h")[0] == END
    assert tokenizer.encode("h", bos=False)[0] != END


def test_add_bos_token_wins_over_the_post_processor() -> None:
    tokenizer = make(with_bos(TEMPLATE), tokenizer_config={"add_bos_token": False})
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (END, False)
    assert tokenizer.encode("", bos=True) == [END]


def test_a_bos_token_alone_is_known_but_not_added() -> None:
    tokenizer = make(tokenizer_config={"bos_token": {"content": "<|end|>", "lstrip": False}})
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (END, False)


@pytest.mark.parametrize(
    ("config", "generation", "stops"),
    [
        ({"eos_token": "<|end|>"}, {}, {END}),
        ({}, {"eos_token_id": 3}, {3}),
        ({"eos_token": "<|end|>"}, {"eos_token_id": [3, 4]}, {3, 4, END}),
        ({"eos_token": None}, {"eos_token_id": None}, set()),
    ],
)
def test_stop_ids_are_gathered_from_both_files(config: Any, generation: Any, stops: set[int]) -> None:
    assert make(tokenizer_config=config, generation_config=generation).stop_ids == stops


def test_a_template_file_goes_before_the_one_in_the_config() -> None:
    files = small_files(tokenizer_config={"chat_template": "old"})
    assert Tokenizer.from_files(files).chat_template == "old"
    assert Tokenizer.from_files({**files, "chat_template.jinja": "новый".encode()}).chat_template == "новый"


def test_of_several_templates_the_default_one_counts() -> None:
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert make(tokenizer_config={"chat_template": several}).chat_template == "b"


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"tokenizer_config": {"bos_token": 7}}, "expected the text of a token, found 7"),
        ({"tokenizer_config": {"eos_token": "<|nowhere|>"}}, "'<|nowhere|>' is not in the vocabulary"),
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token is True, but bos_token is None"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"),
        ({"tokenizer_config": {"add_eos_token": True}}, "add_eos_token is true"),
        ({"tokenizer_config": {"chat_template": 1}}, "expected a template"),
        ({"generation_config": {"eos_token_id": "2"}}, "expected token ids, found '2'"),
        ({"generation_config": {"eos_token_id": [-1]}}, "expected token ids, found [-1]"),
        ({"generation_config": []}, "expected a JSON object, found list"),
    ],
)
def test_wrong_values_are_errors_that_show_them(others: dict[str, Any], says: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        make(**others)
    assert says in str(caught.value)


def test_a_post_processor_that_ends_texts_is_refused() -> None:
    ending = {"type": "TemplateProcessing", "single": [*TEMPLATE["single"], TEMPLATE["single"][0]]}
    with pytest.raises(UnsupportedError, match="unknown post_processor"):
        make(with_bos(ending))


def test_a_template_file_that_is_not_text_is_an_error() -> None:
    with pytest.raises(TokenizerError, match="not UTF-8 text at byte 1"):
        Tokenizer.from_files({**small_files(), "chat_template.jinja": b"a\xff"})
