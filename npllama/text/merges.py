"""From a list of merges to ranks: how a byte-pair tokenizer of the Hugging Face kind becomes one of tiktoken's kind.

The two kinds differ. A merge list names *pairs*: "t" + "he" may become "the" while "th" + "e" may not. tiktoken knows
only tokens: any two neighbours whose bytes together are a token merge, in the order of that token's rank, and a whole
word that is a token is taken as it is.

Call a token *reachable* if its own bytes, alone, encode to it by the merge list. Then two things hold.

1. Suppose that somewhere in a word the neighbours A and B are about to merge into T. No merge has crossed the ends of
   their span yet (an end that is crossed never comes back), so what happened inside is exactly how T alone begins to be
   encoded. Hence if T is reachable, (A, B) is the one last pair of T alone, and it is listed; and if T is not
   reachable, no listed pair ever makes it.
2. So ranks that hold exactly the reachable tokens, each in the order of its one last pair, give every word the same
   tokens under both rules.

Tokens that are not reachable stay out of the ranks and can only be decoded.

With ``ignore_merges`` (Llama 3) every token must be in the ranks, since a whole word that is a token is taken as it is.
That is exact where the list names every pair that makes a token, and where no unreachable token could come about by
merging two neighbours that nothing else merges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

Pair = tuple[str, str]


def rank_order(merges: Sequence[Pair], tokens: Collection[str], ignore_merges: bool) -> tuple[list[str], str | None]:
    """Order the tokens of several bytes by rank.

    Parameters
    ----------
    merges : sequence of pairs
        The merge list, its earliest pair first, no pair twice.
    tokens : collection of str
        The whole vocabulary.
    ignore_merges : bool
        Whether a word that is a token is taken as it is, whatever the merges say.

    Returns
    -------
    list of str
        Tokens, the one that merges first in front.
    str or None
        A token for which tiktoken would not do what the merge list says; None when the order is exact.
    """
    order = {pair: place for place, pair in enumerate(merges)}
    if ignore_merges and _names_every_pair(merges, tokens):
        made = dict.fromkeys(left + right for left, right in merges)
    else:
        made = dict.fromkeys(reachable_tokens(merges, order))
    if not ignore_merges:
        return list(made), None
    looked_up = [token for token in tokens if len(token) > 1 and token not in made]
    wrong = (token for token in looked_up if len(encode_alone(token, order)[0]) == 2)
    return [*made, *looked_up], next(wrong, None)


def encode_alone(word: Iterable[str], order: Mapping[Pair, int]) -> tuple[list[str], int]:
    """Apply merges to a word: always the earliest listed pair of neighbours, of equals the leftmost.

    Parameters
    ----------
    word : iterable of str
        The word's symbols, usually a string, one symbol for each of its bytes.
    order : mapping of pair to int
        Pair -> its place in the merge list.

    Returns
    -------
    list of str
        The symbols that remain.
    int
        Place of the last merge; -1 without any.
    """
    parts, last = list(word), -1
    while len(parts) > 1:
        places = [order.get(pair, len(order)) for pair in pairwise(parts)]
        first = min(places)
        if first == len(order):
            break
        at, last = places.index(first), first
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts, last


def reachable_tokens(merges: Sequence[Pair], order: Mapping[Pair, int]) -> list[str]:
    """Return the tokens that merges really make, in the order of their last merges.

    Parameters
    ----------
    merges : sequence of pairs
        The merge list, its earliest pair first.
    order : mapping of pair to int
        Pair -> its place in ``merges``.

    Notes
    -----
    Where every token comes after its parts, as training leaves the list, one look at each pair decides. If a token
    that was left over turns out to be reachable all the same, the list is in no such order, and every token is encoded
    alone.
    """
    made: dict[str, int] = {}
    split: dict[str, Pair] = {}
    for place, pair in enumerate(merges):
        whole = pair[0] + pair[1]
        if whole in made or not all(len(part) == 1 or part in made for part in pair):
            continue
        if _stays_apart(pair, place, made, split, order):
            made[whole] = place
            split[whole] = pair
    wholes = {left + right for left, right in merges}
    if any(len(encode_alone(token, order)[0]) == 1 for token in wholes - made.keys()):
        alone = {token: encode_alone(token, order) for token in wholes}
        made = {token: last for token, (parts, last) in alone.items() if len(parts) == 1}
    return sorted(made, key=made.__getitem__)


def _names_every_pair(merges: Sequence[Pair], tokens: Collection[str]) -> bool:
    """Tell whether the list holds, token by token, every pair that makes a token: then it says what tiktoken does."""
    pairs = sum(
        token[:place] in tokens and token[place:] in tokens for token in tokens for place in range(1, len(token))
    )
    wholes = [left + right for left, right in merges]
    blocks = 1 + sum(before != after for before, after in pairwise(wholes)) if wholes else 0
    return pairs == len(merges) and blocks == len(set(wholes))


def _stays_apart(
    pair: Pair, place: int, made: Mapping[str, int], split: Mapping[str, Pair], order: Mapping[Pair, int]
) -> bool:
    """Tell whether nothing merges across the middle of ``pair`` before both halves are complete.

    Walks back in time: of the two symbols at the middle, the one that was made last is taken apart, which leaves the
    symbols that were there before; had those been a listed pair with an earlier place, they would have merged instead.
    """
    left, right = pair
    limit, same_place_wins = place, False
    while True:
        across = order.get((left, right))
        # At one and the same place the leftmost pair goes first, and the pair across is left of the right half's own.
        if across is not None and (across < limit or (same_place_wins and across == limit)):
            return False
        left_made, right_made = made.get(left, -1), made.get(right, -1)
        if left_made < 0 and right_made < 0:
            return True
        if left_made > right_made:
            left, limit, same_place_wins = split[left][1], left_made, False
        else:
            right, limit, same_place_wins = split[right][0], right_made, True
