"""The tokenizer of a GGUF file, written out as the files that a Hugging Face folder would have.

A store's tokenizer folder then looks the same wherever the model came from, and one reader of tokenizers suffices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from npllama.errors import TokenizerError, UnsupportedError

Json = dict[str, Any]
_T = TypeVar("_T")

_PREFIX = "tokenizer.ggml."
_CHAT_TEMPLATE = "tokenizer.chat_template"

# Token types. The text of normal tokens is spelled in the byte-level alphabet (a space is "Ġ"), that of the others
# is plain. Unused tokens only fill the vocabulary up to the embedding's rows.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


@dataclass(frozen=True, slots=True)
class _Scheme:
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


_LLAMA_3 = _Scheme(_cut_by(_word_pattern(r"\p{N}{1,3}")), ignore_merges=True, add_bos=True)

#: ``tokenizer.ggml.pre`` -> scheme.
_SCHEMES: dict[str, _Scheme] = {
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "smollm": _Scheme(_sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))),
    "qwen2": _Scheme(_cut_by(_word_pattern(r"\p{N}")), normalizer={"type": "NFC"}),
    "gpt-2": _Scheme(_byte_level(use_regex=True)),
}


def tokenizer_files(metadata: Mapping[str, Any], file: str) -> dict[str, bytes]:
    """Write a GGUF file's tokenizer as ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``.

    Parameters
    ----------
    metadata : mapping
        The file's metadata, as `npllama.checkpoint.gguf.file.open_gguf` gives it.
    file : str
        The file's name, for messages.

    Returns
    -------
    dict of str to bytes
        File name -> content; empty when the file has no tokenizer.

        - ``tokenizer.json`` holds the vocabulary with every token but the unused ones, the merges, the pre-tokenizer
          that ``tokenizer.ggml.pre`` names, and as added tokens the control tokens ("special") and the user-defined
          ones. Its post-processor puts BOS (and EOS) where the file wants them.
        - ``tokenizer_config.json`` holds BOS, EOS, padding and unknown token as text, whether BOS and EOS are added,
          and the chat template.
        - ``generation_config.json`` holds the ids: BOS, padding, and as ``eos_token_id`` the list of those that end a
          reply (EOS, end of turn and end of message, as far as the file names them).

    Raises
    ------
    UnsupportedError
        A tokenizer that is not byte-level BPE (SentencePiece's is called "llama"), or an unknown pre-tokenizer.
    TokenizerError
        Vocabulary, merges, types and ids contradict each other.

    Notes
    -----
    Where ``tokenizer.ggml.add_bos_token`` is absent, BOS is added for Llama 3's pre-tokenizer and for no other, which
    is what llama.cpp does (``llama_vocab::impl::load`` in its ``src/llama-vocab.cpp``).
    """
    reader = _Reader(metadata, file)
    kind = reader.optional("model", str)
    if kind is None:
        return {}
    if kind != "gpt2":
        raise UnsupportedError(
            f"the tokenizer is of the kind {kind!r}", file=file, remedy="Only byte-level BPE ('gpt2') is read."
        )
    pre = reader.optional("pre", str)
    scheme = _SCHEMES.get(pre or "")
    if scheme is None:
        raise UnsupportedError(
            f"the pre-tokenizer is {pre!r}", file=file, remedy=f"Pre-tokenizers that are read: {', '.join(_SCHEMES)}."
        )
    vocabulary = reader.vocabulary()
    return {
        "tokenizer.json": _dump(_tokenizer(reader, vocabulary, scheme)),
        "tokenizer_config.json": _dump(_tokenizer_config(reader, vocabulary, scheme)),
        "generation_config.json": _dump(_generation_config(reader, vocabulary)),
    }


def _dump(document: Json) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens by id, their types, and the id of every token that is in use."""

    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]


