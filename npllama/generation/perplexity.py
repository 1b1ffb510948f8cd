"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from npllama.engine import Model
from npllama.errors import ContextOverflowError, ParameterError
from npllama.generation.prefill import prefill
from npllama.generation.prompt import prompt_ids
from npllama.generation.sampling import is_integer, log_probabilities

DEFAULT_CONTEXT = 512
_SMALLEST_CONTEXT = 4

#: Positions whose logits exist at a time: 256 rows of a vocabulary of 128,000 are 131 MB.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a text was predicted.

    Attributes
    ----------
    perplexity : float
        ``exp(-logprob_sum / tokens)``.
    standard_error : float
        Of the perplexity: it times the standard error of the mean of the log-probabilities (the first-order error of
        the exponential), taking tokens as independent.
    logprob_sum : float
        Sum of the natural log-probabilities of the scored tokens.
    tokens : int
        How many tokens were scored.
    windows : int
        How many windows the text was read in.
    context : int
        Length of a window in tokens, BOS included.
    """

    perplexity: float
    standard_error: float
    logprob_sum: float
    tokens: int
    windows: int
    context: int


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens [begin, end) of the text, of which those from ``scored`` on are scored."""

    begin: int
    scored: int
    end: int


def perplexity(
    model: Model,
    text: str | Sequence[int],
    *,
    context: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a text.

    Parameters
    ----------
    model : Model
        A loaded model.
    text : str or sequence of int
        The text, or its token ids without BOS.
    context : int, optional
        Window length N in tokens, 4 or more; by default 512, or the model's context where that is shorter.
    progress : callable, optional
        ``progress(what, done, total)`` in tokens of the text.

    Returns
    -------
    Perplexity
        The measure and its standard error.

    Raises
    ------
    ContextOverflowError
        ``context`` exceeds the model's.
    ParameterError
        ``context`` is out of range, or fewer than two tokens can be scored.
    TokenizerError
        A text, but no tokenizer.

    Notes
    -----
    Windows of N tokens overlap by half, and each scores the tokens that the one before did not reach. Every token of
    the text is so scored exactly once (but the first, where no BOS stands before it), and each token after the first
    window is predicted from at least half a window of context. Where the tokenizer adds a BOS, every window begins
    with one: models trained with it predict badly without. Figures are comparable between runs of equal ``context``
    and tokenizer.
    """
    bos = _bos(model)
    context = min(DEFAULT_CONTEXT, model.config.max_seq_len) if context is None else context
    if not is_integer(context) or context < _SMALLEST_CONTEXT:
        raise ParameterError(f"context is {context!r}, expected an integer of {_SMALLEST_CONTEXT} or more")
    if context > model.config.max_seq_len:
        raise ContextOverflowError(
            f"a window of {context} tokens was asked for, but the model's context is {model.config.max_seq_len}"
        )
    ids = prompt_ids(model, text, start=False) if len(text) else []
    if len(ids) + len(bos) < 3:
        raise ParameterError(
            f"the text has {len(ids)} tokens: too few to measure a perplexity", remedy="Give a longer text."
        )
    model.prepare(progress)
    scores = []
    windows = list(_windows(len(ids), context - len(bos), first=1 - len(bos)))
    for window in windows:
        tokens = [*bos, *ids[window.begin : window.end]]
        scores.append(_score(model, tokens, window.scored - window.begin + len(bos)))
        if progress is not None:
            progress("Scoring", window.end, len(ids))
    return _summary(np.concatenate(scores), len(windows), context)


def _bos(model: Model) -> list[int]:
    tokenizer = model.tokenizer
    return [tokenizer.bos_id] if tokenizer is not None and tokenizer.adds_bos else []


def _windows(length: int, size: int, first: int) -> Iterator[_Window]:
    """Cover a text: windows of ``size`` half a size apart; ``first`` is the first token that can be scored."""
    begin, scored = 0, first
    while scored < length:
        end = min(begin + size, length)
        yield _Window(begin, scored, end)
        begin, scored = begin + size // 2, end


def _score(model: Model, tokens: Sequence[int], first: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Log-probabilities of tokens[first:], each given all before it; first >= 1."""
    cache = model.new_cache(len(tokens))
    fed = len(tokens) - 1  # the last one is predicted only
    prefill(model, tokens[: first - 1], cache, _CHUNK, horizon=fed)  # spares the logits of what is context only
    scores = []
    for begin in range(first - 1, fed, _CHUNK):
        end = min(begin + _CHUNK, fed)
        logits = model.forward(tokens[begin:end], cache)  # (T, V), row t predicts token begin + t + 1
        scores.append(log_probabilities(logits, np.array(tokens[begin + 1 : end + 1])))
    return np.concatenate(scores)


def _summary(scores: np.ndarray[tuple[int], np.dtype[np.float64]], windows: int, context: int) -> Perplexity:
    value = _exp(-float(scores.mean()))
    error = value * float(scores.std(ddof=1)) / math.sqrt(scores.size)
    return Perplexity(value, error, float(scores.sum()), scores.size, windows, context)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
