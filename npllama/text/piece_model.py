"""SentencePiece's ``tokenizer.model``: pieces with scores and kinds, and how text is prepared for them.

The file is a protocol buffer, ``ModelProto`` of SentencePiece's ``sentencepiece_model.proto``
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto). Llama 1 and 2, Mistral and Phi-3
come with one.
"""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npllama.errors import TokenizerError
from npllama.text.protobuf import Field, Message, values

#: What SentencePiece writes for a space.
SPACE = "\u2581"

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

_PIECES, _TRAINER, _NORMALISER = 1, 2, 3

_PIECE_FIELDS = {1: ("text", "text"), 2: ("score", "real"), 3: ("kind", "integer")}
_TRAINER_FIELDS = {
    3: ("algorithm", "integer"),
    24: ("space_behind_words", "integer"),
    35: ("byte_fallback", "integer"),
    46: ("bos_piece", "text"),
    47: ("eos_piece", "text"),
}
_NORMALISER_FIELDS = {
    2: ("rules", "size"),
    3: ("adds_space", "integer"),
    4: ("removes_spaces", "integer"),
    5: ("escapes_spaces", "integer"),
}

#: What holds where the file says nothing.
_TRAINER_DEFAULTS = {
    "algorithm": 1,
    "space_behind_words": 0,
    "byte_fallback": 0,
    "bos_piece": "<s>",
    "eos_piece": "</s>",
}
_NORMALISER_DEFAULTS = {"rules": 0, "adds_space": 1, "removes_spaces": 1, "escapes_spaces": 1}

_ALGORITHMS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class Kind(enum.IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place.

    Attributes
    ----------
    text : str
        A space is spelled U+2581.
    score : float
        Of two merges the one with the higher score comes first.
    kind : Kind
        Normal pieces, and user-defined ones before all others, are found in text; control pieces never are.
    """

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceModel:
    """A ``tokenizer.model`` as data.

    Attributes
    ----------
    pieces : sequence of Piece
        The vocabulary, by id.
    algorithm : {"unigram", "bpe", "word", "char"}
        How text is cut into pieces.
    rules : int
        Bytes of the table of characters that are replaced before; 0 without one.
    adds_space : bool
        A space is put before every text.
    removes_spaces : bool
        Spaces at the ends of a text, and all but one of several, are removed.
    escapes_spaces : bool
        A space becomes U+2581.
    space_behind_words : bool
        Words keep the space behind them instead of the one before.
    bos, eos : int or None
        Ids of the control pieces that begin and end a text.
    unknown : int
        Id of the unknown piece.
    """

    pieces: Sequence[Piece]
    algorithm: str
    rules: int
    adds_space: bool
    removes_spaces: bool
    escapes_spaces: bool
    space_behind_words: bool
    bos: int | None
    eos: int | None
    unknown: int


def is_piece_model(data: bytes) -> bool:
    """Tell a SentencePiece model from other files: it begins with a piece, which begins with a text."""
    return data[:1] == b"\x0a" and data[2:3] == b"\x0a"


def read_piece_model(data: bytes, source: str) -> PieceModel:
    """Parse a SentencePiece model strictly.

    Parameters
    ----------
    data : bytes
        Content of the file.
    source : str
        Its name, for messages.

    Raises
    ------
    TokenizerError
        The file is damaged (with the byte offset), or its pieces contradict each other (with the id).
    """
    pieces: list[Piece] = []
    trainer: dict[str, Any] = dict(_TRAINER_DEFAULTS)
    normaliser: dict[str, Any] = dict(_NORMALISER_DEFAULTS)
    for field in Message(memoryview(data), 0, len(data), source).fields():
        if field.number == _PIECES:
            pieces.append(_piece(field))
        elif field.number == _TRAINER:
            trainer = values(field.message(), _TRAINER_FIELDS, trainer)
        elif field.number == _NORMALISER:
            normaliser = values(field.message(), _NORMALISER_FIELDS, normaliser)
    algorithm = _ALGORITHMS.get(trainer["algorithm"])
    if algorithm is None:
        raise _damaged(f"the algorithm has the number {trainer['algorithm']}", source)
    ids = _reserved(pieces, bool(trainer["byte_fallback"]), source)
    return PieceModel(
        pieces=pieces,
        algorithm=algorithm,
        rules=normaliser["rules"],
        adds_space=bool(normaliser["adds_space"]),
        removes_spaces=bool(normaliser["removes_spaces"]),
        escapes_spaces=bool(normaliser["escapes_spaces"]),
        space_behind_words=bool(trainer["space_behind_words"]),
        bos=ids.get(trainer["bos_piece"]),
        eos=ids.get(trainer["eos_piece"]),
        unknown=next(index for index, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN),
    )


def _damaged(message: str, source: str, record: str | None = None) -> TokenizerError:
    return TokenizerError(message, file=source, record=record, remedy="The file is damaged; fetch it again.")


def _piece(field: Field) -> Piece:
    found = values(field.message(), _PIECE_FIELDS, {"text": "", "score": 0.0, "kind": 1})
    if not found["text"] or not math.isfinite(found["score"]) or found["kind"] not in Kind.__members__.values():
        raise field.error(f"the piece {found['text']!r} has the score {found['score']} and the kind {found['kind']}")
    return Piece(found["text"], found["score"], Kind(found["kind"]))


def _reserved(pieces: Sequence[Piece], byte_fallback: bool, source: str) -> Mapping[str, int]:
    """Check the vocabulary as a whole; return the control pieces, text -> id."""
    in_text: dict[str, int] = {}
    reserved: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        apart = piece.kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE)
        if (reserved if apart else in_text).setdefault(piece.text, index) != index:
            raise _damaged(f"the piece {piece.text!r} is there twice", source, f"piece {index}")
        if piece.kind is Kind.BYTE and not BYTE_PIECE.fullmatch(piece.text):
            raise _damaged(f"{piece.text!r} is no byte, expected <0x00> to <0xFF>", source, f"piece {index}")
    count = Counter(piece.kind for piece in pieces)
    if count[Kind.BYTE] != 256 * byte_fallback:
        raise _damaged(f"{count[Kind.BYTE]} pieces for bytes, expected {256 * byte_fallback}", source)
    if count[Kind.UNKNOWN] != 1:
        raise _damaged(f"{count[Kind.UNKNOWN]} unknown pieces, expected one", source)
    return {text: index for text, index in reserved.items() if pieces[index].kind is Kind.CONTROL}
