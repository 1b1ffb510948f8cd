"""tokenizer.json: id for id what the Hugging Face library gives, and a named error for what is not read."""

from __future__ import annotations

import copy
import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.errors import NpllamaError, TokenizerError, UnsupportedError
from npllama.text.bpe_json import byte_alphabet
from npllama.text.byte_level import ByteLevel
from npllama.text.pretokenize import QWEN2_PATTERN
from npllama.text.tokenizer import Tokenizer
from npllama.text.tokenizer_json import read_tokenizer_json
from tests.text.samples import BYTE_LEVEL, MERGES, hard_strings, own_source, tokenizer_document

tokenizers = pytest.importorskip("tokenizers")

#: All of Unicode but planes 4 to 11, where nothing is assigned and SmolLM2 lacks the bytes.
assigned_planes = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"]) | st.characters(min_codepoint=0xC0000)
awkward = st.sampled_from(
    list("'sStTlLrReEvVmMdDſK \n\r\t\u00a0\u3000\u0085\x1c\x1d\x04!?.<|>019½²Ⅷ٣éeḱ\u0301가🤗\u200d")
)
texts = st.lists(st.text(awkward | assigned_planes, max_size=30), min_size=1, max_size=20)


def assert_same(ours: Tokenizer, theirs: Any, strings: list[str]) -> None:
    for text in strings:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False) == expected, repr(text)


class Pair:
    """A tokenizer of ours and the same file in the Hugging Face library, added tokens taken out of both texts."""

    def __init__(self, document: dict[str, Any]) -> None:
        plain = {**document, "added_tokens": []}
        self.ours = Tokenizer.from_files({"tokenizer.json": json.dumps(plain).encode()})
        self.theirs = tokenizers.Tokenizer.from_str(json.dumps(plain))


@pytest.fixture(scope="module")
def smollm2_pair(smollm2_files: dict[str, bytes]) -> Pair:
    return Pair(json.loads(smollm2_files["tokenizer.json"]))


@pytest.fixture(scope="module")
def llama3_pair(llama3_json: str) -> Pair:
    return Pair(json.loads(llama3_json))


@pytest.fixture(scope="module")
def qwen2_pair(smollm2_files: dict[str, bytes]) -> Pair:
    """Return Qwen2's normalizer and pattern over SmolLM2's merges, with the bytes that it lacks."""
    document = json.loads(smollm2_files["tokenizer.json"])
    vocab = document["model"]["vocab"]
    for symbol in byte_alphabet():
        vocab.setdefault(symbol, max(vocab.values()) + 1)
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    steps = [split, {**BYTE_LEVEL, "use_regex": False}]
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    document["normalizer"] = {"type": "NFC"}
    return Pair(document)


@pytest.mark.real
def test_smollm2_gives_the_same_ids(smollm2_pair: Pair) -> None:
    assert_same(smollm2_pair.ours, smollm2_pair.theirs, [*hard_strings(4000), own_source(), " " * 1000 + "1"])


@pytest.mark.real
@settings(max_examples=150)
@given(strings=texts)
def test_smollm2_gives_the_same_ids_for_random_unicode(smollm2_pair: Pair, strings: list[str]) -> None:
    assert_same(smollm2_pair.ours, smollm2_pair.theirs, strings)


@pytest.mark.real
def test_no_token_of_smollm2_is_out_of_reach(smollm2_files: dict[str, bytes]) -> None:
    vocabulary = read_tokenizer_json(smollm2_files["tokenizer.json"], "tokenizer.json")
    assert isinstance(vocabulary.encoder, ByteLevel)
    assert {index for index in vocabulary.encoder.ids if index >= 0} == vocabulary.tokens.keys()


@pytest.mark.real
@pytest.mark.torch
def test_llama_3_gives_the_same_ids_and_those_of_metas_file(llama3_pair: Pair, llama3: Tokenizer) -> None:
    strings = [*hard_strings(3000), own_source()]
    assert_same(llama3_pair.ours, llama3_pair.theirs, strings)
    assert_same(llama3, llama3_pair.theirs, strings)


@pytest.mark.real
@pytest.mark.torch
@settings(max_examples=100)
@given(strings=texts)
def test_llama_3_gives_the_same_ids_for_random_unicode(llama3_pair: Pair, strings: list[str]) -> None:
    assert_same(llama3_pair.ours, llama3_pair.theirs, strings)


@pytest.mark.real
def test_a_qwen2_tokenizer_gives_the_same_ids(qwen2_pair: Pair) -> None:
    assert_same(qwen2_pair.ours, qwen2_pair.theirs, [*hard_strings(3000), own_source(), "e\u0301 \u212b \u1e9b\u0323"])


@pytest.mark.real
@settings(max_examples=100)
@given(strings=texts)
def test_a_qwen2_tokenizer_gives_the_same_ids_for_random_unicode(qwen2_pair: Pair, strings: list[str]) -> None:
    # The two libraries follow different versions of Unicode: compare where both normalise alike.
    alike = [
        text
        for text in strings
        if qwen2_pair.theirs.normalizer.normalize_str(text) == unicodedata.normalize("NFC", text)
    ]
    assert_same(qwen2_pair.ours, qwen2_pair.theirs, alike)


@pytest.mark.parametrize("form", ["strings", "pairs"])
def test_gpt2_words_give_the_same_ids(form: str) -> None:
    document = tokenizer_document(MERGES)
    if form == "strings":
        document["model"]["merges"] = [" ".join(pair) for pair in MERGES]
    pair = Pair(document)
    assert_same(pair.ours, pair.theirs, hard_strings(1500))


