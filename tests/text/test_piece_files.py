"""A SentencePiece tokenizer.model and its companions: special tokens, spaces, decoding, damage."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.errors import ConfigMismatchError, NpllamaError, TokenizerError, UnsupportedError
from npllama.text.piece_model import is_piece_model, read_piece_model
from npllama.text.tokenizer import Tokenizer
from tests.text.pieces import dump, processor, train
from tests.text.samples import hard_strings

N = 700
NO_SPACE = b"\x1a\x02\x18\x00"  # a normalizer_spec with add_dummy_prefix false: of two messages the last one counts
LLAMA = Tokenizer.from_files({"tokenizer.model": train()})
PHI3 = {
    str(N + n): {"content": text, "rstrip": True, "lstrip": False, "single_word": False, "special": True}
    for n, text in enumerate(["<|user|>", "<|assistant|>", "<|end|>"])
}


def make(model: bytes | None = None, *, added: Any = None, special_tokens: Any = (), **config: Any) -> Tokenizer:
    """Return a tokenizer of a trained model and the given companions."""
    files = {"tokenizer.model": train() if model is None else model}
    if added is not None:
        files["added_tokens.json"] = dump(added)
    if config:
        files["tokenizer_config.json"] = dump(config)
    return Tokenizer.from_files(files, special_tokens=special_tokens)


def test_a_bare_model_begins_with_bos_and_ends_at_eos() -> None:
    assert (LLAMA.bos_id, LLAMA.adds_bos, LLAMA.stop_ids, LLAMA.n_vocab) == (1, True, {2}, N)
    assert LLAMA.template_names == {"bos_token": "<s>", "eos_token": "</s>"}
    assert LLAMA.encode("") == [1]
    assert LLAMA.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_other_files_say_otherwise() -> None:
    tokenizer = make(add_bos_token=False, bos_token="<s>", eos_token={"content": "<s>"}, chat_template="x")
    assert (tokenizer.adds_bos, tokenizer.stop_ids, tokenizer.chat_template) == (False, {1}, "x")
    assert tokenizer.template_names == {"bos_token": "<s>", "eos_token": "<s>"}


# --- special tokens -----------------------------------------------------------------------------------------------


def test_text_that_spells_a_special_token_is_text() -> None:
    text = "a</s> <s><unk><0x0A>"
    assert LLAMA.encode(text, bos=False) == processor(train()).encode(text)
    assert LLAMA.encode("a</s>b", allow_special=True, bos=False) == [
        *LLAMA.encode("a", bos=False),
        2,
        *LLAMA.encode("b", bos=False),
    ]


@pytest.mark.parametrize("sources", [{"added": {"<|x|>": N}}, {"added_tokens_decoder": {str(N): {"content": "<|x|>"}}}])
def test_tokens_of_other_files_are_added(sources: dict[str, Any]) -> None:
    tokenizer = make(**sources)
    assert tokenizer.special_tokens["<|x|>"] == N
    assert tokenizer.encode("<|x|>", allow_special=True) == [1, N]
    assert N not in tokenizer.encode("<|x|>")
    assert tokenizer.decode([N]) == "<|x|>"


def test_own_special_tokens_come_behind_all_others() -> None:
    tokenizer = make(added={"<|x|>": N}, special_tokens=["<|好|>"])
    assert tokenizer.special_tokens["<|好|>"] == N + 1
    ids = tokenizer.encode("你<|好|> b", allow_special=True)
    assert ids.count(N + 1) == 1
    assert tokenizer.decode(ids) == "<s>你<|好|> b"
    with pytest.raises(ConfigMismatchError, match="1 of them own"):
        tokenizer.check_model_rows(N + 1)


def test_a_token_takes_the_white_space_that_its_flags_name() -> None:
    tokenizer = make(
        added_tokens_decoder={
            str(N): {"content": "<|l|>", "lstrip": True},
            str(N + 1): {"content": "<|r|>", "rstrip": True},
        }
    )
    assert list(tokenizer.split_special("a \n<|l|> b\x1c<|l|> <|r|>\u3000\n c<|r|>")) == [
        *("a", N, " b\x1c", N, " ", N + 1, "c", N + 1)
    ]


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ({"added": {"<|x|>": 5}}, "'<|x|>' has the id 5, which is that of '<0x02>'"),
        ({"added": {"<|x|>": "7"}}, "the id of '<|x|>' is '7'"),
        ({"added": []}, "expected a JSON object"),
        ({"added": {"<|x|>": N}, "added_tokens_decoder": {str(N): {"content": "<|y|>"}}}, "has two texts"),
        ({"added_tokens_decoder": {"x": {}}}, "expected an id and an object, found 'x'"),
        ({"added_tokens_decoder": [1]}, "expected an id and an object"),
        ({"added_tokens_decoder": {str(N): {"content": 5}}}, "expected str, found int"),
        ({"added": {"<|x|>": -1}}, "out of range"),
        ({"added": {"<|x|>": 10**9}}, "out of range"),
    ],
)
def test_added_tokens_that_contradict_the_model_are_refused(sources: dict[str, Any], says: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        make(**sources)
    assert says in str(caught.value)


# --- the space before a text --------------------------------------------------------------------------------------


def test_legacy_tokenizers_put_a_space_behind_special_tokens_and_others_do_not() -> None:
    library = processor(train())
    parts = [library.encode("a b"), library.encode("c")]
    text = "a b</s>c"
    assert make(legacy=True).encode(text, bos=False, allow_special=True) == [*parts[0], 2, *parts[1]]
    bare = processor(train() + NO_SPACE).encode("c")
    assert bare != parts[1]
    assert make(legacy=False).encode(text, bos=False, allow_special=True) == [*parts[0], 2, *bare]
    assert make(legacy=False).encode("</s>c", bos=False, allow_special=True) == [2, *bare]
    assert make(add_prefix_space=False).encode("c", bos=False) == bare


@pytest.mark.parametrize("config", [{}, {"legacy": False}, {"add_prefix_space": False}])
@pytest.mark.parametrize(
    "text", ["a", " a", "  a", "</s>a", "a</s>b", "</s> a</s>  b ", " ", "\n", "a<s> b", "é🤗 </s>"]
)
def test_decoding_gives_back_the_text_special_tokens_included(config: dict[str, Any], text: str) -> None:
    tokenizer = make(**config)
    for bos in (True, False):
        ids = tokenizer.encode(text, bos=bos, allow_special=True)
        assert tokenizer.decode(ids) == "<s>" * bos + text
    assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_decoding_gives_back_any_text_and_is_what_the_library_gives(text: str) -> None:
    ids = LLAMA.encode(text, bos=False)
    assert LLAMA.decode(ids) == text.replace("▁", " ") == processor(train()).decode(ids)


@settings(max_examples=200)
@given(st.lists(st.integers(0, N + 20), max_size=30))
def test_a_stream_gives_the_text_that_decoding_at_once_gives(ids: list[int]) -> None:
    stream = LLAMA.stream()
    assert "".join([*map(stream.feed, ids), stream.finish()]) == LLAMA.decode(ids)
    assert "".join([*map(stream.feed, ids), stream.finish()]) == LLAMA.decode(ids), "the second text of a stream"


def test_a_stream_behind_a_text_keeps_the_first_space() -> None:
    prompt, answer = LLAMA.encode("The answer is"), LLAMA.encode("the", bos=False)
    assert LLAMA.token_piece(answer[0]).startswith(" ")
    assert "".join(map(LLAMA.stream(after=prompt).feed, answer)) == " the"
    assert "".join(map(LLAMA.stream().feed, answer)) == "the"
    assert "".join(map(LLAMA.stream(after=[*prompt, 2]).feed, answer)) == "the"  # behind </s> a new text begins


def test_a_character_of_bytes_comes_with_the_last_of_them() -> None:
    ids = LLAMA.encode("🤗", bos=False)
    stream = LLAMA.stream()
    assert [stream.feed(index) for index in ids] == ["", "", "", "", "🤗"]
    assert [LLAMA.token_piece(index) for index in ids] == [" ", r"\xf0", r"\x9f", r"\xa4", r"\x97"]


def test_rows_of_a_padded_embedding_decode_to_nothing() -> None:
    tokenizer = make(added={"<|end|>": N + 10})  # Phi-3: 32,064 rows, gaps between its tokens
    tokenizer.check_model_rows(N + 64)
    padding = [N, N + 9, N + 11, N + 63]
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([*padding, *ids, *padding]) == "<s>a b"
    assert [tokenizer.token_piece(index) for index in padding] == [""] * 4
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, [padding[0], *ids[1:], *padding])) + stream.finish() == "a b"


# --- damage -------------------------------------------------------------------------------------------------------


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    inner = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(inner)]) + inner


BPE = b"\x12\x02\x18\x02"
SMALL = piece(b"<unk>", kind=2) + piece(b"a") + BPE


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (SMALL[:-1], "2 bytes, but 1 are left"),
        (SMALL[:5], "14 bytes, but 3 are left"),
        (SMALL + b"\x0b", "wire type 3"),
        (SMALL + b"\x80", "ends in a number"),
        (SMALL + b"\xff" * 12, "the number is too long"),
        (SMALL + b"\x02\x00", "field 0"),
        (SMALL + b"\x08\x01", "field 1 has the wire type 0, expected a message"),
        (SMALL + piece(b"\xff"), "not UTF-8"),
        (SMALL + piece(b""), "the piece '' has"),
        (SMALL + piece(b"b", float("nan")), "the score nan"),
        (SMALL + piece(b"b", float("inf")), "the score inf"),
        (SMALL + piece(b"b", kind=7), "the kind 7"),
        (SMALL + piece(b"a"), "'a' is there twice"),
        (SMALL + piece(b"b", kind=2), "2 unknown pieces"),
        (piece(b"<s>", kind=3) + BPE, "0 unknown pieces"),
        (SMALL + piece(b"<0x00>", kind=6), "1 pieces for bytes, expected 0"),
        (SMALL + piece(b"<0xZZ>", kind=6), "'<0xZZ>' is no byte"),
        (piece(b"<unk>", kind=2) + b"\x12\x02\x18\x09", "algorithm has the number 9"),
    ],
)
def test_a_damaged_model_is_an_error_with_its_place(data: bytes, says: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_files({"tokenizer.model": data}, source="tokenizer.model")
    assert says in str(caught.value)
    assert str(caught.value).startswith("tokenizer.model")


def test_a_model_cut_anywhere_is_refused() -> None:
    model = train()
    for size in [*range(3, 400), *range(400, len(model), 97)]:
        with pytest.raises(NpllamaError):
            Tokenizer.from_files({"tokenizer.model": model[:size]})


@settings(max_examples=200)
@given(st.integers(3, 9000), st.binary(min_size=1, max_size=4))
def test_changed_bytes_raise_only_typed_errors(place: int, noise: bytes) -> None:
    model = train()
    damaged = model[:place] + noise + model[place + len(noise) :]
    assert is_piece_model(damaged)
    try:
        tokenizer = Tokenizer.from_files({"tokenizer.model": damaged})
        tokenizer.decode(tokenizer.encode("any text"))
    except NpllamaError:
        pass


def test_a_model_says_what_is_in_it() -> None:
    found = read_piece_model(train(), "tokenizer.model")
    library = processor(train())
    assert [piece.text for piece in found.pieces] == [library.id_to_piece(index) for index in range(len(library))]
    assert [piece.score for piece in found.pieces] == [library.get_score(index) for index in range(len(library))]
    assert (found.algorithm, found.bos, found.eos, found.unknown) == ("bpe", 1, 2, 0)


# --- the library that some models need ------------------------------------------------------------------------------


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert make().encode("a") == LLAMA.encode("a"), "a model of Llama's kind needs no library"
    with pytest.raises(UnsupportedError) as caught:
        make(train(model_type="unigram"))
    assert 'pip install "npllama[sentencepiece]"' in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"legacy": False}, {"add_prefix_space": False}])
def test_the_library_puts_spaces_where_the_files_say(config: dict[str, Any]) -> None:
    model = train(model_type="unigram")
    tokenizer = make(model, **config)
    with_space, without = processor(model), processor(model + NO_SPACE)
    first = without if config.get("add_prefix_space") is False else with_space
    later = with_space if not config else without
    ids = tokenizer.encode("the text</s>the end", allow_special=True)
    assert ids == [1, *first.encode("the text"), 2, *later.encode("the end")]
    assert tokenizer.decode(ids) == "<s>the text</s>the end"


def test_the_files_beside_a_model_on_disk_are_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|x|>": N}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, N]}))
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = Tokenizer.from_path(path)
        assert (tokenizer.stop_ids, tokenizer.special_tokens["<|x|>"]) == ({2, N}, N)


@pytest.mark.real
def test_mistrals_control_tokens_are_special_and_its_text_comes_back(mistral_v3_tokenizer_model: Path) -> None:
    tokenizer = Tokenizer.from_path(mistral_v3_tokenizer_model)
    assert (tokenizer.special_tokens["[INST]"], tokenizer.special_tokens["[/INST]"]) == (3, 4)
    assert tokenizer.encode("[INST]hi[/INST]", allow_special=True)[1] == 3
    assert 3 not in tokenizer.encode("[INST]hi[/INST]")
    for text in hard_strings(200):
        if "▁" not in text:
            assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text
