"""Meta's tokenizer.model: strictly read, and token for token what Meta's own code gives."""

from __future__ import annotations

import base64
from types import ModuleType

import pytest

from npllama.errors import EmptyFileError, NpllamaError, ParameterError, TokenizerError
from npllama.text.byte_level import RunLimits
from npllama.text.meta_model import META_LIMITS, N_RANKS, read_meta_model, read_ranks, special_tokens
from npllama.text.tokenizer import Tokenizer
from tests.text.samples import hard_strings, own_source

ANSWER = [128000, 1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220]
GROUP = [128000, 695, 1336, 1604, 81236, 374, 264, 1912, 369, 220]


def lines(count: int = N_RANKS) -> list[bytes]:
    """Return the lines of a well-formed file: the 256 bytes, then tokens of three bytes."""
    tokens = [bytes([value]) for value in range(256)] + [value.to_bytes(3, "big") for value in range(count - 256)]
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def well_formed() -> list[bytes]:
    return lines()


def joined(rows: list[bytes]) -> bytes:
    return b"\n".join(rows) + b"\n"


def test_a_well_formed_file_is_read_whole(well_formed: list[bytes]) -> None:
    ranks = read_ranks(joined(well_formed), "tokenizer.model")
    assert (len(ranks), ranks[b"A"], ranks[b"\x00\x00\x05"]) == (N_RANKS, 65, 261)
    assert read_ranks(joined(well_formed)[:-1], "no line end at the end") == ranks


@pytest.mark.parametrize(
    ("row", "replacement", "says"),
    [
        (5, b"not*base64 5", "line 6: b'not*base64' is not base64"),
        (5, b"", "line 6: no token and rank"),
        (5, b"BQ==", "line 6: no token and rank"),
        (5, b" 5", "line 6: an empty token"),
        (5, b"BQ== 6", "line 6: rank 6, expected 5"),
        (5, b"BQ== five", "line 6: rank five, expected 5"),
        (5, b"BQ== 5\r", "line 6: the line ends in CR LF"),
        (5, b"BQ== 5 5", "line 6: rank 5 5, expected 5"),
        (5, b"BA== 5", "line 6: the token of line 5 again"),
        (5, b"AAAAAAAAAAA= 5", "the byte 5 has no token"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number(
    well_formed: list[bytes], row: int, replacement: bytes, says: str
) -> None:
    rows = [*well_formed[:row], replacement, *well_formed[row + 1 :]]
    with pytest.raises(TokenizerError) as caught:
        read_ranks(joined(rows), "tokenizer.model")
    assert says in str(caught.value)
    assert str(caught.value).startswith("tokenizer.model:")


@pytest.mark.parametrize("count", [127_999, 128_001, 300])
def test_any_other_number_of_ranks_is_an_error(count: int) -> None:
    with pytest.raises(TokenizerError, match=rf"{count:,} tokens, expected 128,000"):
        read_ranks(joined(lines(count)), "tokenizer.model")


def test_a_file_cut_in_a_line_is_an_error(well_formed: list[bytes]) -> None:
    with pytest.raises(TokenizerError, match="line 128000"):
        read_ranks(joined(well_formed)[:-4], "tokenizer.model")


@pytest.mark.parametrize(
    ("data", "error"), [(b"", EmptyFileError), (b"<html>", TokenizerError), (b"\0" * 64, TokenizerError)]
)
def test_something_else_is_refused(data: bytes, error: type[NpllamaError]) -> None:
    with pytest.raises(error):
        read_ranks(data, "tokenizer.model")


def test_special_tokens_of_llama_3_0_have_the_ids_of_its_first_release() -> None:
    table = special_tokens("3")
    released = [  # the order of meta-llama/llama3's tokenizer.py
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *[f"<|reserved_special_token_{n}|>" for n in range(4)],
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        *[f"<|reserved_special_token_{n}|>" for n in range(5, 251)],
    ]
    assert list(table) == released
    assert list(table.values()) == list(range(128_000, 128_256))


def test_an_unknown_version_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ParameterError, match=r"'2'.*Choose one of '3', '3\.1'"):
        special_tokens("2")  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "stops"), [("3", {128001, 128009}), ("3.1", {128001, 128008, 128009})])
