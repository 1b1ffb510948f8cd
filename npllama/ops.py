"""The textbook: every operation of the model in plain NumPy.

Each function computes in the float dtype of its input, so the same lines are the float32 engine and, given float64,
the truth that everything else is measured against. Weights may be stored in bfloat16; they are widened block by block,
never as a whole. Axis letters are explained in `npllama.taps`.

Read from top to bottom, this is a forward pass in the order in which `npllama.model` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from npllama.dtypes import Array, Tensor
from npllama.rounding import rounded, softmax_of_rounded

#: Rows of a weight that are widened at a time: enough for BLAS to work well, small beside any model.
_BLOCK_BYTES = 16 << 20


def embed(tokens: NDArray[np.int64], table: Tensor, dtype: np.dtype[np.floating]) -> Array:
    """Look up the embedding of each token, or of each position.

    Parameters
    ----------
    tokens : ndarray of shape (T,)
        Token ids, or positions.
    table : Tensor of shape (V, D)
        One row a token, or a position.
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


def layer_norm(x: Array, weight: Tensor, bias: Tensor, eps: float) -> Array:
    """Shift each row to a mean of zero, scale it to a variance of one, then scale and shift each column.

    Parameters
    ----------
    x : ndarray of shape (T, D)
    weight, bias : Tensor of shape (D,)
    eps : float
        Keeps a row of equal numbers finite.

    Returns
    -------
    ndarray of shape (T, D)

    Notes
    -----
    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` (Ba et al., https://arxiv.org/abs/1607.06450).
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)  # (T, 1)
    y: Array = centred * (1 / np.sqrt(variance + eps)) * weight.numbers(to=x.dtype) + bias.numbers(to=x.dtype)
    return y


def linear(x: Array, weight: Tensor, bias: Tensor | None = None) -> Array:
    """Multiply rows by a weight matrix.

    Parameters
    ----------
    x : ndarray of shape (T, N)
    weight : Tensor of shape (M, N)
        One row for each output, as checkpoints store it.
    bias : Tensor of shape (M,), optional
        Added to every row, in the families that have one.

    Returns
    -------
    ndarray of shape (T, M)

    Notes
    -----
    ``y = x · weightᵀ + bias``.
    """
    m, n = weight.shape
    y: Array = np.empty((x.shape[0], m), x.dtype)
    if weight.data.dtype == x.dtype:
        np.matmul(x, weight.data.T, out=y)
    else:
        rows = max(1, _BLOCK_BYTES // (n * x.itemsize))
        for start in range(0, m, rows):
            block = weight.numbers(slice(start, start + rows), x.dtype)  # (rows, N)
            y[:, start : start + rows] = x @ block.T
    if bias is not None:
        y += bias.numbers(to=x.dtype)
    return y


def linears(x: Array, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> tuple[Array, ...]:
    """Multiply the same rows by several weight matrices: `linear` for each.

    Parameters
    ----------
    x : ndarray of shape (T, N)
    weights : sequence of Tensor of shape (M, N)
        M may differ.
    biases : sequence of Tensor of shape (M,) or None
        One for each matrix; empty where none has one.

    Returns
    -------
    tuple of ndarray of shape (T, M)
    """
    return tuple(linear(x, weight, bias) for weight, bias in zip_longest(weights, biases))


def rope_tables(freqs: NDArray[np.float32], start: int, count: int, scale: float = 1.0) -> tuple[Array, Array]:
    """Cosines and sines of the angles by which RoPE turns each pair at each position.

    Parameters
    ----------
    freqs : ndarray of shape (Dh/2,), float32
        Radians per position for each pair; part of the model.
    start, count : int
        First position and number of positions, T.
    scale : float
        Multiplies both; not 1 in models whose context was stretched by longrope alone.

    Returns
    -------
    cos, sin : ndarray of shape (T, Dh/2), float32
        Always float32, as in Meta's reference: the angle is a float32 product there, and "more exact" angles would be
        those of another model (by up to 4e-3 at position 100,000). Float64 inputs use the same values.
    """
    positions = np.arange(start, start + count, dtype=np.float32)
    angles = np.outer(positions, freqs)  # (T, Dh/2)
    factor = np.float32(scale)
    return np.cos(angles) * factor, np.sin(angles) * factor


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


def attention(
    q: Array,
    keys: Array,
    values: Array,
    tap: Callable[[str, Array], Array],
    *,
    divisor: float | None = None,
    window: int | None = None,
) -> Array:
    """Let each new position gather values from the positions up to its own.

    Parameters
    ----------
    q : ndarray of shape (T, H, Dh)
        Queries of the last T of S positions, rotated where positions are told by RoPE.
    keys, values : ndarray of shape (S, K, Dh)
        Of all positions so far. Each of the K heads serves R = H / K query heads in a row: query head h reads
        key/value head ``h // R``. They are never repeated in memory. Where they are bfloat16, what they are multiplied
        with is rounded to it, see `npllama.rounding`.
    tap : callable
        Receives ``scores`` and ``probs``, (H, T, S).
    divisor : float, optional
        What the scores are divided by; by default ``sqrt(Dh)``.
    window : int, optional
        How many positions a query sees, its own included; by default all of them.

    Returns
    -------
    ndarray of shape (T, H, Dh)
        The context of each head.

    Notes
    -----
    ``softmax(q · keysᵀ / sqrt(Dh) + mask) · values`` (Vaswani et al., https://arxiv.org/abs/1706.03762), grouped as in
    Ainslie et al., https://arxiv.org/abs/2305.13245. The mask is -inf where a key's position lies behind the query's,
    or ``window`` positions or more before it (Beltagy et al., https://arxiv.org/abs/2004.05150).
    """
    n_new, n_heads, head_dim = q.shape
    n_all, n_kv_heads, _ = keys.shape
    group = n_heads // n_kv_heads
    is_rounded = keys.dtype.name == values.dtype.name == "bfloat16"
    if is_rounded:
        q = rounded(q)
    # The R queries of a group stand under one another, so that a group is one matrix product with its keys.
    grouped = q.reshape(n_new, n_kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # (K, R, T, Dh)
    rows = grouped.reshape(n_kv_heads, group * n_new, head_dim)  # (K, R*T, Dh)
    scores = (rows @ keys.transpose(1, 2, 0)).reshape(n_heads, n_new, n_all)  # (H, T, S)
    scores /= math.sqrt(head_dim) if divisor is None else divisor
    ahead = np.arange(n_all) - np.arange(n_all - n_new, n_all)[:, None]  # (T, S) key's position minus query's
    hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
    scores = tap("scores", np.where(hidden, scores.dtype.type(-np.inf), scores))
    probs = tap("probs", softmax_of_rounded(scores) if is_rounded else softmax(scores))
    probs = probs.reshape(n_kv_heads, group * n_new, n_all)  # (K, R*T, S)
    context = (probs @ values.transpose(1, 0, 2)).reshape(n_heads, n_new, head_dim)  # (H, T, Dh)
    return np.ascontiguousarray(context.transpose(1, 0, 2))


def attentions(
    q: Array,
    counts: Sequence[int],
    caches: Sequence[tuple[Array, Array]],
    *,
    divisor: float | None = None,
    window: int | None = None,
) -> Array:
    """Do `attention` to several sequences laid end to end.

    Parameters
    ----------
    q : ndarray of shape (T, H, Dh)
        Queries: those of the first sequence, then those of the second ...
    counts : sequence of int
        How many belong to each.
    caches : sequence of (keys, values)
        Of each sequence, ndarrays of shape (S, K, Dh), where S may differ.
    divisor, window
        As for `attention`.

    Returns
    -------
    ndarray of shape (T, H, Dh)
    """
    contexts, start = [], 0
    for count, (keys, values) in zip(counts, caches, strict=True):
        part = q[start : start + count]
        contexts.append(attention(part, keys, values, lambda name, x: x, divisor=divisor, window=window))
        start += count
    return np.concatenate(contexts)


def silu(x: Array) -> Array:
    """Smooth gate: ``x * sigmoid(x) = x / (1 + exp(-x))``, any shape."""
    with np.errstate(over="ignore"):  # exp(-x) is inf far below zero; the quotient is then -0, as it should be
        y: Array = x / (1 + np.exp(-x))
    return y


def sigmoid(x: Array) -> Array:
    """Squeeze numbers between 0 and 1: ``1 / (1 + exp(-x))``, any shape."""
    with np.errstate(over="ignore"):
        y: Array = 1 / (1 + np.exp(-x))
    return y


def relu(x: Array) -> Array:
    """Cut off what is negative: ``max(x, 0)``, any shape."""
    y: Array = np.maximum(x, x.dtype.type(0))
    return y


def gelu(x: Array) -> Array:
    """Multiply by the share of the normal distribution below: ``x Φ(x) = x (1 + erf(x / sqrt(2))) / 2``, any shape.

    Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415.
    """
    scaled = x / math.sqrt(2)
    erf = np.fromiter(map(math.erf, scaled.ravel().tolist()), x.dtype, x.size).reshape(x.shape)  # NumPy has none
    y: Array = x * (1 + erf) / 2
    return y


def gelu_tanh(x: Array) -> Array:
    """Approximate `gelu` without the integral: ``x (1 + tanh(sqrt(2 / π) (x + 0.044715 x³))) / 2``, any shape."""
    y: Array = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2
    return y


#: Name in a configuration -> function of numbers of any shape.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": silu, "relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def activate(x: Array, activation: str) -> Array:
    """Apply one of the `ACTIVATIONS` to numbers of any shape."""
    return ACTIVATIONS[activation](x)


def glu(gate: Array, up: Array, activation: str) -> Array:
    """Gate one projection by the other.

    Parameters
    ----------
    gate, up : ndarray of shape (T, F)
    activation : str
        One of `ACTIVATIONS`; Llama's is "silu", which makes this SwiGLU.

    Returns
    -------
    ndarray of shape (T, F)

    Notes
    -----
    ``activation(gate) * up`` (Shazeer, https://arxiv.org/abs/2002.05202).
    """
    return activate(gate, activation) * up


def add(x: Array, y: Array) -> Array:
    """Add what a step computed to the residual stream: x, y (T, D) -> (T, D)."""
    return x + y


def route(probs: Array, n_active: int, renormalise: bool) -> Array:
    """Keep the most probable experts of each token.

    Parameters
    ----------
    probs : ndarray of shape (T, E)
        Softmax of the router's logits over all experts.
    n_active : int
        A, experts to keep; among equals those of the lowest numbers.
    renormalise : bool
        Scale what is kept to a sum of one.

    Returns
    -------
    ndarray of shape (T, E)
        Weight of each expert's answer; zero for the experts that are not asked.

    Notes
    -----
    Shazeer et al., https://arxiv.org/abs/1701.06538.
    """
    kept = np.zeros_like(probs)
    best = np.argsort(-probs, axis=-1, kind="stable")[:, :n_active]  # (T, A)
    np.put_along_axis(kept, best, np.take_along_axis(probs, best, -1), -1)
    if renormalise:
        kept /= kept.sum(axis=-1, keepdims=True)
    return kept


def chosen_experts(weights: Array, n_active: int) -> NDArray[np.int64]:
    """Return the numbers of the A experts with the largest weights (T, E), in ascending order: (T, A)."""
    return np.sort(np.argsort(-weights, axis=-1, kind="stable")[:, :n_active], axis=-1)


def expert_linear(x: Array, chosen: NDArray[np.int64], stack: Tensor, n_experts: int) -> Array:
    """Multiply each row by the matrix of its own expert.

    Parameters
    ----------
    x : ndarray of shape (T, A, N)
        For each token, a row for each of its experts.
    chosen : ndarray of shape (T, A)
        Numbers of these experts.
    stack : Tensor of shape (E*M, N)
        The experts' matrices under one another. Only those of chosen experts are read.
    n_experts : int
        E.

    Returns
    -------
    ndarray of shape (T, A, M)

    Notes
    -----
    ``y[t, a] = x[t, a] · stack[chosen[t, a]]ᵀ``.
    """
    m = stack.shape[0] // n_experts
    y: Array = np.empty((*x.shape[:2], m), x.dtype)
    for expert in np.unique(chosen):
        mine = chosen == expert  # (T, A)
        y[mine] = linear(x[mine], stack.rows(expert * m, (expert + 1) * m))
    return y


def gated_linears(x: Array, gate: Tensor, up: Tensor, biases: Sequence[Tensor | None], activation: str) -> None:
    """Do `linears` and `glu` as one operation: not here, the textbook does one after the other."""


def through_layers(weights: object, config: object) -> None:
    """Return what runs all layers of a model as one operation: nothing here, the textbook goes layer by layer."""
