"""Merge lists turned into ranks: tiktoken must give what the Hugging Face library gives, whatever the list."""

from __future__ import annotations

import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.text.merges import Pair, encode_alone, rank_order, reachable_tokens
from tests.text.samples import tokenizer_document

tokenizers = pytest.importorskip("tokenizers")


@st.composite
def merge_lists(draw: st.DrawFn, ordered: bool) -> list[Pair]:
    """Draw merges over three letters; ``ordered``: each part is a letter or was made before, as training has it."""
    known = ["a", "b", "c"]
    merges: list[Pair] = []
    for _ in range(draw(st.integers(1, 14))):
        pair = (draw(st.sampled_from(known)), draw(st.sampled_from(known)))
        if pair not in merges and len(pair[0] + pair[1]) <= 8:
            merges.append(pair)
            known.append(pair[0] + pair[1])
    return merges if ordered else draw(st.permutations(merges))


words = st.text("abc", min_size=1, max_size=24)


def place(merges: list[Pair]) -> dict[Pair, int]:
    return {pair: number for number, pair in enumerate(merges)}


def by_tiktoken(merges: list[Pair], ignore_merges: bool) -> tuple[tiktoken.Encoding, str | None]:
    tokens = {"a", "b", "c", *(left + right for left, right in merges)}
    order, wrong = rank_order(merges, tokens, ignore_merges)
    ranks = {token.encode(): rank for rank, token in enumerate(["a", "b", "c", *order])}
    return tiktoken.Encoding("t", pat_str=r"\w+", mergeable_ranks=ranks, special_tokens={}), wrong


def by_tokenizers(merges: list[Pair], ignore_merges: bool) -> object:
    document = tokenizer_document(merges, ignore_merges=ignore_merges)
    return tokenizers.Tokenizer.from_str(json.dumps(document))


@settings(max_examples=400)
@given(merge_lists(ordered=True), st.lists(words, min_size=1, max_size=5))
def test_trained_lists_give_the_tokens_of_the_merge_list(merges: list[Pair], texts: list[str]) -> None:
    encoding, _ = by_tiktoken(merges, False)
    reference = by_tokenizers(merges, False)
    for text in texts:
        expected = reference.encode(text).tokens  # type: ignore[attr-defined]
        assert [encoding.decode([rank]) for rank in encoding.encode_ordinary(text)] == expected


@settings(max_examples=400)
@given(merge_lists(ordered=False), st.lists(words, min_size=1, max_size=5))
def test_lists_in_any_order_give_the_tokens_of_the_merge_list(merges: list[Pair], texts: list[str]) -> None:
    encoding, _ = by_tiktoken(merges, False)
    reference = by_tokenizers(merges, False)
    for text in texts:
        expected = reference.encode(text).tokens  # type: ignore[attr-defined]
        assert [encoding.decode([rank]) for rank in encoding.encode_ordinary(text)] == expected


@settings(max_examples=400)
@given(merge_lists(ordered=False), st.lists(words, min_size=1, max_size=5))
def test_with_ignore_merges_the_tokens_are_exact_or_the_list_is_reported(merges: list[Pair], texts: list[str]) -> None:
    encoding, wrong = by_tiktoken(merges, True)
    if wrong is not None:
        return
    reference = by_tokenizers(merges, True)
    for text in texts:
        expected = reference.encode(text).tokens  # type: ignore[attr-defined]
        assert [encoding.decode([rank]) for rank in encoding.encode_ordinary(text)] == expected


@settings(max_examples=300)
@given(merge_lists(ordered=True))
def test_the_quick_look_finds_exactly_the_tokens_that_encode_to_themselves(merges: list[Pair]) -> None:
    order = place(merges)
    alone = {left + right: encode_alone(left + right, order) for left, right in merges}
    expected = {token: last for token, (parts, last) in alone.items() if parts == [token]}
    assert reachable_tokens(merges, order) == sorted(expected, key=expected.__getitem__)


def test_a_pair_that_is_not_listed_does_not_merge() -> None:
    # "abc" is made as a + bc; in "ab" + "c" nothing may merge, though the bytes are those of a token.
    merges = [("b", "c"), ("a", "bc"), ("a", "b")]
    assert encode_alone("abc", place(merges)) == (["abc"], 1)
    merges = [("a", "b"), ("b", "c"), ("a", "bc")]
    assert encode_alone("abc", place(merges)) == (["ab", "c"], 0)
    assert reachable_tokens(merges, place(merges)) == ["ab", "bc"]


def test_of_equal_pairs_the_leftmost_merges_first() -> None:
    merges = [("a", "a"), ("b", "a"), ("ba", "aa")]
    assert encode_alone("baaa", place(merges)) == (["b", "aa", "a"], 0)
    assert reachable_tokens(merges, place(merges)) == ["aa", "ba"]


def test_a_list_that_names_every_pair_needs_no_order() -> None:
    # What transformers writes for tiktoken's ranks: here a part comes after the whole.
    merges = [("ab", "c"), ("a", "bc"), ("a", "b"), ("b", "c")]
    order, wrong = rank_order(merges, {"a", "b", "c", "abc", "ab", "bc"}, ignore_merges=True)
    assert (order, wrong) == (["abc", "ab", "bc"], None)


def test_a_looked_up_token_that_would_also_merge_is_reported() -> None:
    assert rank_order([("a", "b")], {"a", "b", "c", "ab", "abc"}, ignore_merges=True)[1] == "abc"
    assert rank_order([("a", "b")], {"a", "b", "c", "ab", "abc"}, ignore_merges=False) == (["ab"], None)
