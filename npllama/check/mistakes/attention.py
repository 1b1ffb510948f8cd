"""Mistakes in attention: heads, mask, scale, softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, passed_on, rounded, shown
from npllama.check.rerun import Rerun, Seen
from npllama.config import ModelConfig
from npllama.taps import Tap


def heads_tiled(run: Rerun) -> Rerun | None:
    """Let query head h read key/value head h mod K instead of h div R."""
    attention, group = run.ops.attention, run.config.n_heads // run.config.n_kv_heads

    def tiled(q: Array, keys: Array, values: Array, tap: Tap, **how: Any) -> Array:
        context: Array = attention(q, np.tile(keys, (1, group, 1)), np.tile(values, (1, group, 1)), tap, **how)
        return context

    return None if run.config.n_kv_heads in (1, run.config.n_heads) else run.with_ops(attention=tiled)


def masked(hidden: Callable[[Array, Array], Array]) -> Plant:
    """Hide from the query at position t (T, 1) the keys at positions s (S,) where ``hidden(t, s)``.

    Where the model has a window, what lies before it stays hidden.
    """

    def plant(run: Rerun) -> Rerun:
        def attention(q: Array, keys: Array, values: Array, tap: Tap, **how: Any) -> Array:
            n_new, n_all = len(q), len(keys)
            t, s = np.arange(n_all - n_new, n_all)[:, None], np.arange(n_all)
            behind = hidden(t, s)  # (T, S)
            if how["window"] is not None:
                behind |= s <= t - how["window"]

            def remask(name: str, x: Array) -> Array:
                if name == "scores":
                    x = np.where(behind, x.dtype.type(-np.inf), unmasked_scores(q, keys, how["divisor"]))
                return tap(name, x)

            context: Array = run.ops.attention(q, keys, values, remask, **how)
            return context

        return run.with_ops(attention=attention)

    return plant


def unmasked_scores(q: Array, keys: Array, divisor: float) -> Array:
    """Return ``q · keysᵀ / divisor`` for all pairs of positions: q (T, H, Dh), keys (S, K, Dh) -> (H, T, S)."""
    n_new, n_heads, head_dim = q.shape
    grouped = q.reshape(n_new, keys.shape[1], -1, head_dim).transpose(1, 2, 0, 3)  # (K, R, T, Dh)
    products: Array = grouped @ keys.transpose(1, 2, 0)[:, None]  # (K, R, T, S)
    return products.reshape(n_heads, n_new, -1) / divisor


def divided_by_root(number: Callable[[ModelConfig], int]) -> Plant:
    """Divide the scores by the square root of a number that depends on the model; no mistake when it is the model's."""

    def plant(run: Rerun) -> Rerun | None:
        own, other = run.config.score_dim or run.config.head_dim, number(run.config)
        by = math.sqrt(own / other)
        return None if own == other else shown(scores=lambda x, seen: x * by)(run)

    return plant


def softmax_in(dtype: str) -> Plant:
    """Round the scores before the softmax, and the probabilities after it."""

    def plant(run: Rerun) -> Rerun | None:
        def probs(x: Array, seen: Seen) -> Array:
            return rounded(run.ops.softmax(rounded(seen["scores"], dtype)), dtype)

        return shown(probs=probs)(run)

    return plant


def split_wrongly(x: Array, seen: Seen) -> Array:
    """Read the rows of a projection as (Dh, H) and turn them round: (T, H, Dh) -> (T, H, Dh)."""
    n_new, n_heads, head_dim = x.shape
    return np.ascontiguousarray(x.reshape(n_new, head_dim, n_heads).swapaxes(1, 2))


def merged_wrongly(x: Array, seen: Seen) -> Array:
    """Reshape the context (T, H, Dh) from (H, T, Dh) without bringing T to the front."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(x.shape)


SCORES = "layers.0.scores"

ENTRIES = (
    Mistake(
        "kv-heads-tiled",
        "The key/value heads are laid out 0 1 .. 0 1 .. for the query heads, instead of 0 0 .. 1 1 ..",
        "The scores of some heads are right and those of others are another head's.",
        "Query head h reads key/value head h // R: repeat_interleave, not tile.",
        (Way("", SCORES, heads_tiled),),
    ),
    Mistake(
        "heads-split-wrongly",
        "The rows of a projection are read as (Dh, H) instead of (H, Dh).",
        "The taps hold the right numbers in the wrong places, at every position.",
        "Reshape to (T, H, Dh); head h owns rows h * Dh to (h + 1) * Dh.",
        (
            Way("q", "layers.0.q", shown(q=split_wrongly)),
            Way("q, k and v", "layers.0.q", shown(q=split_wrongly, k=split_wrongly, v=split_wrongly)),
        ),
    ),
    Mistake(
        "heads-merged-wrongly",
        "The contexts of the heads are reshaped to rows without bringing T before H.",
        "The context is right, attention_out is not; a single decode step is perfect.",
        "Transpose (H, T, Dh) to (T, H, Dh) before the reshape.",
        (Way("", "layers.0.attention_out", passed_on(context=merged_wrongly)),),
    ),
    Mistake(
        "mask-off-by-one",
        "The causal mask is moved by one position.",
        "The scores have a finite number where -inf belongs, or the other way; decode steps are right in themselves.",
        "A query sees the keys up to and including its own position: triu with diagonal 1.",
        (
            Way("sees one token ahead", SCORES, masked(lambda t, s: s > t + 1)),
            # The first query would see nothing at all; it is left its own key, so that its numbers are finite.
            Way("does not see itself", SCORES, masked(lambda t, s: (s >= t) & ((t > 0) | (s > 0)))),
        ),
    ),
    Mistake(
        "mask-missing",
        "There is no causal mask: every token of the prompt sees all of it.",
        "The scores have no -inf; the last position is right in layer 0 and wrong from layer 1 on.",
        "Put -inf where a key lies behind its query, before the softmax.",
        (Way("", SCORES, masked(lambda t, s: np.zeros((len(t), len(s)), bool))),),
    ),
    Mistake(
        "scores-not-scaled",
        "The scores are not divided by anything.",
        "The scores are too large by a constant factor, mostly sqrt(Dh); attention is almost one-hot.",
        "Divide by sqrt(Dh), Dh being the width of one head, where the checkpoint names no other number.",
        (Way("", SCORES, divided_by_root(lambda config: 1)),),
    ),
    Mistake(
        "scores-scaled-wrongly",
        "The scores are divided by something else than the model's own number.",
        "The scores are wrong by a constant factor; attention is flat, or too sharp.",
        "Divide by sqrt(Dh), once: Dh is the width of one head. A few models divide by sqrt(D), the whole width.",
        (
            Way("by Dh", SCORES, divided_by_root(lambda config: config.head_dim**2)),
            Way("by sqrt(D)", SCORES, divided_by_root(lambda config: config.dim)),
            Way("by sqrt(Dh)", SCORES, divided_by_root(lambda config: config.head_dim)),
        ),
    ),
    Mistake(
        "softmax-in-low-precision",
        "The softmax takes and gives numbers of 16 bits in a run that is otherwise more exact.",
        "The scores are right, the probabilities are off by a thousandth of their size.",
        "Compute the softmax in float32.",
        tuple(Way(dtype, "layers.0.probs", softmax_in(dtype), rounds=dtype) for dtype in ("bfloat16", "float16")),
    ),
)
