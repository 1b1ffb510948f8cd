"""Twins of `npllama.ops.softmax` and `attention`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import prange

from npllama.dtypes import Array
from npllama.kernels.jit import compiled, exp

#: Taps that `attention` does not materialise: scaling, mask and softmax are one pass over the raw products.
UNMATERIALISED = frozenset({"scores", "probs"})


def softmax(scores: Array) -> Array:
    """Turn each row of scores into probabilities. See `npllama.ops.softmax`."""
    probs = np.array(scores, order="C")
    width = scores.shape[-1]
    _softmax(probs.reshape(1, -1, width), np.float32(1), 0)
    return probs


def attention(q: Array, keys: Array, values: Array, tap: Callable[[str, Array], Array]) -> Array:
    """Let each new position gather values from the positions up to its own. See `npllama.ops.attention`.

    One new position is a single compiled pass over the cache; more are two batched matrix products around a compiled
    softmax. Neither ever has the taps ``scores`` and ``probs`` to show.
    """
    n_new, n_heads, head_dim = q.shape
    n_all, n_kv_heads, _ = keys.shape
    scale = np.float32(1 / math.sqrt(head_dim))
    context = np.empty_like(q)
    if n_new == 1:
        _attend_one(q[0], keys, values, scale, context[0])
        return context
    group = n_heads // n_kv_heads
    rows = q.reshape(n_new, n_kv_heads, group, head_dim).transpose(1, 2, 0, 3).reshape(n_kv_heads, -1, head_dim)
    weights = rows @ keys.transpose(1, 2, 0)  # (K, R*T, S)
    _softmax(weights.reshape(n_heads, n_new, n_all), scale, n_new)
    gathered = weights @ values.transpose(1, 0, 2)  # (K, R*T, Dh)
    context[:] = gathered.reshape(n_heads, n_new, head_dim).transpose(1, 0, 2)
    return context


@compiled(parallel=True)
def _softmax(scores: Array, scale: np.float32, n_new: int) -> None:
    """Replace raw scores (H, T, S) by the probabilities of ``scores * scale``.

    With ``n_new`` > 0 the rows are the last ``n_new`` of S positions, and each sees the keys up to its own.
    """
    n_heads, n_rows, n_all = scores.shape
    for row in prange(n_heads * n_rows):
        h, t = row // n_rows, row % n_rows
        n_seen = n_all - n_new + t + 1 if n_new > 0 else n_all
        highest = np.float32(-np.inf)
        for s in range(n_seen):
            highest = max(highest, scores[h, t, s])
        total = np.float32(0)
        for s in range(n_seen):
            weight = exp((scores[h, t, s] - highest) * scale)
            scores[h, t, s] = weight
            total += weight
        for s in range(n_seen):
            scores[h, t, s] /= total
        for s in range(n_seen, n_all):
            scores[h, t, s] = 0


@compiled(parallel=True)
def _attend_one(q: Array, keys: Array, values: Array, scale: np.float32, context: Array) -> None:
    """Fill context (H, Dh) for one query of each head, q (H, Dh), over keys and values (S, K, Dh)."""
    n_heads, head_dim = q.shape
    n_all, n_kv_heads, _ = keys.shape
    group = n_heads // n_kv_heads
    for h in prange(n_heads):
        kv = h // group
        weights = np.empty(n_all, np.float32)
        highest = np.float32(-np.inf)
        for s in range(n_all):
            dot = np.float32(0)
            for d in range(head_dim):
                dot += q[h, d] * keys[s, kv, d]
            weights[s] = dot
            highest = max(highest, dot)
        total = np.float32(0)
        for s in range(n_all):
            weights[s] = exp((weights[s] - highest) * scale)
            total += weights[s]
        gathered = np.zeros(head_dim, np.float32)
        for s in range(n_all):
            for d in range(head_dim):
                gathered[d] += weights[s] * values[s, kv, d]
        for d in range(head_dim):
            context[h, d] = gathered[d] / total
