"""Hugging Face's ``tokenizer.json``: which of the two kinds of tokenizers it is, and what both have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from npllama.errors import UnsupportedError
from npllama.text.added_tokens import read_added_tokens
from npllama.text.bpe_json import read_byte_level
from npllama.text.json_files import member, parse_object
from npllama.text.piece_json import read_piece_json
from npllama.text.piece_model import SPACE
from npllama.text.post_processor import leading_id
from npllama.text.vocabulary import Vocabulary


def read_tokenizer_json(data: bytes, source: str) -> Vocabulary:
    """Turn a ``tokenizer.json`` into a vocabulary.

    Parameters
    ----------
    data : bytes
        Content of the file.
    source : str
        Its name, for messages.

    Returns
    -------
    Vocabulary
        Without what other files say (stop ids, chat template); ``bos`` and ``adds_bos`` are what the post-processor
        says.

    Raises
    ------
    UnsupportedError
        A form of tokenizer that npllama does not read, named in the message; or a library that this one needs is not
        installed.
    TokenizerError
        The file contradicts itself.
    """
    document = parse_object(data, source)
    model = member(document, "model", dict, source)
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(
            f"a tokenizer of the type {model.get('type')!r}, expected BPE",
            file=source,
            remedy="npllama reads byte-pair tokenizers.",
        )
    added = member({"added_tokens": [], **document}, "added_tokens", list, source)
    special = read_added_tokens(((f"added_tokens[{n}]", entry) for n, entry in enumerate(added)), source)
    read = read_piece_json if _writes_pieces(document) else read_byte_level
    bos = leading_id(document.get("post_processor"), special.ids, source)
    return replace(read(document, special, source), bos=bos, adds_bos=bos is not None)


def _writes_pieces(document: Mapping[str, Any]) -> bool:
    """Tell a vocabulary of SentencePiece's kind, which writes U+2581 for a space, from a byte-level one."""
    steps = [document.get(step) for step in ("normalizer", "pre_tokenizer", "decoder")]
    return SPACE in json.dumps(steps, ensure_ascii=False)
