"""SentencePiece's BPE in a GGUF file (``tokenizer.ggml.model`` "llama"), written out as a ``tokenizer.model``.

GGUF keeps tokens, scores and types of the SentencePiece model, and of how text is prepared only whether a space is put
before it. Together they are the model that they were made from: a protocol buffer ``ModelProto``
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto), in the wire format of
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

from npllama.checkpoint.gguf.tokenizer_metadata import TokenizerMetadata, TokenList, TokenType
from npllama.dtypes import Array

#: What SentencePiece writes for a space.
_SPACE = "\u2581"

_ENDS = ("bos", "eos", "eot", "eom")
#: At most the score of a token that was added to the model; SentencePiece gives its own user-defined pieces 0.
_ADDED_SCORE = -1000.0
#: Where these special tokens of Phi-3 stand, white space behind them is kept.
_PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")

_PIECES, _TRAINER, _NORMALISER = 1, 2, 3
_TEXT, _SCORE, _TYPE = 1, 2, 3
_ALGORITHM, _BPE, _BYTE_FALLBACK = 3, 2, 35
_NAMES = {"unknown": 45, "bos": 46, "eos": 47}
_RULES, _ADDS_SPACE, _REMOVES_SPACES, _ESCAPES_SPACES = 1, 3, 4, 5


def tokenizer_model(reader: TokenizerMetadata, vocabulary: TokenList) -> tuple[bytes, TokenList]:
    """Write the SentencePiece model that the tokens were taken from.

    Parameters
    ----------
    reader : TokenizerMetadata
        The file's metadata.
    vocabulary : TokenList
        Its tokens and types.

    Returns
    -------
    bytes
        Content of ``tokenizer.model``.
    TokenList
        Tokens and types as that file has them: without unused tokens at the end, and with those as control tokens
        that have that role.

    Raises
    ------
    UnsupportedError
        The file lacks types or scores that mean something, or text is prepared in another way.
    TokenizerError
        Tokens, types and scores contradict each other.

    Notes
    -----
    llama.cpp's converter marks tokens that were added to a SentencePiece model, those of chats above all, as
    user-defined, with a score of -1000. A user-defined piece is found in any text, added tokens must not be: they are
    control tokens here, and so is whatever begins or ends a text.
    """
    if reader.optional("remove_extra_whitespaces", bool) or reader.holds("precompiled_charsmap"):
        raise reader.unsupported("the tokenizer normalises text", "Only SentencePiece BPE without rules is read.")
    if not reader.holds("token_type") or not reader.holds("scores"):
        raise reader.unsupported("the tokens have no types or no scores", "Convert the model to GGUF again.")
    scores = reader.scores(len(vocabulary.tokens))
    found = _with_roles(reader, vocabulary, scores)
    _check(reader, found)
    if len({scores[index] for index, kind in enumerate(found.types) if kind == TokenType.NORMAL}) == 1:
        raise reader.unsupported("all tokens have the same score", "The merges cannot be told from it.")
    pieces = [
        _bytes(_PIECES, _bytes(_TEXT, text.encode()) + _float(_SCORE, score) + _number(_TYPE, kind))
        for text, score, kind in zip(found.tokens, scores.tolist(), found.types, strict=False)
    ]
    names = [
        _bytes(number, found.tokens[index].encode())
        for name, number in _NAMES.items()
        if (index := reader.token_id(name, found)) is not None
    ]
    trainer = [_number(_ALGORITHM, _BPE), _number(_BYTE_FALLBACK, TokenType.BYTE in found.types), *names]
    adds_space = reader.optional("add_space_prefix", bool)
    normaliser = [
        _bytes(_RULES, b"identity"),
        _number(_ADDS_SPACE, adds_space is not False),
        _number(_REMOVES_SPACES, False),
        _number(_ESCAPES_SPACES, True),
    ]
    content = [*pieces, _bytes(_TRAINER, b"".join(trainer)), _bytes(_NORMALISER, b"".join(normaliser))]
    return b"".join(content), found


def added_tokens_decoder(reader: TokenizerMetadata, vocabulary: TokenList) -> dict[str, Any]:
    """Return the tokens that take white space behind them with them, in the form of ``tokenizer_config.json``.

    GGUF does not say; llama.cpp knows it of Phi-3 (``llama_vocab::impl::load`` in its ``src/llama-vocab.cpp``), whose
    special tokens all do, but for three.
    """
    if reader.architecture != "phi3":
        return {}
    special = (TokenType.UNKNOWN, TokenType.CONTROL)
    return {
        str(index): {"content": text, "lstrip": False, "rstrip": True, "single_word": False, "special": True}
        for index, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in special and text not in _PHI3_KEEPS_SPACE
    }


def _with_roles(reader: TokenizerMetadata, vocabulary: TokenList, scores: Array) -> TokenList:
    """Give tokens the types that SentencePiece gave them, or that their role asks for."""
    roles = {reader.token_id(name, vocabulary) for name in _ENDS}
    unknown = reader.token_id("unknown", vocabulary)
    kinds = list(vocabulary.types)
    if unknown is not None and TokenType.UNKNOWN not in kinds:
        kinds[unknown] = TokenType.UNKNOWN
    for index, kind in enumerate(kinds):
        if kind == TokenType.USER_DEFINED and (index in roles or scores[index] <= _ADDED_SCORE):
            kinds[index] = TokenType.CONTROL
    named = {*roles, unknown, reader.token_id("padding", vocabulary)}
    used = max((i for i, kind in enumerate(kinds) if kind != TokenType.UNUSED or i in named), default=-1) + 1
    texts = [
        _text(reader, index, *pair) for index, pair in enumerate(zip(vocabulary.tokens[:used], kinds, strict=False))
    ]
    return TokenList(texts, kinds[:used], vocabulary.ids)


def _text(reader: TokenizerMetadata, index: int, text: str, kind: int) -> str:
    if kind == TokenType.UNUSED:
        return f"<unused {index}>"  # never found in text, but SentencePiece wants a text, and of each its own
    if not text:
        raise reader.error("tokens", f"the token {index} is empty")
    # Converters write the spaces of user-defined tokens as spaces; SentencePiece looks for them in escaped text.
    return text.replace(" ", _SPACE) if kind == TokenType.USER_DEFINED else text


def _check(reader: TokenizerMetadata, vocabulary: TokenList) -> None:
    count = Counter(vocabulary.types)
    strange = sorted(kind for kind in count if kind not in TokenType.__members__.values())
    if strange:
        raise reader.error("token_type", f"found the type {strange[0]}, expected 1 to 6")
    if count[TokenType.BYTE] not in (0, 256):
        raise reader.error("token_type", f"{count[TokenType.BYTE]} tokens for bytes, expected 256 or none")
    if count[TokenType.UNKNOWN] != 1:
        raise reader.error("token_type", f"{count[TokenType.UNKNOWN]} unknown tokens, expected one")


# --- the wire format ------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    """Spell a number in groups of seven bits, the lowest first."""
    groups: Sequence[int] = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
