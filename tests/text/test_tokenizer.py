"""The Tokenizer itself: text in, text out, own special tokens, files, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.errors import (
    ConfigMismatchError,
    FileAccessError,
    NotACheckpointError,
    NpllamaError,
    ParameterError,
    TokenizerError,
)
from npllama.text.tokenizer import Tokenizer
from tests.text.samples import hard_strings, small_files

SMALL = Tokenizer.from_files(small_files())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decoding_gives_back_the_text(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


def test_a_lone_surrogate_becomes_the_replacement_character_and_a_pair_its_character() -> None:
    assert SMALL.decode(SMALL.encode("a\ud800b")) == "a\ufffdb"
    assert SMALL.decode(SMALL.encode("\ud83e\udd17")) == "🤗"


@pytest.mark.parametrize("text", [" " * 1_000_000, " \n" * 500_000, "\r\n" * 500_000, "a" * 1_000_000, "'" * 1_000_000])
def test_a_megabyte_of_one_kind_is_encoded(text: str) -> None:
    assert SMALL.decode(SMALL.encode(text)) == text


@given(st.lists(st.integers(0, 300), max_size=60))
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(ids: list[int]) -> None:
    stream = SMALL.stream()
    pieces = [stream.feed(index) for index in ids]
    last = stream.finish()
    assert "".join(pieces) + last == SMALL.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_streamed_pieces_of_real_text_hold_only_whole_characters(text: str) -> None:
    stream = SMALL.stream()
    pieces = [stream.feed(index) for index in SMALL.encode(text)]
    assert text.startswith(tuple("".join(pieces[:end]) for end in range(len(pieces) + 1))[-1])
    assert all(text.startswith("".join(pieces[:end])) for end in range(len(pieces) + 1))
    assert stream.finish() == ""


def test_a_character_of_several_tokens_comes_with_the_last_of_them() -> None:
    stream = SMALL.stream()
    ids = SMALL.encode("🤗")
    assert [stream.feed(index) for index in ids] == [""] * (len(ids) - 1) + ["🤗"]
    stream.feed(ids[0])
    assert stream.finish() == "\ufffd"
    assert stream.feed(SMALL.encode("h")[0]) == "h"


def test_ids_without_a_token_decode_to_nothing() -> None:
    # Embeddings are often padded: such an id can be sampled.
    assert SMALL.decode([SMALL.n_vocab, 10**9, *SMALL.encode("he")]) == "he"
    assert SMALL.token_piece(SMALL.n_vocab) == ""


@pytest.mark.parametrize("token", [-1, 1.5, "1", None, np.float32(1)])
def test_what_is_no_token_id_is_refused_with_its_value(token: Any) -> None:
    with pytest.raises(ParameterError, match="token id"):
        SMALL.decode([token])


def test_numpy_integers_are_token_ids() -> None:
    ids = np.array(SMALL.encode("hello"), dtype=np.int32)
    assert SMALL.decode(ids) == "hello"


def test_a_piece_shows_text_and_the_bytes_of_half_characters() -> None:
    assert [SMALL.token_piece(index) for index in SMALL.encode("the 🤗")] == ["the", " ", r"\xf0\x9f", r"\xa4", r"\x97"]


@pytest.mark.parametrize("text", [b"bytes", None, 1])
def test_what_is_no_text_is_refused(text: Any) -> None:
    with pytest.raises(ParameterError, match="text is"):
        SMALL.encode(text)


def test_bos_that_does_not_exist_cannot_be_asked_for() -> None:
    with pytest.raises(ParameterError, match="no BOS token"):
        SMALL.encode("h", bos=True)


def test_own_special_tokens_come_after_the_vocabulary_in_order() -> None:
    own = ["<|zh|>", "<|teacher|>", "<|zh|>!"]
    tokenizer = Tokenizer.from_files(small_files(), special_tokens=own)
    assert [tokenizer.special_tokens[text] for text in own] == [SMALL.n_vocab, SMALL.n_vocab + 1, SMALL.n_vocab + 2]
    assert tokenizer.n_vocab == SMALL.n_vocab + 3
    assert tokenizer.encode("a<|zh|>b") == SMALL.encode("a<|zh|>b")
    ids = tokenizer.encode("a<|zh|>b<|zh|>!", allow_special=True)
    assert ids == [*SMALL.encode("a"), SMALL.n_vocab, *SMALL.encode("b"), SMALL.n_vocab + 2]
    assert tokenizer.decode(ids) == "a<|zh|>b<|zh|>!"


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ([""], "is empty"),
        (["<|a|>", "<|a|>"], "'<|a|>' is in the vocabulary already"),
        (["<|end|>"], "'<|end|>' is in the vocabulary already"),
        (["hello"], "'hello' is in the vocabulary already"),
    ],
)
def test_own_special_tokens_must_be_new(own: list[str], says: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_files(small_files(), special_tokens=own)
    assert says in str(caught.value)


def test_a_model_with_too_few_rows_is_refused_with_both_numbers() -> None:
    tokenizer = Tokenizer.from_files(small_files(), special_tokens=["<|zh|>"])
    tokenizer.check_model_rows(tokenizer.n_vocab)
    tokenizer.check_model_rows(tokenizer.n_vocab + 1000)
    with pytest.raises(ConfigMismatchError) as caught:
        tokenizer.check_model_rows(SMALL.n_vocab)
    assert f"{tokenizer.n_vocab} ids (1 of them own" in str(caught.value)
    assert f"{SMALL.n_vocab} rows" in str(caught.value)


@pytest.mark.real
def test_the_seeds_own_tokens_extend_llama_3(llama3_tokenizer_model: Path) -> None:
    tokenizer = Tokenizer.from_path(llama3_tokenizer_model, special_tokens=["<|好|>"])
    assert tokenizer.special_tokens["<|好|>"] == 128_256
    with pytest.raises(ConfigMismatchError):
        tokenizer.check_model_rows(128_256)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_every_place_that_a_tokenizer_can_be_in_is_found(tmp_path: Path) -> None:
    files = small_files(generation_config={"eos_token_id": 5})
    folder = write(tmp_path / "hf", files)
    store = write(tmp_path / "model" / "tokenizer", files).parent
    other = tmp_path / "other.json"
    other.write_bytes(files["tokenizer.json"])
    for path in (folder, store, folder / "tokenizer.json", str(folder)):
        assert Tokenizer.from_path(path).stop_ids == {5}
    assert Tokenizer.from_path(other).n_vocab == SMALL.n_vocab


def test_own_special_tokens_can_be_given_with_a_path(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", small_files())
    assert Tokenizer.from_path(folder, special_tokens=["<|x|>"]).special_tokens["<|x|>"] == SMALL.n_vocab


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda path: path / "nowhere", FileAccessError, "No such file"),
        (lambda path: path, NotACheckpointError, "no tokenizer here"),
        (lambda path: write(path / "empty", {}), NotACheckpointError, "tokenizer.json or tokenizer.model"),
    ],
)
def test_a_path_without_a_tokenizer_is_an_error(
    tmp_path: Path, make: Any, error: type[NpllamaError], says: str
) -> None:
    with pytest.raises(error) as caught:
        Tokenizer.from_path(make(tmp_path))
    assert says in str(caught.value)


@pytest.mark.real
def test_both_files_of_one_model_agree(llama3: Tokenizer, llama3_tokenizer_model: Path) -> None:
    copy = Tokenizer.from_files({"tokenizer.model": llama3_tokenizer_model.read_bytes()}, version="3")
    assert copy.stop_ids == {128001, 128009}
    for text in hard_strings(50):
        assert copy.encode(text) == llama3.encode(text)


def test_importing_the_package_imports_neither_tiktoken_nor_jinja2() -> None:
    code = "import sys, npllama.text; sys.exit(bool({'tiktoken', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
