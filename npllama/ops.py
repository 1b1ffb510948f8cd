"""The textbook: every operation of the model in plain NumPy.

Each function computes in the float dtype of its input, so the same lines are the float32 engine and, given float64,
the truth that everything else is measured against. Weights may be stored in bfloat16; they are widened block by block,
never as a whole. Axis letters are explained in `npllama.taps`.

Read from top to bottom, this is a forward pass in the order in which `npllama.model` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from npllama.dtypes import Array, Tensor

#: Rows of a weight that are widened at a time: enough for BLAS to work well, small beside any model.
_BLOCK_BYTES = 16 << 20


def embed(tokens: NDArray[np.int64], table: Tensor, dtype: np.dtype[np.floating]) -> Array:
    """Look up the embedding of each token.

    Parameters
    ----------
    tokens : ndarray of shape (T,)
        Token ids.
    table : Tensor of shape (V, D)
        One row a token.
    dtype : numpy dtype
        float32 or float64; the rest of the forward pass follows it.

    Returns
    -------
    ndarray of shape (T, D)
    """
    return table.numbers(tokens, dtype)


def rms_norm(x: Array, weight: Tensor, eps: float) -> Array:
    """Scale each row to a root mean square of one, then each column by a learned weight.

    Parameters
    ----------
    x : ndarray of shape (T, D)
    weight : Tensor of shape (D,)
    eps : float
        Keeps a row of zeros finite.

    Returns
    -------
    ndarray of shape (T, D)

    Notes
    -----
    ``y = x / sqrt(mean(x²) + eps) * weight`` (Zhang and Sennrich, https://arxiv.org/abs/1910.07467).
    """
    mean_square = np.mean(x * x, axis=-1, keepdims=True)  # (T, 1)
    y: Array = x * (1 / np.sqrt(mean_square + eps)) * weight.numbers(to=x.dtype)
    return y


def linear(x: Array, weight: Tensor) -> Array:
    """Multiply rows by a weight matrix.

    Parameters
    ----------
    x : ndarray of shape (T, N)
    weight : Tensor of shape (M, N)
        One row for each output, as checkpoints store it.

    Returns
    -------
    ndarray of shape (T, M)

    Notes
    -----
    ``y = x · weightᵀ``.
    """
    m, n = weight.shape
    y: Array = np.empty((x.shape[0], m), x.dtype)
    if weight.data.dtype == x.dtype:
        return np.matmul(x, weight.data.T, out=y)
    rows = max(1, _BLOCK_BYTES // (n * x.itemsize))
    for start in range(0, m, rows):
        block = weight.numbers(slice(start, start + rows), x.dtype)  # (rows, N)
        y[:, start : start + rows] = x @ block.T
    return y


def linears(x: Array, weights: Sequence[Tensor]) -> tuple[Array, ...]:
    """Multiply the same rows by several weight matrices: `linear` for each.

    Parameters
    ----------
    x : ndarray of shape (T, N)
    weights : sequence of Tensor of shape (M, N)
        M may differ.

    Returns
    -------
    tuple of ndarray of shape (T, M)
    """
    return tuple(linear(x, weight) for weight in weights)


def rope_tables(freqs: NDArray[np.float32], start: int, count: int) -> tuple[Array, Array]:
    """Cosines and sines of the angles by which RoPE turns each pair at each position.

    Parameters
    ----------
    freqs : ndarray of shape (Dh/2,), float32
        Radians per position for each pair; part of the model.
    start, count : int
        First position and number of positions, T.

    Returns
    -------
    cos, sin : ndarray of shape (T, Dh/2), float32
        Always float32, as in Meta's reference: the angle is a float32 product there, and "more exact" angles would be
        those of another model (by up to 4e-3 at position 100,000). Float64 inputs use the same values.
    """
    positions = np.arange(start, start + count, dtype=np.float32)
    angles = np.outer(positions, freqs)  # (T, Dh/2)
    return np.cos(angles), np.sin(angles)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn each pair of numbers in each head by its position's angle.

    Parameters
    ----------
    x : ndarray of shape (T, H, Dh)
        Queries or keys, in interleaved pairs ``(x[2j], x[2j+1])``.
    cos, sin : ndarray of shape (T, Dh/2)
        From `rope_tables`.

    Returns
    -------
    ndarray of shape (T, H, Dh)

    Notes
    -----
    A pair is a complex number times ``exp(i * angle)``:
    ``(a + ib)(cos + i sin) = (a cos - b sin) + i (a sin + b cos)``. The product of a query and a key then depends on
    their distance alone (Su et al., https://arxiv.org/abs/2104.09864).
    """
    a, b = x[..., 0::2], x[..., 1::2]  # (T, H, Dh/2)
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, Dh/2)
    y = np.empty_like(x)
    y[..., 0::2] = a * cos - b * sin
    y[..., 1::2] = a * sin + b * cos
    return y