def test_ids_may_be_in_any_order() -> None:
    document = tokenizer_document(MERGES)
    vocab = document["model"]["vocab"]
    document["model"]["vocab"] = {token: len(vocab) + 7 - index for token, index in vocab.items()}
    pair = Pair(document)
    assert_same(pair.ours, pair.theirs, ["hello the hell", "then 🤗"])
    assert pair.ours.decode(pair.ours.encode("hello the hell")) == "hello the hell"


def test_characters_without_a_token_are_dropped_as_the_reference_drops_them() -> None:
    document = tokenizer_document([*MERGES, ("!", "!"), ("Ġ", "!"), ("Ġ", "!!")])
    lacking = {byte: symbol for symbol, byte in byte_alphabet().items()}
    for byte in (4, 6, 0x1D):
        del document["model"]["vocab"][lacking[byte]]
    pair = Pair(document)
    strings = [
        "!\x04!",
        " \x04!!",
        "a\x04b",
        "\x04's",
        " \x04's",
        "!\x06's",
        "  \x04\x04 !",
        "\n\x04!",
        "!\x1d!\x1d",
        "\x1c\x1d!",
        "1\x041",
    ]
    assert_same(pair.ours, pair.theirs, [*strings, *hard_strings(1500)])


def test_the_alphabet_is_the_one_of_the_reference() -> None:
    assert set(byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert (byte_alphabet()["Ġ"], byte_alphabet()["Ċ"]) == (ord(" "), ord("\n"))


def test_an_added_token_is_text_unless_asked_for() -> None:
    tokenizer = Tokenizer.from_files({"tokenizer.json": json.dumps(tokenizer_document(MERGES)).encode()})
    end = tokenizer.special_tokens["<|end|>"]
    assert end not in tokenizer.encode("a<|end|>b")
    ids = tokenizer.encode("a<|end|>b", allow_special=True)
    reference = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_document(MERGES)))
    assert ids == reference.encode("a<|end|>b").ids
    assert ids.count(end) == 1


def broken(path: str, value: Any) -> bytes:
    """Return a small tokenizer.json with one value replaced."""
    document = copy.deepcopy(tokenizer_document(MERGES))
    *parents, last = path.split(".")
    place: Any = document
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(document).encode()


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.type", "Unigram", "type 'Unigram'"),
        ("model.dropout", 0.1, "dropout is 0.1"),
        ("model.byte_fallback", True, "byte_fallback is True"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix is '</w>'"),
        ("pre_tokenizer", None, "unknown pre_tokenizer null"),
        ("pre_tokenizer", {"type": "Metaspace"}, 'unknown pre_tokenizer {"type": "Metaspace"}'),
        ("pre_tokenizer", {**BYTE_LEVEL, "add_prefix_space": True}, "unknown pre_tokenizer"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}, "unknown pre_tokenizer"),
        ("normalizer", {"type": "Lowercase"}, "unknown normalizer {'type': 'Lowercase'}"),
        ("post_processor", {"type": "BertProcessing"}, "unknown post_processor"),
    ],
)
def test_forms_that_are_not_read_are_named(path: str, value: Any, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        read_tokenizer_json(broken(path, value), "tokenizer.json")
    assert says in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model", [], "model: expected dict, found list"),
        ("model.vocab", None, "vocab: expected dict"),
        ("model.merges", {}, "merges: expected list"),
        ("model.vocab.!", "1", "the id of '!' is '1'"),
        ("model.vocab.!", -1, "the id of '!' is -1"),
        ("model.vocab.!", True, "the id of '!' is True"),
        ("model.vocab.!", 1, "its id 1 is there twice"),
        ("model.vocab.a b", 5000, "the token 'a b' holds ' '"),
        ("model.merges", ["h e", "hello"], "merges[1]: expected two tokens, found 'hello'"),
        ("model.merges", [["h", 1]], "merges[0]: expected two tokens"),
        ("model.merges", ["h h"], "'hh' is not in the vocabulary"),
        ("model.merges", ["h e", "h e"], "a merge is listed twice"),
        ("added_tokens", ["<|end|>"], "added_tokens[0]: expected an object"),
        ("added_tokens", [{"content": "", "id": 900}], "the token '' with id 900"),
        ("added_tokens", [{"content": "!", "id": 900}], "'!' has the ids"),
    ],
)
def test_contradictions_are_errors_with_their_place(path: str, value: Any, says: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_tokenizer_json(broken(path, value), "tokenizer.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("tokenizer.json")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{", b"\xff{}", b'{"model": {}, "model": {}}', b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_json_object_is_an_error(data: bytes) -> None:
    with pytest.raises(TokenizerError):
        read_tokenizer_json(data, "tokenizer.json")


def test_lacking_bytes_are_refused_where_dropping_would_not_be_exact() -> None:
    document = tokenizer_document(MERGES, unk_token="!")
    del document["model"]["vocab"]["A"]
    with pytest.raises(UnsupportedError, match="1 bytes have no token"):
        read_tokenizer_json(json.dumps(document).encode(), "tokenizer.json")


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_random_bytes_raise_only_typed_errors(data: bytes) -> None:
    with pytest.raises(NpllamaError):
        Tokenizer.from_files({"tokenizer.json": data})
