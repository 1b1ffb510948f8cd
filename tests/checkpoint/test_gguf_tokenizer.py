from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, decoders, pre_tokenizers

from npllama.checkpoint.gguf.file import open_gguf
from npllama.checkpoint.gguf.tokenizer import tokenizer_files
from npllama.errors import TokenizerError, UnsupportedError

HARD = [
    "",
    " ",
    "The capital of France is Paris.",
    "I'll say it's 12345 o'clock; don't! WE'LL DON'T I'M",
    "  two  spaces   three    four ",
    "line\nbreaks\r\nand\ttabs\n\n\n  mixed \n \r\n",
    "日本語のテキスト と 한국어 и русский язык, עברית, العربية",
    "🤗👩‍👩‍👧‍👦🇫🇷 emoji👍🏽 sequences",
    "def f(x):\n    return {'a': [x**2 for x in range(10)]}  # code",
    "٣٤٥ ½ Ⅻ ²³ ①② 1,234.56e-7 0x1F",
    "e\u0301 é \u00a0nbsp\u2003em\u200bzero",
    "a" * 300,
    "<|im_start|>system\nspecial<|im_end|>",
    "ſ ſſ K İı ß ẞ 's 'S 'ſ",
    "\x00\x01 control \x7f",
]


def load(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def parsed(files: dict[str, bytes], name: str) -> dict[str, Any]:
    document = json.loads(files[name])
    assert isinstance(document, dict)
    return document


def alphabet() -> list[str]:
    """Return the 256 characters that spell bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def metadata(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """Return a GGUF tokenizer of the bytes, four merged tokens, three control tokens and a user-defined one."""
    tokens = [*alphabet(), "Ġt", "he", "Ġthe", "11", "<s>", "</s>", "<eot>", "[user word]"]
    kinds = [1] * 260 + [3, 3, 3, 4]
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "merges": ["Ġ t", "h e", "Ġt he", "1 1"],
        "bos_token_id": 260,
        "eos_token_id": 261,
    }
    found.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def files_of(pre: str = "gpt-2", **changes: Any) -> dict[str, bytes]:
    return tokenizer_files(metadata(pre, **changes), "model.gguf")


# --- the real tokenizers -------------------------------------------------------------------------------------------

GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def merged(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge a piece's characters pair by pair, the lowest rank first: byte-pair encoding as its paper has it."""
    parts = list(piece)
    while len(parts) > 1:
        pairs = list(pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        out: list[str] = []
        for part in parts:
            if out and (out[-1], part) == best:
                out[-1] += part
            else:
                out.append(part)
        parts = out
    return parts


@pytest.fixture(scope="session")
def smollm2_files(smollm2_gguf: Path) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Yield the real model's metadata and the files made of them."""
    file = open_gguf(smollm2_gguf)
    yield dict(file.metadata), tokenizer_files(file.metadata, str(smollm2_gguf))
    file.source.close()


@pytest.mark.real
@pytest.mark.parametrize("text", HARD[:-3] + HARD[-2:])
def test_smollm2_encodes_as_digits_then_gpt_2s_pattern_then_merges(
    smollm2_files: tuple[dict[str, Any], dict[str, bytes]], text: str
) -> None:
    found, files = smollm2_files
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = {token: index for index, token in enumerate(found["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(found["tokenizer.ggml.merges"])}
    wanted = []
    for chunk in regex.findall(r"\p{N}|\P{N}+", text):
        for piece in regex.findall(GPT_2, chunk):
            wanted += [ids[part] for part in merged(spell.pre_tokenize_str(piece)[0][0], ranks)]
    encoding = load(files).encode(text)
    assert encoding.ids == wanted
    assert load(files).decode(encoding.ids, skip_special_tokens=False) == text


@pytest.mark.real
def test_smollm2s_special_tokens_and_settings(smollm2_files: tuple[dict[str, Any], dict[str, bytes]]) -> None:
    found, files = smollm2_files
    assert load(files).encode("<|im_start|>user\nhi<|im_end|>").ids == [1, 4093, 198, 6004, 2]
    config = parsed(files, "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<|im_start|>", "<|im_end|>", False)
    assert config["chat_template"] == found["tokenizer.chat_template"]
    assert parsed(files, "generation_config.json") == {"bos_token_id": 1, "pad_token_id": 2, "eos_token_id": [2]}


@pytest.mark.real
@pytest.mark.torch
def test_smollm2_encodes_as_transformers_converts_it(
    smollm2_files: tuple[dict[str, Any], dict[str, bytes]], smollm2_gguf: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    ours = load(smollm2_files[1])
    for text in HARD:
        if not regex.search(r"\p{N}", text):  # their conversion keeps runs of digits together, llama.cpp does not
            assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.fixture(scope="session")
def llama3_metadata(llama3_tokenizer_model: Path) -> dict[str, Any]:
    """Return what a GGUF of Llama 3 holds: transformers turns Meta's ranks into tokens and merges."""
    converter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter()
    vocab, merges = converter.extract_vocab_merges_from_model(str(llama3_tokenizer_model))
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(254))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*sorted(vocab, key=vocab.__getitem__), *special],
        "tokenizer.ggml.token_type": np.array([1] * 128_000 + [3] * 256, np.int32),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 128_000,
        "tokenizer.ggml.eos_token_id": 128_009,
    }


@pytest.mark.real
@pytest.mark.torch
@pytest.mark.slow
def test_llama_3_encodes_as_metas_own_tokenizer(
    llama3_metadata: dict[str, Any], llama3_tokenizer_model: Path, meta_tokenizer_module: ModuleType
) -> None:
    ours = load(tokenizer_files(llama3_metadata, "model.gguf"))
    theirs = meta_tokenizer_module.Tokenizer(llama3_tokenizer_model)
    for text in HARD:
        assert ours.encode(text).ids == theirs.encode(text, bos=True, eos=False), text


# --- the shape of the files ----------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_text_is_cut_as_transformers_cuts_it(pre: str, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load(files_of(pre))
    vocab = ours.get_vocab()
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "1")]
    theirs = getattr(transformers, name)(vocab=vocab, merges=merges).backend_tokenizer
    for text in HARD:
        assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenizer.pre_tokenize_str(text), text
        assert ours.encode(text).ids == theirs.encode(text).ids, text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "Ġ1234", "Ġ!!", "Ċ"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ!!", "Ċ"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "Ġ!!Ċ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "Ġ!!Ċ"]),
        ("llama3", ["It", "'s", "Ġ", "123", "4", "Ġ!!Ċ"]),
        ("llama-v3", ["It", "'s", "Ġ", "123", "4", "Ġ!!Ċ"]),
    ],
)
def test_each_pre_tokenizer_cuts_in_its_own_way(pre: str, pieces: list[str]) -> None:
    cut = load(files_of(pre)).pre_tokenizer.pre_tokenize_str("It's 1234 !!\n")
    assert [piece for piece, _ in cut] == pieces


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("text", HARD)
def test_every_text_survives_encoding_and_decoding(pre: str, text: str) -> None:
    tokenizer = load(files_of(pre))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    normalised = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    assert tokenizer.decode(ids) == normalised
    assert tokenizer.decoder.__class__ is decoders.ByteLevel


