"""Byte-level BPE in a GGUF file, written out as a ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npllama.checkpoint.gguf.tokenizer_metadata import TokenizerMetadata, TokenList, TokenType

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a family of byte-level tokenizers cuts text before the merges, in the terms of tokenizer.json.

    Attributes
    ----------
    pre_tokenizer : dict
        Cuts the text into pieces and spells their bytes in the byte-level alphabet.
    normalizer : dict or None
        What is done to the text before.
    ignore_merges : bool
        A piece that is a token as a whole is taken as that token.
    add_bos : bool
        The text begins with the BOS token where the file does not say.
    """

    pre_tokenizer: Json
    normalizer: Json | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _byte_level(use_regex: bool) -> Json:
    """Spell bytes as characters; ``use_regex`` cuts by GPT-2's pattern first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: Json) -> Json:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def _cut_by(pattern: str) -> Json:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return _sequence(split, _byte_level(use_regex=False))


def _word_pattern(numbers: str) -> str:
    """Contractions, words with one character before them, numbers, other signs, line ends, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA_3 = Scheme(_cut_by(_word_pattern(r"\p{N}{1,3}")), ignore_merges=True, add_bos=True)

#: ``tokenizer.ggml.pre`` -> scheme.
SCHEMES: dict[str, Scheme] = {
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "smollm": Scheme(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))),
    "qwen2": Scheme(_cut_by(_word_pattern(r"\p{N}")), normalizer={"type": "NFC"}),
    "gpt-2": Scheme(_byte_level(use_regex=True)),
}


def tokenizer_json(reader: TokenizerMetadata, vocabulary: TokenList, scheme: Scheme) -> Json:
    """Return the content of a ``tokenizer.json``: vocabulary, merges, added tokens, and BOS and EOS where wanted."""
    added = [
        {
            "id": index,
            "content": vocabulary.tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == TokenType.CONTROL,
        }
        for index, kind in enumerate(vocabulary.types)
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": scheme.normalizer,
        "pre_tokenizer": scheme.pre_tokenizer,
        "post_processor": _post_processor(vocabulary, reader.added_ends(vocabulary, adds_bos=scheme.add_bos)),
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": scheme.ignore_merges,
            "vocab": vocabulary.ids,
            "merges": reader.merges(vocabulary.ids),
        },
    }


def _post_processor(vocabulary: TokenList, ends: Mapping[str, int]) -> Json | None:
    """Template that puts BOS before the text and EOS after it, as far as the file asks for them."""
    if not ends:
        return None

    def token(name: str) -> list[Json]:
        return [{"SpecialToken": {"id": vocabulary.tokens[ends[name]], "type_id": 0}}] if name in ends else []

    def text(which: str) -> list[Json]:
        return [*token("bos"), {"Sequence": {"id": which, "type_id": 0}}, *token("eos")]

    return {
        "type": "TemplateProcessing",
        "single": text("A"),
        "pair": [*text("A"), *text("B")],
        "special_tokens": {
            vocabulary.tokens[index]: {
                "id": vocabulary.tokens[index],
                "ids": [index],
                "tokens": [vocabulary.tokens[index]],
            }
            for index in ends.values()
        },
    }
