r"""SentencePiece's byte-pair encoding, from nothing but pieces and their scores.

Of all neighbours that together are a piece, those with the highest score merge, of equal ones the leftmost, until no
neighbours are a piece. User-defined pieces are found first, from the left, the longest of several, and never merge.
What is no piece in the end becomes its bytes, or the unknown token, one for a run of such characters.

This is ``bpe::Model`` of the sentencepiece library (``src/bpe_model.cc``), id for id, for models that prepare text only
by writing U+2581 for spaces: Llama 1 and 2, Mistral, Phi-3, and whatever a GGUF file of the kind "llama" holds. A test
compares the two. `is_exact` tells these models from the others, which are left to the library.

Merges never cross the end of a word where no piece has U+2581 behind another character, so each word is encoded by
itself and remembered; in other models, and in a word of any length, a heap keeps the time near linear.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Iterator

from npllama.text.piece_model import SPACE, Kind, PieceModel
from npllama.text.shield import without_surrogates
from npllama.text.vocabulary import AddedSpace

_REMEMBERED_WORDS = 1 << 16
_LONGEST_REMEMBERED = 64

#: Words: spaces and what follows them up to the next space.
_WORD = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
_SPACE_INSIDE = re.compile(f"[^{SPACE}]{SPACE}")


def is_exact(model: PieceModel) -> bool:
    """Tell whether `PieceMerges` gives every text the ids that the sentencepiece library gives it.

    It does for byte-pair models that only escape spaces, and whose unused pieces cannot come about by merging: the
    library takes those apart again in a way that depends on the rest of the text.
    """
    plain = model.rules == 0 and model.escapes_spaces and not (model.removes_spaces or model.space_behind_words)
    return model.algorithm == "bpe" and plain and not any(_made_unused(model))


def _made_unused(model: PieceModel) -> Iterator[bool]:
    """Tell of each longer unused piece whether two symbols of a text could merge into it."""
    symbols = {piece.text for piece in model.pieces if piece.kind in (Kind.NORMAL, Kind.UNUSED)}
    for piece in model.pieces:
        if piece.kind is Kind.UNUSED:
            halves = ((piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text)))
            yield any(all(len(half) == 1 or half in symbols for half in pair) for pair in halves)


class PieceMerges:
    """The encoder.

    Parameters
    ----------
    model : PieceModel
        For which `is_exact` holds.
    added_space : {"none", "first", "each"}
        Where a space that is no part of the text is put.
    """

    def __init__(self, model: PieceModel, added_space: AddedSpace) -> None:
        normal = {piece.text: piece.score for piece in model.pieces if piece.kind is Kind.NORMAL}
        by_score = {score: place for place, score in enumerate(sorted(set(normal.values()), reverse=True))}
        self._order = {text: by_score[score] for text, score in normal.items()}
        found_in_text = (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
        self._ids = {piece.text: index for index, piece in enumerate(model.pieces) if piece.kind in found_in_text}
        self._bytes = [
            index for _, index in sorted((p.text, i) for i, p in enumerate(model.pieces) if p.kind is Kind.BYTE)
        ]
        self._unknown = model.unknown
        own = sorted((p.text for p in model.pieces if p.kind is Kind.USER_DEFINED), key=len, reverse=True)
        self._own = re.compile("(" + "|".join(map(re.escape, own)) + ")") if own else None
        self._by_words = not any(map(_SPACE_INSIDE.search, normal))
        self._added_space = added_space
        self._remembered = functools.lru_cache(_REMEMBERED_WORDS)(self._encode_word)

    def encode(self, text: str, *, first: bool) -> list[int]:
        """Turn ordinary text into ids; see `npllama.text.vocabulary.Encoder`."""
        if not text:
            return []
        escaped = without_surrogates(text).replace(" ", SPACE)
        if self._added_space == "each" or (self._added_space == "first" and first):
            escaped = SPACE + escaped
        ids: list[int] = []
        # Splitting at a group leaves what it matched at the odd places.
        for place, part in enumerate(self._own.split(escaped) if self._own else [escaped]):
            if place % 2:
                ids.append(self._ids[part])
            else:
                for word in _WORD.findall(part) if self._by_words else [part]:
                    ids += (self._remembered if len(word) <= _LONGEST_REMEMBERED else self._encode_word)(word)
        return ids if self._bytes else self._without_runs(ids)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for part in _merged(word, self._order):
            index = self._ids.get(part)
            if index is not None:
                ids.append(index)
            elif self._bytes:
                ids += [self._bytes[byte] for byte in part.encode()]
            else:
                ids.append(self._unknown)
        return tuple(ids)

    def _without_runs(self, ids: list[int]) -> list[int]:
        """Leave one of several unknown tokens in a row."""
        pairs = zip(ids, [None, *ids], strict=False)
        return [index for index, before in pairs if not index == before == self._unknown]


def _merged(word: str, order: dict[str, int]) -> list[str]:
    """Merge the characters of a word: the pair that comes first in the order, of equal ones the leftmost, first."""
    parts = list(word)
    end = len(parts)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    heap = [(order[pair], left, 2) for left in range(end - 1) if (pair := word[left : left + 2]) in order]
    heapq.heapify(heap)
    while heap:
        _, left, size = heapq.heappop(heap)
        right = after[left]
        # A pair is stale when one of its halves has merged with another neighbour: the two have grown, or are gone.
        if not parts[left] or right == end or len(parts[left]) + len(parts[right]) != size:
            continue
        whole = parts[left] = parts[left] + parts[right]
        parts[right] = ""
        after[left] = after[right]
        previous, following = before[left], after[left]
        if following < end:
            before[following] = left
            joined = whole + parts[following]
            if joined in order:
                heapq.heappush(heap, (order[joined], left, len(joined)))
        if previous >= 0:
            joined = parts[previous] + whole
            if joined in order:
                heapq.heappush(heap, (order[joined], previous, len(joined)))
    return [part for part in parts if part]
