"""Mistakes in splitting projections that a checkpoint keeps in one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, where
from npllama.check.mistakes.rope import to_halves, to_pairs
from npllama.check.rerun import Rerun
from npllama.config import ModelConfig
from npllama.dtypes import Tensor

Places = NDArray[np.int64]


def one_after_another(order: str) -> Callable[[ModelConfig], list[Places]]:
    """Find queries, keys and values where they would be if they stood in another order, such as "k q v"."""

    def places(config: ModelConfig) -> list[Places]:
        size = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
        found, start = {}, 0
        for name in order.split():
            found[name] = np.arange(start, start + size[name] * config.head_dim)
            start += size[name] * config.head_dim
        return [found[name] for name in "qkv"]

    return places


def by_groups(config: ModelConfig) -> list[Places]:
    """Find them where they would be if each key/value head stood behind the R query heads that read it."""
    group = config.n_heads // config.n_kv_heads
    rows = np.arange((config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
    heads = rows.reshape(config.n_kv_heads, group + 2, config.head_dim)
    return [heads[:, :group].ravel(), heads[:, group].ravel(), heads[:, group + 1].ravel()]


def split_in(find: Callable[[ModelConfig], list[Places]]) -> Plant:
    """Take queries, keys and values from other rows of their fused matrix; no mistake where these are the same.

    Fused matrices have the rows of a head in halves, and are brought into pairs once they are split.
    """

    def plant(run: Rerun) -> Rerun | None:
        config, linears, places = run.config, run.ops.linears, find(run.config)
        rope = config.positions == "rope"

        def in_heads(x: Array, order: Callable[[Array], Array]) -> Array:
            return order(x.reshape(len(x), -1, config.head_dim)).reshape(len(x), -1) if rope else x

        def split(x: Array, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Sequence[Array]:
            parts: Sequence[Array] = linears(x, weights, biases)
            if len(parts) != len(places):  # those of gate and up
                return parts
            q, k, v = parts
            fused = np.concatenate([in_heads(q, to_halves), in_heads(k, to_halves), v], axis=1)
            q, k, v = (fused[:, columns] for columns in places)
            return in_heads(q, to_pairs), in_heads(k, to_pairs), v

        right = np.array_equal(np.concatenate(places), np.arange(sum(map(len, places))))
        return None if right else run.with_ops(linears=split)

    return plant


def alternating(run: Rerun) -> Rerun:
    """Take even rows of a fused matrix for those of gate, and odd ones for those of up."""
    linears = run.ops.linears

    def split(x: Array, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Sequence[Array]:
        parts: Sequence[Array] = linears(x, weights, biases)
        if len(parts) != 2:
            return parts
        fused = np.concatenate(parts, axis=1)
        return np.ascontiguousarray(fused[:, 0::2]), np.ascontiguousarray(fused[:, 1::2])

    return run.with_ops(linears=split)


QUERIES = "layers.0.q"

ENTRIES = (
    Mistake(
        "qkv-split-order",
        "The fused matrix of queries, keys and values is split in another order than its rows have.",
        "q, k and v hold rows of one another, at every position.",
        "All queries come first, then all keys, then all values; some families have them by groups of heads.",
        (
            *(
                Way(order, QUERIES, split_in(one_after_another(order)))
                for order in ("k q v", "k v q", "v q k", "v k q")
            ),
            # Without RoPE, keys and values that are exchanged are k-v-swapped.
            Way("q v k", "layers.0.k", where("rope", split_in(one_after_another("q v k")))),
            Way("by key/value heads", QUERIES, split_in(by_groups)),
        ),
    ),
    Mistake(
        "gate-up-alternating",
        "The fused matrix of gate and up is split into even and odd rows instead of halves.",
        "gate and up hold numbers of each other, in the wrong places.",
        "The rows of gate come first, then those of up.",
        (Way("", "layers.0.gate", where("dense gated", alternating)),),
    ),
)
