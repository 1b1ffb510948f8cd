"""What a difference does to the next token: distributions, not tensors."""

from __future__ import annotations

import numpy as np

from npllama.check.report import LogitsSummary
from npllama.check.trace import TraceLike
from npllama.dtypes import Array

_TOP_K = 10
_ROWS = 16  # of the vocabulary's width, widened at a time


def summarise(candidate: TraceLike, reference: TraceLike, steps: list[int]) -> LogitsSummary | None:
    """Compare the distributions of the next token at every position.

    Parameters
    ----------
    candidate, reference : TraceLike
        With finite ``logits`` (T, V) of equal shapes at these steps.
    steps : list of int
        Steps to look at.

    Returns
    -------
    LogitsSummary or None
        None without steps.
    """
    kl: list[float] = []
    overlap: list[float] = []
    margins: list[float] = []
    flips: list[int] = []
    for step in steps:
        mine, theirs = candidate.read("logits", step), reference.read("logits", step)
        for start in range(0, len(theirs), _ROWS):
            a, b = (x[start : start + _ROWS].astype(np.float64) for x in (mine, theirs))
            kl += _divergence(b, a).tolist()
            overlap += _overlap(a, b, min(_TOP_K, a.shape[1]))
            margins += _margins(b).tolist()
            flips += (a.argmax(1) != b.argmax(1)).tolist()
    if not kl:
        return None
    first = next((i for i, flip in enumerate(flips) if flip), None)
    return LogitsSummary(
        positions=len(kl),
        same_top1=len(flips) - sum(flips),
        top_k=_TOP_K,
        overlap=float(np.mean(overlap)),
        kl_mean=float(np.mean(kl)),
        kl_max=max(kl),
        least_margin=min(margins),
        first_flip=first,
        flip_margin=None if first is None else margins[first],
    )


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _divergence(reference: Array, candidate: Array) -> Array:
    """KL(reference || candidate) of each row, in nats; rounding cannot make it negative."""
    p, q = _log_softmax(reference), _log_softmax(candidate)
    result: Array = np.maximum((np.exp(p) * (p - q)).sum(1), 0.0)
    return result


def _overlap(a: Array, b: Array, k: int) -> list[float]:
    best = [np.argpartition(-x, k - 1, axis=1)[:, :k] for x in (a, b)]
    return [len(np.intersect1d(x, y)) / k for x, y in zip(*best, strict=True)]


def _margins(x: Array) -> Array:
    if x.shape[1] < 2:
        return np.full(len(x), np.inf)
    top = np.partition(x, -2, axis=1)[:, -2:]
    result: Array = top[:, 1] - top[:, 0]
    return result
