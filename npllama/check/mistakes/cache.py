"""Mistakes in the cache of keys and values; a prefill alone shows none of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from npllama.check.mistakes.entry import Altered, Array, Mistake, Way, decodes, where
from npllama.check.mistakes.rope import unturned
from npllama.check.rerun import Rerun, Seen


def raw_keys_cached(run: Rerun) -> Rerun | None:
    """Keep keys as they are before RoPE; the call that makes them still reads them turned."""

    def altered(cache: Any, seen: Seen) -> Any:
        def append(layer: int, k: Array, v: Array) -> Any:
            keys, values = cache.append(layer, unturned(seen, "k"), v)
            return np.concatenate([keys[: -len(k)], k]), values

        return Altered(cache, append=append)

    return replace(run, cache=altered) if decodes(run) else None


def slot_skipped(run: Rerun) -> Rerun | None:
    """Leave the slot behind the prompt empty: zeros there are attended to, and positions are one ahead."""

    def altered(cache: Any, seen: Seen) -> Any:
        return Altered(cache, advance=lambda n: cache.advance(n + (cache.length == 0)))

    return replace(run, cache=altered) if decodes(run) and len(run.tokens) < run.config.max_seq_len else None


def newest_slot_empty(run: Rerun) -> Rerun | None:
    """Read the cache at a decode step before the new position is written."""

    def altered(cache: Any, seen: Seen) -> Any:
        def append(layer: int, k: Array, v: Array) -> Any:
            read: tuple[Array, Array] = cache.append(layer, k, v)
            if cache.length == 0:
                return read
            return tuple(np.concatenate([x[: -len(k)], np.zeros_like(k)]) for x in read)

        return Altered(cache, append=append)

    return replace(run, cache=altered) if decodes(run) else None


ENTRIES = (
    Mistake(
        "keys-cached-before-rope",
        "The cache keeps keys as they are before RoPE.",
        "The prefill is perfect; at the first decode step q_rope and k_rope are right and the scores differ.",
        "Write the turned keys into the cache.",
        (Way("", "layers.0.scores", where("rope", raw_keys_cached), step=1),),
    ),
    Mistake(
        "cache-hole",
        "A slot of the cache that is attended to was never written.",
        "The prefill is perfect; at decode some query attends to a key of zeros, and takes a value of zeros.",
        "Write decode step n at the number of positions cached so far, before attention reads.",
        (
            Way("slot behind the prompt skipped", "layers.0.q_rope", where("rope", slot_skipped), step=1),
            Way("row of the positions skipped, too", "pos_embeddings", where("learned", slot_skipped), step=1),
            Way("newest slot read before it is written", "layers.0.scores", newest_slot_empty, step=1),
        ),
    ),
)
