"""SentencePiece models, trained by the sentencepiece library in some milliseconds, and the files that they come in."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.text.samples import SCRIPTS, own_source

sentencepiece = pytest.importorskip("sentencepiece")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: Settings of the trainer for models like those of Llama; the alphabet lacks rare characters.
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 700,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "character_coverage": 0.995,
}


@functools.cache
def train(**changes: Any) -> bytes:
    """Return a model trained on real text; lists of symbols are given as tuples."""
    found = io.BytesIO()
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in {**LLAMA, **changes}.items()}
    lines = [*own_source().split("\n"), *SCRIPTS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=found, minloglevel=2, num_threads=1, **settings
    )
    return found.getvalue()


def processor(model: bytes) -> Any:
    """Load a model with the library."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def gguf_metadata(model: bytes, *, own: Sequence[str] = (), **changes: Any) -> dict[str, Any]:
    """Return what llama.cpp's converter writes of a model; ``own`` are the user-defined symbols."""
    library = processor(model)
    tokens = [library.id_to_piece(index) for index in range(len(library))]

    def kind(index: int, token: str) -> int:
        if library.is_unknown(index):
            return UNKNOWN
        if library.is_control(index):
            return CONTROL
        if library.is_byte(index):
            return BYTE
        return UNUSED if library.is_unused(index) else USER_DEFINED if token in own else NORMAL

    found = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": np.array([library.get_score(index) for index in range(len(library))], np.float32),
        "token_type": np.array([kind(*pair) for pair in enumerate(tokens)], np.int32),
        "bos_token_id": library.bos_id(),
        "eos_token_id": library.eos_id(),
        "unknown_token_id": library.unk_id(),
    }
    found.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


def made_up(pieces: Sequence[tuple[str, float]], **changes: Any) -> dict[str, Any]:
    """Return GGUF metadata of given normal pieces, behind the unknown one, BOS, EOS and 256 bytes."""
    fixed = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{b:02X}>", BYTE) for b in range(256))]
    found = {
        "model": "llama",
        "tokens": [text for text, _ in (*fixed, *pieces)],
        "scores": np.array([0.0] * len(fixed) + [score for _, score in pieces], np.float32),
        "token_type": np.array([kind for _, kind in fixed] + [NORMAL] * len(pieces), np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    found.update(changes)
    return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


# --- the same vocabulary as a tokenizer.json ------------------------------------------------------------------------

PREPEND = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
METASPACE = {
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
}
#: The two forms, and the variants of the second, that files of Llama 1 and 2, Mistral and Phi-3 have.
FORMS: dict[str, dict[str, Any]] = {
    "legacy": PREPEND,
    "first": METASPACE,
    "always": {**METASPACE, "pre_tokenizer": {**METASPACE["pre_tokenizer"], "prepend_scheme": "always"}},
    "never": {**METASPACE, "pre_tokenizer": {**METASPACE["pre_tokenizer"], "prepend_scheme": "never", "split": True}},
    "old": {**METASPACE, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
}


def added(index: int, content: str, **flags: bool) -> dict[str, Any]:
    """Return an entry of ``added_tokens``."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **plain, **flags}


def json_document(model: bytes, form: str = "legacy", more: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a model as a ``tokenizer.json``; the merges are every pair of pieces that is one, by score."""
    library = processor(model)
    vocab = {library.id_to_piece(index): index for index in range(len(library))}
    score = {piece: library.get_score(index) for piece, index in vocab.items()}
    pairs = [
        (piece[:at], piece[at:])
        for piece in vocab
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    merges = sorted(pairs, key=lambda pair: (-score["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if form != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [*(added(index, text) for index, text in enumerate(["<unk>", "<s>", "</s>"])), *more],
        **FORMS[form],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for pair in merges],
        },
    }


def dump(document: Any) -> bytes:
    """Return a JSON file."""
    return json.dumps(document).encode()