def softmax(scores: Array) -> Array:
    """Turn each row of scores into probabilities.

    Parameters
    ----------
    scores : ndarray of shape (..., S)
        At least one finite score in each row; -inf gives probability zero.

    Returns
    -------
    ndarray of shape (..., S)

    Notes
    -----
    ``exp(s - max(s)) / sum(exp(s - max(s)))``: subtracting the maximum changes nothing but keeps ``exp`` finite.
    """
    exps: Array = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exps /= exps.sum(axis=-1, keepdims=True)
    return exps


def attention(q: Array, keys: Array, values: Array, tap: Callable[[str, Array], Array]) -> Array:
    """Let each new position gather values from the positions up to its own.

    Parameters
    ----------
    q : ndarray of shape (T, H, Dh)
        Rotated queries of the last T of S positions.
    keys, values : ndarray of shape (S, K, Dh)
        Of all positions so far. Each of the K heads serves R = H / K query heads in a row: query head h reads
        key/value head ``h // R``. They are never repeated in memory.
    tap : callable
        Receives ``scores`` and ``probs``, (H, T, S).

    Returns
    -------
    ndarray of shape (T, H, Dh)
        The context of each head.

    Notes
    -----
    ``softmax(q · keysᵀ / sqrt(Dh) + mask) · values`` (Vaswani et al., https://arxiv.org/abs/1706.03762), grouped as in
    Ainslie et al., https://arxiv.org/abs/2305.13245. The mask is -inf where a key's position lies behind the query's.
    """
    n_new, n_heads, head_dim = q.shape
    n_all, n_kv_heads, _ = keys.shape
    group = n_heads // n_kv_heads
    # The R queries of a group stand under one another, so that a group is one matrix product with its keys.
    grouped = q.reshape(n_new, n_kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # (K, R, T, Dh)
    rows = grouped.reshape(n_kv_heads, group * n_new, head_dim)  # (K, R*T, Dh)
    scores = (rows @ keys.transpose(1, 2, 0)).reshape(n_heads, n_new, n_all)  # (H, T, S)
    scores /= math.sqrt(head_dim)
    position = np.arange(n_all - n_new, n_all)  # (T,)
    future = np.arange(n_all) > position[:, None]  # (T, S)
    scores = tap("scores", np.where(future, scores.dtype.type(-np.inf), scores))
    probs = tap("probs", softmax(scores)).reshape(n_kv_heads, group * n_new, n_all)  # (K, R*T, S)
    context = (probs @ values.transpose(1, 0, 2)).reshape(n_heads, n_new, head_dim)  # (H, T, Dh)
    return np.ascontiguousarray(context.transpose(1, 0, 2))


def silu(x: Array) -> Array:
    """Smooth gate: ``x * sigmoid(x) = x / (1 + exp(-x))``, any shape."""
    with np.errstate(over="ignore"):  # exp(-x) is inf far below zero; the quotient is then -0, as it should be
        y: Array = x / (1 + np.exp(-x))
    return y


def swiglu(gate: Array, up: Array) -> Array:
    """Gate one projection by the other.

    Parameters
    ----------
    gate, up : ndarray of shape (T, F)

    Returns
    -------
    ndarray of shape (T, F)

    Notes
    -----
    ``silu(gate) * up`` (Shazeer, https://arxiv.org/abs/2002.05202).
    """
    return silu(gate) * up
