"""Hugging Face's ``tokenizer.json`` with byte-level byte-pair encoding, turned into a vocabulary for tiktoken."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from npllama.errors import UnsupportedError
from npllama.text.gaps import bridge_gaps
from npllama.text.json_files import member, parse_object, tokenizer_error
from npllama.text.merges import Pair, rank_order
from npllama.text.pretokenize import DIGITS_GPT2_PATTERN, GPT2_PATTERN, word_pattern
from npllama.text.vocabulary import RunLimits, Vocabulary, unchanged

#: More than any tokenizer has; an id beyond would only cost memory.
MAX_ID = 1 << 24

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
        Another model type, normalizer, pre-tokenizer or post-processor than the byte-level ones; named in the message.
    TokenizerError
        The file contradicts itself.
    """
    document = parse_object(data, source)
    model = member(document, "model", dict, source)
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(
            f"a tokenizer of the type {model.get('type')!r}, expected BPE",
            file=source,
            remedy="npllama reads byte-level byte-pair tokenizers.",
        )
    for key, allowed in _PLAIN.items():
        if model.get(key) not in allowed:
            raise UnsupportedError(
                f"{key} is {model[key]!r}, expected {allowed[0]!r}",
                file=source,
                record="model",
                remedy="npllama reads byte-level byte-pair tokenizers.",
            )
    pattern = word_pattern(document.get("pre_tokenizer"), source)
    special = _added_tokens(document, source)
    vocab = _ordinary(member(model, "vocab", dict, source), special, source)
    ranked = _ranked_tokens(model, vocab, source)
    alphabet = byte_alphabet()
    tokens = {index: _bytes(token, alphabet, source) for token, index in vocab.items()}
    lacking = [byte for character, byte in alphabet.items() if character not in vocab]
    singles = [bytes([byte]) for byte in lacking]
    order = [*singles, *(tokens[vocab[token]] for token in ranked)]
    bos = _leading_token(document.get("post_processor"), source)
    if bos is not None and bos not in special:
        raise tokenizer_error(f"the token {bos!r} begins every text, but is not among added_tokens", source)
    return Vocabulary(
        pattern=pattern,
        ranks={token: rank for rank, token in enumerate(order)},
        ids=[-1] * len(lacking) + [vocab[token] for token in ranked],
        tokens=tokens,
        special=special,
        limits=_LIMITS,
        prepare=_preparation(document.get("normalizer"), lacking, pattern, model.get("unk_token"), source),
        bos=None if bos is None else special[bos],
        adds_bos=bos is not None,
    )


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


def _added_tokens(document: Mapping[str, Any], source: str) -> dict[str, int]:
    """Read the tokens that are recognised as a whole, text -> id."""
    found: dict[str, int] = {}
    ids: set[int] = set()
    for number, entry in enumerate(document.get("added_tokens") or []):
        record = f"added_tokens[{number}]"
        if not isinstance(entry, dict):
            raise tokenizer_error(f"expected an object, found {type(entry).__name__}", source, record)
        text, index = member(entry, "content", str, source), member(entry, "id", int, source)
        if not text or text in found or index in ids or not 0 <= index < MAX_ID:
            raise tokenizer_error(f"the token {text!r} with id {index} is empty, out of range or there twice", source)
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)]
        if flags:
            raise UnsupportedError(
                f"the token {text!r} has {flags[0]} set",
                file=source,
                record=record,
                remedy="npllama recognises added tokens exactly as they are spelled.",
            )
        found[text] = index
        ids.add(index)
    return found


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


def _leading_token(processor: Any, source: str) -> str | None:
    """Return the special token that a post-processor puts before every text, if any."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return None
        case {"type": "Sequence", "processors": list() as steps}:
            leading = [token for step in steps if (token := _leading_token(step, source)) is not None]
            if len(leading) <= 1:
                return leading[0] if leading else None
        case {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return None
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str() as token}}, {"Sequence": _}]}:
            return token
    raise UnsupportedError(
        f"unknown post_processor {str(processor)[:300]}",
        file=source,
        remedy="npllama reads those that put at most one token before the text and nothing after it.",
    )