def test_control_tokens_are_special_and_user_defined_ones_are_not() -> None:
    tokenizer = load(files_of())
    added = {index: (token.content, token.special) for index, token in tokenizer.get_added_tokens_decoder().items()}
    assert added == {260: ("<s>", True), 261: ("</s>", True), 262: ("<eot>", True), 263: ("[user word]", False)}
    assert tokenizer.encode("the[user word]</s>").tokens == ["t", "he", "[user word]", "</s>"]
    assert tokenizer.decode([263, 261]) == "[user word]"


def test_unused_tokens_are_left_out() -> None:
    found = metadata()
    tokens = [*found["tokenizer.ggml.tokens"], "[PAD264]", "[PAD265]"]
    kinds = np.array([*found["tokenizer.ggml.token_type"], 5, 5], np.int32)
    assert load(files_of(tokens=tokens, token_type=kinds)).get_vocab_size() == 264


def test_without_types_every_token_is_a_normal_one() -> None:
    assert parsed(files_of(token_type=None), "tokenizer.json")["added_tokens"] == []


@pytest.mark.parametrize(
    ("pre", "said", "added"),
    [
        ("gpt-2", None, False),
        ("smollm", None, False),
        ("qwen2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
    ],
)
def test_bos_is_added_where_the_file_or_llama_cpps_default_says(pre: str, said: bool | None, added: bool) -> None:
    files = files_of(pre, add_bos_token=said)
    assert parsed(files, "tokenizer_config.json")["add_bos_token"] is added
    assert load(files).encode("t").tokens == (["<s>", "t"] if added else ["t"])


def test_eos_is_added_where_the_file_says() -> None:
    files = files_of(add_bos_token=True, add_eos_token=True)
    assert parsed(files, "tokenizer_config.json")["add_eos_token"] is True
    assert load(files).encode("t").tokens == ["<s>", "t", "</s>"]


def test_no_bos_is_added_where_there_is_none() -> None:
    files = files_of("llama-bpe", bos_token_id=None)
    assert parsed(files, "tokenizer_config.json")["add_bos_token"] is False
    assert "bos_token" not in parsed(files, "tokenizer_config.json")
    assert load(files).encode("t").tokens == ["t"]


def test_replies_end_at_every_stop_token_that_the_file_names() -> None:
    files = files_of(eot_token_id=262, eom_token_id=262)
    assert parsed(files, "generation_config.json") == {"bos_token_id": 260, "eos_token_id": [261, 262]}


def test_whole_pieces_are_taken_as_tokens_for_llama_3_only() -> None:
    changes = {"merges": ["Ġ t", "1 1"]}  # "he" is a token that no merge reaches
    assert load(files_of("llama-bpe", **changes)).encode("he", add_special_tokens=False).tokens == ["he"]
    assert load(files_of("gpt-2", **changes)).encode("he").tokens == ["h", "e"]


def test_a_file_without_a_tokenizer_gives_no_files() -> None:
    assert tokenizer_files({"general.architecture": "llama"}, "model.gguf") == {}


def test_a_file_without_a_chat_template_has_none() -> None:
    assert "chat_template" not in parsed(files_of(), "tokenizer_config.json")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "kind 'bert'"),
        ({"pre": "tekken"}, "pre-tokenizer is 'tekken'"),
        ({"pre": None}, "pre-tokenizer is None"),
    ],
)
def test_other_tokenizers_are_unsupported_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        files_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 5}, "model: found int, expected str"),
        ({"tokens": None}, "tokens: missing"),
        ({"tokens": "abc"}, "tokens: missing, or not an array"),
        ({"tokens": [*alphabet(), *"ABCDEFGH"]}, "token 'A' has two ids"),
        ({"token_type": np.zeros(3, np.int32)}, "an integer for each of 264 tokens"),
        ({"token_type": np.zeros(264, np.float32)}, "an integer for each of 264 tokens"),
        ({"token_type": [1] * 264}, "an integer for each of 264 tokens"),
        ({"merges": None}, "merges: missing"),
        ({"merges": ["Ġ t", "Ġt"]}, "merge 1 is 'Ġt'"),
        ({"merges": ["Ġ h"]}, "merge 0 is 'Ġ h'"),
        ({"merges": ["xx he"]}, "merge 0 is 'xx he'"),
        ({"eos_token_id": 264}, "eos_token_id: the id is 264, but there are 264 tokens"),
        ({"bos_token_id": -1}, "bos_token_id: the id is -1"),
        ({"bos_token_id": True}, "found bool, expected int"),
        ({"add_bos_token": 1}, "found int, expected bool"),
        ({"eot_token_id": 999}, "eot_token_id: the id is 999"),
    ],
)
def test_a_tokenizer_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        files_of(**changes)
    assert str(caught.value).startswith("model.gguf:tokenizer.ggml.")