def test_stop_ids_are_those_of_the_version(well_formed: list[bytes], version: str, stops: set[int]) -> None:
    vocabulary = read_meta_model(joined(well_formed), "tokenizer.model", version)  # type: ignore[arg-type]
    assert (vocabulary.stop_ids, vocabulary.bos, vocabulary.adds_bos) == (stops, 128000, True)


@pytest.mark.parametrize(
    "text", ["", "ab", "aaaa  aaaaaaa", "a" * 7 + " " * 8, "abcdefghij" * 3, " a " * 9, "\x1c" * 9]
)
def test_text_is_cut_as_a_character_by_character_walk_would(text: str) -> None:
    limits = RunLimits(piece=11, pattern=r"\s|\S", run=3)

    def walk(piece: str) -> list[str]:
        parts, length = [""], 0
        for place, character in enumerate(piece):
            same = place > 0 and piece[place - 1].isspace() == character.isspace()
            length = length + 1 if same else 1
            if length > 3:
                parts, length = [*parts, ""], 1
            parts[-1] += character
        return parts

    assert list(limits.cut(text)) == [
        part for start in range(0, len(text), 11) for part in walk(text[start : start + 11])
    ]


def test_a_separator_character_is_a_space_where_text_is_cut() -> None:
    # str.isspace says so of U+001C; the word pattern's \s does not.
    assert [len(part) for part in META_LIMITS.cut(" " * 20_000 + "\x1c" * 20_000)] == [25_000, 15_000]


@pytest.mark.real
def test_the_seed_prompts_have_their_known_ids(llama3: Tokenizer) -> None:
    assert llama3.encode("the answer to the ultimate question of life, the universe, and everything is ") == ANSWER
    assert llama3.encode("datawhalechina is a group for ") == GROUP
    assert llama3.decode([2983]) == "42"


@pytest.mark.real
def test_special_tokens_equal_metas_own(llama3: Tokenizer, meta_tokenizer_module: ModuleType) -> None:
    meta = meta_tokenizer_module.Tokenizer.get_instance()
    assert llama3.special_tokens == meta.special_tokens
    assert llama3.n_vocab == meta.n_words
    assert llama3.stop_ids == set(meta.stop_tokens)
    assert llama3.bos_id == meta.bos_id


@pytest.mark.real
def test_ids_equal_metas_own_on_hard_strings(llama3: Tokenizer, meta_tokenizer_module: ModuleType) -> None:
    meta = meta_tokenizer_module.Tokenizer.get_instance()
    texts = [*hard_strings(600), own_source(), "a\ud800b", "\ud83e\udd17", "\udfff"]
    for text in texts:
        assert llama3.encode(text) == meta.encode(text, bos=True, eos=False), repr(text)
        marked = llama3.encode(text, bos=False, allow_special=True)
        assert marked == meta.encode(text, bos=False, eos=False, allowed_special="all"), repr(text)


@pytest.mark.real
@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_000,
        " " * 60_000,
        "x" * 25_000 + " " * 25_001 + "\n" * 25_002,
        "\x1c" * 25_010 + "b",  # a space to str.isspace, none to the word pattern
        "ab " * 140_000,
        "word " * 79_999 + "<|eot_id|>" * 2 + "tail",  # a special token across character 400,000
    ],
)
def test_over_long_text_is_cut_where_meta_cuts_it(
    llama3: Tokenizer, meta_tokenizer_module: ModuleType, text: str
) -> None:
    meta = meta_tokenizer_module.Tokenizer.get_instance()
    assert llama3.encode(text) == meta.encode(text, bos=True, eos=False)
    assert llama3.encode(text, allow_special=True) == meta.encode(text, bos=True, eos=False, allowed_special="all")


@pytest.mark.real
def test_every_id_decodes_to_metas_bytes(llama3: Tokenizer, meta_tokenizer_module: ModuleType) -> None:
    meta = meta_tokenizer_module.Tokenizer.get_instance()
    assert all(llama3.decode_bytes(i) == meta.model.decode_single_token_bytes(i) for i in range(meta.n_words))
