"""A ``tokenizer.json`` with SentencePiece's pieces, byte-pair merges and byte fallback: Llama 1 and 2, Mistral, Phi-3.

The tokenizers library, an extra, encodes ordinary text. Special tokens, BOS and decoding are npllama's own business, as
for every other tokenizer, so the library is given the file without them. The two forms that such files have differ in
where they put a space before text: "legacy" ones (a normalizer that prepends) before each piece between special tokens,
the others (``Metaspace`` with the scheme "first") before the whole text only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from npllama.errors import TokenizerError, UnsupportedError
from npllama.text.added_tokens import MAX_ID
from npllama.text.extras import import_extra
from npllama.text.json_files import member, tokenizer_error
from npllama.text.piece_model import BYTE_PIECE, SPACE
from npllama.text.shield import without_surrogates
from npllama.text.vocabulary import AddedSpace, Special, Vocabulary

#: Scheme of Metaspace -> where it puts a space.
_SCHEMES: dict[str, AddedSpace] = {"always": "each", "first": "first", "never": "none"}

#: Lists of steps, by the type ``Sequence``.
_STEPS = ("normalizers", "pretokenizers", "decoders")


def read_piece_json(document: Mapping[str, Any], special: Special, source: str) -> Vocabulary:
    """Turn a ``tokenizer.json`` with pieces into a vocabulary.

    Parameters
    ----------
    document : mapping
        The parsed file.
    special : Special
        Its added tokens.
    source : str
        Its name, for messages.

    Returns
    -------
    Vocabulary
        Without BOS and what other files say.

    Raises
    ------
    UnsupportedError
        A form of normalizer, pre-tokenizer or decoder that is not known, or the library is not installed.
    TokenizerError
        The file contradicts itself, or the library refuses it.
    """
    added_space = _added_space(document, source)
    _check_added_tokens(document, source)
    vocab = member(member(document, "model", dict, source), "vocab", dict, source)
    has_bytes = any(step["type"] == "ByteFallback" for step in _steps(document.get("decoder")))
    tokens: dict[int, bytes] = {}
    for text, index in vocab.items():
        if type(index) is not int or not 0 <= index < MAX_ID or index in tokens:
            raise tokenizer_error(f"the id of {text!r} is {index!r}, or there twice", source, "model.vocab")
        tokens[index] = _bytes(text, has_bytes)
    reserved = set(special.ids.values())
    return Vocabulary(
        encoder=_Library(document, added_space, source),
        tokens={index: content for index, content in tokens.items() if index not in reserved},
        special=special,
        added_space=added_space,
    )


class _Library:
    """The encoder: the tokenizers library without special tokens."""

    def __init__(self, document: Mapping[str, Any], added_space: AddedSpace, source: str) -> None:
        library = import_extra("tokenizers", "tokenizers", "this tokenizer", source)
        bare = {**document, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        try:
            self._first = self._later = library.Tokenizer.from_str(json.dumps(bare))
            if added_space == "first":
                self._later = library.Tokenizer.from_str(json.dumps(_with_scheme(bare, "never")))
        except Exception as problem:  # the library's errors have no other class
            raise TokenizerError(
                f"the tokenizers library refuses the file: {problem}", file=source, remedy="Fetch the file again."
            ) from None

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Turn ordinary text into ids; see `npllama.text.vocabulary.Encoder`."""
        encoder = self._first if first else self._later
        ids: list[int] = encoder.encode(without_surrogates(text), add_special_tokens=False).ids
        return ids


def _bytes(piece: str, has_bytes: bool) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece) if has_bytes else None
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode("utf-8", "replace")


def _steps(node: Any) -> Iterator[Any]:
    """Yield the steps of a node that may be a (nested) ``Sequence``."""
    if isinstance(node, Mapping) and node.get("type") == "Sequence":
        for key in _STEPS:
            steps = node.get(key)
            for step in steps if isinstance(steps, list) else []:
                yield from _steps(step)
    elif node is not None:
        yield node


def _added_space(document: Mapping[str, Any], source: str) -> AddedSpace:
    """Find out where a space is put before text; every step of the file must be a known one."""
    found: list[AddedSpace] = []
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(document.get(key)):
            match key, step:
                case "normalizer", {"type": "Prepend", "prepend": "▁"}:
                    found.append("each")
                case "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": str() as scheme} if (
                    scheme in _SCHEMES
                ):
                    found.append(_SCHEMES[scheme])
                case "pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "add_prefix_space": bool() as adds} if (
                    "prepend_scheme" not in step  # an older file says only whether
                ):
                    found.append("each" if adds else "none")
                case "normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                    pass
                case "decoder", {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                    pass
                case "decoder", {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                    pass
                case "decoder", {"type": "Metaspace", "replacement": "▁"} | {"type": "ByteFallback" | "Fuse"}:
                    pass
                case _:
                    raise UnsupportedError(
                        f"unknown step {json.dumps(step, ensure_ascii=False)[:300]}",
                        file=source,
                        record=key,
                        remedy="npllama reads the forms of Llama 1 and 2, Mistral and Phi-3.",
                    )
    added = [space for space in found if space != "none"]
    if len(added) > 1:
        raise UnsupportedError("two steps put a space before text", file=source, remedy="npllama reads one.")
    return added[0] if added else "none"


def _with_scheme(document: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return the document with another scheme in its Metaspace pre-tokenizer."""
    steps = [{**step, "prepend_scheme": scheme} for step in _steps(document["pre_tokenizer"])]
    return {**document, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def _check_added_tokens(document: Mapping[str, Any], source: str) -> None:
    """Refuse tokens that are looked for in prepared text: behind a space that was put there, they are other tokens."""
    if document.get("normalizer") is None:
        return
    for number, entry in enumerate(document.get("added_tokens") or []):
        if entry.get("normalized"):
            raise UnsupportedError(
                f"the token {entry['content']!r} has normalized set, so it is found only behind a space",
                file=source,
                record=f"added_tokens[{number}]",
                remedy="Set it to false; or remove the file where a tokenizer.model is beside it.",
            )
