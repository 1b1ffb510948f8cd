"""Hugging Face's ``tokenizer.json`` with byte-level byte-pair encoding, turned into a vocabulary for tiktoken."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from npllama.errors import UnsupportedError
from npllama.text.added_tokens import MAX_ID
from npllama.text.byte_level import ByteLevel, RunLimits, unchanged
from npllama.text.gaps import bridge_gaps
from npllama.text.json_files import member, tokenizer_error
from npllama.text.merges import Pair, rank_order
from npllama.text.pretokenize import DIGITS_GPT2_PATTERN, GPT2_PATTERN, word_pattern
from npllama.text.vocabulary import Special, Vocabulary

#: The regular expression engine gives up on about a million spaces in a row; nothing else needs cutting.
_LIMITS = RunLimits(piece=None, pattern=r"\s", run=200_000)

#: Model settings that change the result -> the values under which npllama's result is the same.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}

Prepare = Callable[[str], str]


def read_byte_level(document: Mapping[str, Any], special: Special, source: str) -> Vocabulary:
    """Turn a byte-level ``tokenizer.json`` into a vocabulary.

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
        Another model type, normalizer or pre-tokenizer than the byte-level ones; named in the message.
    TokenizerError
        The file contradicts itself.
    """
    model = member(document, "model", dict, source)
    for key, allowed in _PLAIN.items():
        if model.get(key) not in allowed:
            raise UnsupportedError(
                f"{key} is {model[key]!r}, expected {allowed[0]!r}",
                file=source,
                record="model",
                remedy="npllama reads byte-level byte-pair tokenizers.",
            )
    pattern = word_pattern(document.get("pre_tokenizer"), source)
    vocab = _ordinary(member(model, "vocab", dict, source), special.ids, source)
    ranked = _ranked_tokens(model, vocab, source)
    alphabet = byte_alphabet()
    tokens = {index: _bytes(token, alphabet, source) for token, index in vocab.items()}
    lacking = [byte for character, byte in alphabet.items() if character not in vocab]
    singles = [bytes([byte]) for byte in lacking]
    order = [*singles, *(tokens[vocab[token]] for token in ranked)]
    encoder = ByteLevel(
        pattern,
        {token: rank for rank, token in enumerate(order)},
        [-1] * len(lacking) + [vocab[token] for token in ranked],
        _preparation(document.get("normalizer"), lacking, pattern, model.get("unk_token"), source),
    )
    return Vocabulary(encoder=encoder, tokens=tokens, special=special, cut=_LIMITS.cut)


def byte_alphabet() -> dict[str, int]:
    """Return the character that stands for each byte in a byte-level vocabulary, character -> byte.

    Visible Latin-1 characters stand for themselves; the other 68 bytes, in order, are U+0100 and following (so a space
    is U+0120, shown as a dotted G).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in visible)
    return {chr(byte): byte for byte in visible} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


def _bytes(token: str, alphabet: Mapping[str, int], source: str) -> bytes:
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError as problem:
        raise tokenizer_error(
            f"the token {token!r} holds {problem.args[0]!r}, which stands for no byte", source, "model.vocab"
        ) from None


def _ordinary(vocab: Mapping[str, Any], special: Mapping[str, int], source: str) -> dict[str, int]:
    """Check the vocabulary and leave the added tokens out: text never encodes to them."""
    seen = set(special.values())
    ordinary: dict[str, int] = {}
    for token, index in vocab.items():
        if type(index) is not int or not 0 <= index < MAX_ID:
            raise tokenizer_error(f"the id of {token!r} is {index!r}", source, "model.vocab")
        if token in special:
            if special[token] != index:
                raise tokenizer_error(f"{token!r} has the ids {index} and {special[token]}", source, "model.vocab")
            continue
        if index in seen or not token:
            raise tokenizer_error(f"{token!r} is empty, or its id {index} is there twice", source, "model.vocab")
        seen.add(index)
        ordinary[token] = index
    return ordinary


def _ranked_tokens(model: Mapping[str, Any], vocab: Mapping[str, int], source: str) -> list[str]:
    """List the tokens that text can encode to, in the order of their ranks (see `npllama.text.merges`)."""
    merges = _merges(model, vocab, source)
    if len(set(merges)) != len(merges):
        raise tokenizer_error("a merge is listed twice", source, "model.merges")
    ranked, wrong = rank_order(merges, vocab, bool(model.get("ignore_merges")))
    if wrong is not None:
        raise UnsupportedError(
            f"ignore_merges is set, but the merges do not make the token {wrong!r} out of its two parts",
            file=source,
            record="model.merges",
            remedy="npllama reads ignore_merges where every token can be merged, as in Llama 3.",
        )
    return [*(token for token in vocab if len(token) == 1), *ranked]


def _merges(model: Mapping[str, Any], vocab: Mapping[str, int], source: str) -> list[Pair]:
    """Read the merge list; a merge is written "left right" or ["left", "right"]."""
    merges: list[Pair] = []
    for number, merge in enumerate(member(model, "merges", list, source)):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise tokenizer_error(f"expected two tokens, found {merge!r}", source, f"model.merges[{number}]")
        left, right = parts
        for token in (left, right, left + right):
            if token not in vocab:
                raise tokenizer_error(f"{token!r} is not in the vocabulary", source, f"model.merges[{number}]")
        merges.append((left, right))
    return merges


def _preparation(normalizer: Any, lacking: list[int], pattern: str, unknown: Any, source: str) -> Prepare:
    """Combine what happens to text before it is encoded."""
    normalise = _normaliser(normalizer, source)
    if not any(byte < 0xC0 or 0xC2 <= byte < 0xF5 for byte in lacking):  # the others never occur in UTF-8
        return normalise
    if unknown or pattern not in (GPT2_PATTERN, DIGITS_GPT2_PATTERN):
        raise UnsupportedError(
            f"{len(lacking)} bytes have no token",
            file=source,
            record="model.vocab",
            remedy="Only vocabularies of GPT-2's word pattern without an unknown token may lack bytes.",
        )
    bridge = bridge_gaps(lacking)
    return lambda text: bridge(normalise(text))


def _normaliser(normalizer: Any, source: str) -> Prepare:
    match normalizer:
        case None | {"type": "Sequence", "normalizers": []}:
            return unchanged
        case {"type": "NFC"}:
            return lambda text: unicodedata.normalize("NFC", text)
    raise UnsupportedError(
        f"unknown normalizer {str(normalizer)[:200]}", file=source, remedy="npllama reads none and NFC."
    )
