"""Choosing the next token from the logits, with the random numbers of an explicit generator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.errors import CorruptDataError, ParameterError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the attributes.

    Attributes
    ----------
    temperature : float
        Divides the logits, 0 or more. 0 is greedy: the most probable token, the lowest id among equals; the other
        settings then have no effect.
    top_k : int
        Keep this many of the most probable tokens (the lowest ids among equals); 0 keeps all.
    top_p : float
        Of the tokens that top_k left, in order of falling probability, keep each one before which the others sum up to
        no more than this share, above 0 up to 1. The first is always kept; 1 keeps all.
    min_p : float
        Drop tokens less probable than this share of the most probable one, 0 to 1; 0 keeps all.

    Raises
    ------
    ParameterError
        A setting is outside its range, NaN, or not a number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, _is_real(self.temperature) and 0 <= self.temperature < math.inf,
                 "a finite number of 0 or more (0 is greedy)")  # fmt: skip
        _require("top_k", self.top_k, is_integer(self.top_k) and self.top_k >= 0, "an integer of 0 (off) or more")
        _require("top_p", self.top_p, _is_real(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and up to 1")
        _require("min_p", self.min_p, _is_real(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1")

    def check_vocabulary(self, size: int) -> None:
        """Raise ParameterError if top_k asks for more tokens than the ``size`` of the vocabulary."""
        _require("top_k", self.top_k, self.top_k <= size, f"at most the {size} tokens of the vocabulary")


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer, Python's or NumPy's, but not a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _require(name: str, value: Any, satisfied: Any, expected: str) -> None:
    if not satisfied:
        raise ParameterError(f"{name} is {value!r}, expected {expected}")


def random_generator(seed: int | None) -> np.random.Generator:
    """Return a random generator; ``None`` seeds it from the operating system.

    Raises
    ------
    ParameterError
        The seed is not an integer from 0 to 2**64 - 1.
    """
    _require("seed", seed, seed is None or (is_integer(seed) and 0 <= seed < 1 << 64), "an integer from 0 to 2**64 - 1")
    return np.random.default_rng(seed)


def sample(logits: NDArray[Any], settings: Sampling, rng: np.random.Generator) -> int:
    """Choose a token.

    Parameters
    ----------
    logits : ndarray of shape (V,)
        float32 or float64; -inf excludes a token.
    settings : Sampling
        Temperature and filters.
    rng : numpy.random.Generator
        One number is drawn from it, none when greedy.

    Returns
    -------
    int
        Token id.

    Raises
    ------
    CorruptDataError
        The largest logit is NaN or infinite.
    ParameterError
        top_k is larger than V.
    """
    settings.check_vocabulary(logits.size)
    if not math.isfinite(logits.max()):  # the maximum of anything with a NaN is NaN
        raise CorruptDataError(
            f"the largest of the {logits.size} logits is {float(logits.max())}, expected a finite number",
            remedy="A weight is damaged: run `npllama verify` on the model.",
        )
    if settings.temperature == 0:
        return int(np.argmax(logits))
    tokens, weights = candidates(logits, settings)
    edges = np.cumsum(weights)
    place = np.searchsorted(edges, rng.random() * edges[-1], side="right")
    return int(tokens[min(int(place), tokens.size - 1)])  # the product can round up to the last edge itself


def candidates(logits: NDArray[Any], settings: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the tokens that may be chosen and their probabilities.

    Parameters
    ----------
    logits : ndarray of shape (V,)
        As in `sample`.
    settings : Sampling
        With a temperature above 0.

    Returns
    -------
    tokens : ndarray of shape (N,), int64
        Ids in ascending order.
    weights : ndarray of shape (N,), float64
        Their probabilities, positive, summing to 1.

    Notes
    -----
    ``softmax(logits / temperature)``. The maximum is subtracted *before* the division, so that a temperature of 1e-30
    gives -inf and a probability of 0 where it would otherwise give inf - inf.
    """
    tokens = _largest(logits, settings.top_k)
    kept = logits[tokens].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((kept - kept.max()) / settings.temperature)
    weights /= weights.sum()
    keep = np.flatnonzero((weights > 0) & _nucleus(weights, settings.top_p))
    keep = keep[weights[keep] >= settings.min_p * weights[keep].max()]
    return tokens[keep], weights[keep] / weights[keep].sum()


def _largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the indices of the ``count`` largest values, ascending; the lowest among equals; all for 0."""
    if not 0 < count < values.size:
        return np.arange(values.size)
    threshold = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Mask of the tokens that top_p keeps. weights: (N,) probabilities summing to 1 -> (N,) bool."""
    if top_p == 1:
        return np.ones(weights.size, dtype=np.bool_)
    # A token below this bound and all tokens below it sum to less than 1 - top_p: those before it exceed top_p. What
    # remains to be sorted is a small part of a vocabulary of 128,000.
    bound = min((1 - top_p) / weights.size, weights.max())  # the maximum stays, however its share was rounded
    likely = np.flatnonzero(weights >= bound)
    order = likely[np.argsort(-weights[likely], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    mask = np.zeros(weights.size, dtype=np.bool_)
    mask[order[before <= top_p]] = True
    return mask


def log_probabilities(logits: NDArray[Any], tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Log-probability that the model itself gives each token: before temperature and filters.

    Parameters
    ----------
    logits : ndarray of shape (T, V)
        float32 or float64.
    tokens : ndarray of shape (T,)
        One id for each row.

    Returns
    -------
    ndarray of shape (T,), float64
        ``logits[t, tokens[t]] - log(sum(exp(logits[t])))``, natural logarithm.

    Notes
    -----
    Each row's maximum is subtracted first. The exponentials are taken in the dtype of the logits and summed in float64.
    Rows are handled one at a time: a whole (T, V) array of exponentials can be larger than the model.
    """
    values = np.empty(len(logits))
    for t, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        top = row.max()
        values[t] = float(row[token]) - float(top) - math.log(np.exp(row - top).sum(dtype=np.float64))
    return values
