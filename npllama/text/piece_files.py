"""A SentencePiece ``tokenizer.model`` with the files beside it, as a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from npllama.text.added_tokens import read_added_tokens
from npllama.text.json_files import parse_object, tokenizer_error
from npllama.text.piece_bpe import PieceMerges, is_exact
from npllama.text.piece_library import PieceLibrary
from npllama.text.piece_model import BYTE_PIECE, SPACE, Kind, Piece, PieceModel, read_piece_model
from npllama.text.settings import TOKENIZER_CONFIG
from npllama.text.vocabulary import AddedSpace, Encoder, Special, Vocabulary

ADDED_TOKENS = "added_tokens.json"


def read_piece_files(data: bytes, files: Mapping[str, bytes], source: str) -> Vocabulary:
    """Turn a SentencePiece model into a vocabulary.

    Parameters
    ----------
    data : bytes
        Content of ``tokenizer.model``.
    files : mapping of str to bytes
        The files beside it: ``added_tokens.json`` and the ``added_tokens_decoder`` of ``tokenizer_config.json`` hold
        more tokens, ``legacy`` and ``add_prefix_space`` say where a space is put before text.
    source : str
        Where the files are from, for messages.

    Returns
    -------
    Vocabulary
        Control pieces, the unknown piece and added tokens are special. BOS is added, as all models of this kind want
        it, where other files do not say otherwise; EOS ends an answer.

    Raises
    ------
    TokenizerError
        A file is damaged, or two of them contradict each other.
    UnsupportedError
        The model needs the sentencepiece library, which is not installed.
    """
    model = read_piece_model(data, source)
    place = f"{source}:{TOKENIZER_CONFIG}"
    config = parse_object(files[TOKENIZER_CONFIG], place) if TOKENIZER_CONFIG in files else {}
    added_space = _added_space(model, config)
    encoder: Encoder = PieceMerges(model, added_space) if is_exact(model) else PieceLibrary(data, added_space, source)
    ends = {"bos_token": model.bos, "eos_token": model.eos}
    return Vocabulary(
        encoder=encoder,
        tokens={index: _bytes(piece) for index, piece in enumerate(model.pieces) if not _is_special(piece)},
        special=_special(model, files, config, source),
        added_space=added_space,
        bos=model.bos,
        adds_bos=model.bos is not None,
        stop_ids=frozenset() if model.eos is None else frozenset({model.eos}),
        template_names={name: model.pieces[index].text for name, index in ends.items() if index is not None},
    )


def _is_special(piece: Piece) -> bool:
    return piece.kind in (Kind.CONTROL, Kind.UNKNOWN)


def _bytes(piece: Piece) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece.text) if piece.kind is Kind.BYTE else None
    return bytes.fromhex(byte[1]) if byte else piece.text.replace(SPACE, " ").encode("utf-8", "replace")


def _added_space(model: PieceModel, config: Mapping[str, Any]) -> AddedSpace:
    """Return where a space is put: "legacy" tokenizers, and Meta's own code, encode each piece as a text of its own."""
    if not model.adds_space or config.get("add_prefix_space") is False:
        return "none"
    return "first" if config.get("legacy") is False else "each"


def _special(model: PieceModel, files: Mapping[str, bytes], config: Mapping[str, Any], source: str) -> Special:
    """Combine the special pieces with the tokens that other files add."""
    entries: dict[int, tuple[str, dict[str, Any]]] = {
        index: (f"piece {index}", {"id": index, "content": piece.text})
        for index, piece in enumerate(model.pieces)
        if _is_special(piece)
    }
    for place, entry in [*_from_added_tokens(files, source), *_from_config(config, source)]:
        index, text = entry["id"], entry.get("content")
        if 0 <= index < len(model.pieces) and text != model.pieces[index].text:
            raise tokenizer_error(
                f"the token {text!r} has the id {index}, which is that of {model.pieces[index].text!r}", source, place
            )
        if index in entries and text != entries[index][1]["content"]:
            raise tokenizer_error(
                f"the id {index} has two texts, {entries[index][1]['content']!r} and {text!r}", source
            )
        entries[index] = place, entry
    return read_added_tokens(entries.values(), source)


def _from_added_tokens(files: Mapping[str, bytes], source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if ADDED_TOKENS not in files:
        return
    for text, index in parse_object(files[ADDED_TOKENS], f"{source}:{ADDED_TOKENS}").items():
        if type(index) is not int:
            raise tokenizer_error(f"the id of {text!r} is {index!r}", f"{source}:{ADDED_TOKENS}")
        yield ADDED_TOKENS, {"id": index, "content": text}


def _from_config(config: Mapping[str, Any], source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    decoder = config.get("added_tokens_decoder") or {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else [("added_tokens_decoder", decoder)]:
        if not key.isdecimal() or not isinstance(entry, dict):
            raise tokenizer_error(f"expected an id and an object, found {key!r}", source, TOKENIZER_CONFIG)
        yield f"{TOKENIZER_CONFIG}:{key}", {**entry, "id": int(key)}