class _Reader:
    """Typed access to the tokenizer's metadata."""

    def __init__(self, metadata: Mapping[str, Any], file: str) -> None:
        self._metadata = metadata
        self._file = file

    def error(self, key: str, message: str) -> TokenizerError:
        return TokenizerError(
            message, file=self._file, record=_PREFIX + key, remedy="The file is damaged; fetch it again."
        )

    def optional(self, key: str, wanted: type[_T]) -> _T | None:
        value = self._metadata.get(_PREFIX + key)
        if value is not None and type(value) is not wanted:
            raise self.error(key, f"found {type(value).__name__}, expected {wanted.__name__}")
        return value

    def chat_template(self) -> str | None:
        value = self._metadata.get(_CHAT_TEMPLATE)
        return value if isinstance(value, str) else None

    def strings(self, key: str) -> list[str]:
        value = self._metadata.get(_PREFIX + key)
        if not isinstance(value, list):
            raise self.error(key, "missing, or not an array of strings")
        return value

    def vocabulary(self) -> _Vocabulary:
        tokens = self.strings("tokens")
        types = self._types(len(tokens))
        ids = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED}
        if len(ids) != len(types) - types.count(_UNUSED):
            twice = next(t for i, t in enumerate(tokens) if types[i] != _UNUSED and ids[t] != i)
            raise self.error("tokens", f"the token {twice!r} has two ids")
        return _Vocabulary(tokens, types, ids)

    def _types(self, count: int) -> list[int]:
        value = self._metadata.get(_PREFIX + "token_type")
        if value is None:
            return [1] * count
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != count:
            raise self.error("token_type", f"expected an integer for each of {count} tokens")
        types: list[int] = value.tolist()
        return types

    def merges(self, ids: Mapping[str, int]) -> list[str]:
        merges = self.strings("merges")
        for index, merge in enumerate(merges):
            left, space, right = merge.partition(" ")
            if not space or left not in ids or right not in ids or left + right not in ids:
                raise self.error("merges", f"merge {index} is {merge!r}, expected two tokens that make up a third")
        return merges

    def token_id(self, name: str, vocabulary: _Vocabulary) -> int | None:
        key = f"{name}_token_id"
        index = self.optional(key, int)
        if index is None:
            return None
        if not 0 <= index < len(vocabulary.tokens):
            raise self.error(key, f"the id is {index}, but there are {len(vocabulary.tokens)} tokens")
        return index

    def added_ends(self, vocabulary: _Vocabulary, scheme: _Scheme) -> dict[str, int]:
        """Return the ids of the tokens that are put before ("bos") and after ("eos") a text."""
        ends = {}
        for name, default in (("bos", scheme.add_bos), ("eos", False)):
            wanted = self.optional(f"add_{name}_token", bool)
            index = self.token_id(name, vocabulary)
            if index is not None and (default if wanted is None else wanted):
                ends[name] = index
        return ends


def _tokenizer(reader: _Reader, vocabulary: _Vocabulary, scheme: _Scheme) -> Json:
    added = [
        {
            "id": index,
            "content": vocabulary.tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(vocabulary.types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": scheme.normalizer,
        "pre_tokenizer": scheme.pre_tokenizer,
        "post_processor": _post_processor(vocabulary, reader.added_ends(vocabulary, scheme)),
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


def _post_processor(vocabulary: _Vocabulary, ends: Mapping[str, int]) -> Json | None:
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


def _tokenizer_config(reader: _Reader, vocabulary: _Vocabulary, scheme: _Scheme) -> Json:
    ends = reader.added_ends(vocabulary, scheme)
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": "bos" in ends,
        "add_eos_token": "eos" in ends,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        index = reader.token_id(name, vocabulary)
        if index is not None:
            config[f"{key}_token"] = vocabulary.tokens[index]
    template = reader.chat_template()
    if template is not None:
        config["chat_template"] = template
    return config


def _generation_config(reader: _Reader, vocabulary: _Vocabulary) -> Json:
    ids = {name: reader.token_id(name, vocabulary) for name in ("bos", "padding", "eos", "eot", "eom")}
    config: Json = {}
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if ids[name] is not None:
            config[key] = ids[name]
    stops = sorted({index for name in ("eos", "eot", "eom") if (index := ids[name]) is not None})
    if stops:
        config["eos_token_id"] = stops
    return config
