"""SentencePiece BPE from scores alone: id for id what the sentencepiece library gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npllama.checkpoint.gguf import tokenizer_files
from npllama.text.piece_bpe import PieceMerges, is_exact
from npllama.text.piece_model import read_piece_model
from npllama.text.tokenizer import Tokenizer
from npllama.text.vocabulary import AddedSpace
from tests.text.pieces import NORMAL, UNUSED, USER_DEFINED, gguf_metadata, made_up, processor, train
from tests.text.samples import hard_strings, own_source

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
OWN = ("<|user|>", "the", "self", "▁▁", "▁▁▁▁", "def▁x", "文")


def of_gguf(metadata: dict[str, Any]) -> bytes:
    return tokenizer_files(metadata, "m.gguf")["tokenizer.model"]


def encoder(model: bytes, added_space: AddedSpace = "each") -> PieceMerges:
    found = read_piece_model(model, "tokenizer.model")
    assert is_exact(found)
    return PieceMerges(found, added_space)


def assert_same(model: bytes, strings: list[str], reference: bytes | None = None) -> None:
    """Compare every id; the reference is the library's reading of the same model, or of another."""
    library = processor(model if reference is None else reference)
    ours = encoder(model, "each" if read_piece_model(model, "").adds_space else "none")
    for text in strings:
        assert ours.encode(text, first=True) == library.encode(text), repr(text)


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "without bytes": {"byte_fallback": False},
    "own symbols": {"user_defined_symbols": OWN},
    "pieces of several words": {"split_by_whitespace": False},
    "runs of spaces": {"allow_whitespace_only_pieces": True, "vocab_size": 1500},
    "without a space before": {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_trained_models_give_the_librarys_ids(kind: str) -> None:
    assert_same(train(**KINDS[kind]), [*hard_strings(800), own_source()[:50_000]])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(strings=st.lists(texts, max_size=10))
def test_trained_models_give_the_librarys_ids_for_random_unicode(kind: str, strings: list[str]) -> None:
    assert_same(train(**KINDS[kind]), strings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_holds_all_that_the_model_was(kind: str) -> None:
    model = train(**KINDS[kind])
    own = KINDS[kind].get("user_defined_symbols", ())
    again = of_gguf(gguf_metadata(model, own=own, add_space_prefix=KINDS[kind].get("add_dummy_prefix")))
    assert read_piece_model(again, "") == read_piece_model(model, "")
    assert_same(again, hard_strings(200), reference=model)


@pytest.mark.parametrize("levels", [2, 5, 40])
def test_pieces_of_equal_score_merge_from_the_left(levels: int) -> None:
    metadata = gguf_metadata(train())
    scores = metadata["tokenizer.ggml.scores"]
    metadata["tokenizer.ggml.scores"] = np.floor(scores * levels / 700).astype(np.float32)
    assert_same(of_gguf(metadata), [*hard_strings(800), own_source()[:20_000]])


PIECES = ["".join(letters) for size in (1, 2, 3, 4) for letters in itertools.product("ab▁", repeat=size)]


@settings(max_examples=300)
@given(
    chosen=st.lists(
        st.tuples(st.sampled_from(PIECES), st.integers(-3, 0), st.sampled_from([NORMAL, NORMAL, NORMAL, USER_DEFINED])),
        min_size=2,
        max_size=25,
        unique_by=lambda piece: piece[0],
    ),
    strings=st.lists(st.text("ab c", max_size=24), max_size=12),
)
@example(chosen=[("aa", 0, NORMAL), ("aaa", -1, NORMAL)], strings=["a" * size for size in range(12)])
def test_any_vocabulary_gives_the_librarys_ids(chosen: list[tuple[str, int, int]], strings: list[str]) -> None:
    metadata = made_up([("x", -9.0), ("y", -8.0), *((text, float(score)) for text, score, _ in chosen)])
    metadata["tokenizer.ggml.token_type"][-len(chosen) :] = [kind for *_, kind in chosen]
    assert_same(of_gguf(metadata), strings)


@pytest.mark.parametrize("text", ["a" * 200_000, " " * 200_000, "ab" * 50_000, "自然" * 20_000, "🤗" * 20_000])
def test_long_runs_are_encoded_like_any_text(text: str) -> None:
    assert_same(train(), [text])


def test_unused_pieces_that_merges_reach_are_not_exact() -> None:
    # The library takes such a piece apart again, by whatever merge of the whole text was the last to make it.
    metadata = made_up([(text, float(-place)) for place, text in enumerate(["a", "b", "ab", "abab", "zz"])])
    kinds = metadata["tokenizer.ggml.token_type"]
    kinds[-2] = UNUSED
    assert is_exact(read_piece_model(of_gguf(metadata), ""))  # its text is not kept: nothing finds it
    model = of_gguf({**metadata, "tokenizer.ggml.token_type": np.where(kinds == UNUSED, NORMAL, kinds)})
    place = model.index(b"abab") + len(b"abab") + len(b"\x15....\x18")
    assert not is_exact(read_piece_model(model[:place] + bytes([UNUSED]) + model[place + 1 :], ""))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
    ],
)
def test_models_that_do_more_than_merge_are_left_to_the_library(changes: dict[str, Any]) -> None:
    model = train(**changes)
    assert not is_exact(read_piece_model(model, ""))
    ours, library = Tokenizer.from_files({"tokenizer.model": model}), processor(model)
    for text in hard_strings(100):
        assert ours.encode(text, bos=False) == library.encode(text)


@pytest.mark.real
def test_mistrals_own_files_give_the_librarys_ids(
    mistral_tokenizer_model: Path, mistral_v3_tokenizer_model: Path
) -> None:
    for file in (mistral_tokenizer_model, mistral_v3_tokenizer_model):
        assert_same(file.read_bytes(), [*hard_strings(1500), own_source()])


@pytest.mark.real
def test_mistrals_vocabulary_out_of_a_gguf_gives_the_same_ids(mistral_tokenizer_model: Path) -> None:
    model = mistral_tokenizer_model.read_bytes()
    ours, library = Tokenizer.from_files(tokenizer_files(gguf_metadata(model), "m.gguf")), processor(model)
    for text in [*hard_strings(300), own_source()]:
        assert ours.encode(text) == [1, *library.encode(text)]
        assert ours.decode(ours.encode(text, bos=False)) == library.decode(library.encode(text))
