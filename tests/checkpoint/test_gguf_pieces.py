"""SentencePiece's vocabulary out of a GGUF file: the tokenizer.model that is written, as the library reads it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.gguf.tokenizer import tokenizer_files
from npllama.errors import TokenizerError, UnsupportedError

sentencepiece = pytest.importorskip("sentencepiece")


def parsed(files: dict[str, bytes], name: str) -> Any:
    return json.loads(files[name])


def piece_metadata(**changes: Any) -> dict[str, Any]:
    """Return a GGUF tokenizer of SentencePiece's kind: the bytes, four pieces, a chat's token and two unused ones."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, "a", "b", "▁a", "ab", "<|end|>", "own word", "[PAD265]", "[PAD266]"]
    found = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 4 + [4, 4, 5, 5], np.int32),
        "scores": np.array([0.0] * 259 + [-4.0, -3.0, -1.0, -2.0, -1000.0, 0.0, -1e4, -1e4], np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    found.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def with_one(key: str, index: int, value: Any) -> Any:
    """Return one of the arrays above with one value replaced."""
    array = piece_metadata()[f"tokenizer.ggml.{key}"].copy()
    array[index] = value
    return array


def piece_files(**changes: Any) -> dict[str, bytes]:
    return tokenizer_files(piece_metadata(**changes), "model.gguf")


def library(files: dict[str, bytes]) -> Any:
    """Load the written model with the sentencepiece library."""
    return sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])


def test_pieces_scores_and_types_are_written_as_the_library_reads_them() -> None:
    found = library(piece_files())
    metadata = piece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"][:265]
    assert [found.id_to_piece(index) for index in range(len(found))] == [*tokens[:264], "own▁word"]
    assert [found.get_score(index) for index in range(265)] == metadata["tokenizer.ggml.scores"][:265].tolist()
    assert [index for index in range(265) if found.is_control(index)] == [1, 2, 263]
    assert [index for index in range(265) if found.is_byte(index)] == list(range(3, 259))
    assert (found.unk_id(), found.bos_id(), found.eos_id()) == (0, 1, 2)
    assert found.encode("ab<|end|>own word", out_type=str) == [
        "▁a",
        "b",
        *(f"<0x{b:02X}>" for b in b"<|end|>"),
        "own▁word",
    ]


def test_unused_tokens_at_the_end_are_left_out_and_others_are_never_found() -> None:
    assert len(library(piece_files())) == 265
    kept = library(piece_files(padding_token_id=265))
    assert len(kept) == 266
    among = library(piece_files(token_type=with_one("token_type", 262, 5)))
    assert among.encode("bab", out_type=str) == ["<0xE2>", "<0x96>", "<0x81>", "b", "a", "b"]


@pytest.mark.parametrize(("said", "pieces"), [(None, ["▁a", "b"]), (True, ["▁a", "b"]), (False, ["ab"])])
def test_a_space_is_put_before_text_unless_the_file_says_otherwise(said: bool | None, pieces: list[str]) -> None:
    assert library(piece_files(add_space_prefix=said)).encode("ab", out_type=str) == pieces


@pytest.mark.parametrize(("said", "added"), [(None, True), (True, True), (False, False)])
def test_sentencepiece_adds_bos_unless_the_file_says_otherwise(said: bool | None, added: bool) -> None:
    config = parsed(piece_files(add_bos_token=said), "tokenizer_config.json")
    assert (config["add_bos_token"], config["add_eos_token"]) == (added, False)
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


def test_only_phi_3s_special_tokens_take_white_space_with_them() -> None:
    assert parsed(piece_files(), "tokenizer_config.json")["added_tokens_decoder"] == {}
    files = tokenizer_files(piece_metadata() | {"general.architecture": "phi3"}, "model.gguf")
    decoder = parsed(files, "tokenizer_config.json")["added_tokens_decoder"]
    assert {index: token["content"] for index, token in decoder.items() if token["rstrip"]} == {
        "2": "</s>",
        "263": "<|end|>",
    }


def test_what_ends_a_text_is_a_control_token() -> None:
    assert library(piece_files(eot_token_id=264)).is_control(264)
    assert parsed(piece_files(eot_token_id=264), "generation_config.json")["eos_token_id"] == [2, 264]


def test_the_unknown_token_can_be_named_instead_of_typed() -> None:
    types = with_one("token_type", 0, 1)
    assert library(piece_files(token_type=types, unknown_token_id=0)).unk_id() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "no types or no scores"),
        ({"token_type": None}, "no types or no scores"),
        ({"scores": np.full(267, -1000.0, np.float32)}, "all tokens have the same score"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"precompiled_charsmap": np.zeros(4, np.int8)}, "normalises text"),
    ],
)
def test_pieces_without_what_their_ids_depend_on_are_unsupported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        piece_files(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.0] * 267}, "scores: expected a number for each of 267 tokens"),
        ({"scores": np.zeros(266, np.float32)}, "scores: expected a number for each of 267 tokens"),
        ({"scores": with_one("scores", 259, np.nan)}, "a score is NaN"),
        ({"token_type": with_one("token_type", 259, 7)}, "found the type 7"),
        ({"token_type": with_one("token_type", 259, 6)}, "257 tokens for bytes"),
        ({"token_type": with_one("token_type", 259, 2)}, "2 unknown tokens"),
        ({"token_type": with_one("token_type", 0, 3)}, "0 unknown tokens"),
        ({"tokens": with_one("tokens", 259, "")}, "the token 259 is empty"),
        ({"tokens": with_one("tokens", 259, "b")}, "token 'b' has two ids"),
        ({"add_space_prefix": 1}, "found int, expected bool"),
    ],
)
def test_pieces_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        piece_files(**changes)
    assert str(caught.value).startswith("model.gguf:tokenizer.ggml.")
