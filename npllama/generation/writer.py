"""From the logits of one sequence to its tokens and their text, as a stream of records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.generation.sampling import Sampling, log_probabilities, sample
from npllama.generation.stop import StopStrings


@dataclass(frozen=True, slots=True)
class Step:
    """One generated token.

    Attributes
    ----------
    index : int
        0 for the first generated token.
    token : int
        Its id.
    text : str
        What can be shown now. Empty while a character is incomplete, while the text may turn out to be a stop string,
        for a stop token, and for a model without a tokenizer; the last step brings all that was held back.
    logprob : float
        Natural logarithm of the probability that the model gave the token, before temperature and filters.
    finish_reason : str or None
        In the last step "stop" (a stop token or stop string) or "length" (the number of tokens, or the context, ran
        out); None before.
    drafted : bool
        The token had been guessed, and came out of the same forward pass as the one before it. Steps that differ in
        this alone are equal.
    """

    index: int
    token: int
    text: str
    logprob: float
    finish_reason: str | None = None
    drafted: bool = field(default=False, compare=False)


class Writer:
    """Chooses one token after the other, and turns them into text.

    Parameters
    ----------
    tokenizer : Tokenizer or None
        None writes no text.
    prompt : sequence of int
        Ids that the text goes on behind.
    count : int
        Most tokens to choose.
    sampling : Sampling
        How to choose.
    rng : numpy.random.Generator
        One number is drawn from it for each token, none when greedy.
    stops : StopStrings
        What ends the text, beside the stop tokens of the tokenizer.

    Attributes
    ----------
    remaining : int
        Tokens that may still come: 0 at the end, whatever the reason.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        count: int,
        sampling: Sampling,
        rng: np.random.Generator,
        stops: StopStrings,
    ) -> None:
        self.remaining = count
        self._index = 0
        self._sampling = sampling
        self._rng = rng
        self._text = _Text(tokenizer, stops, prompt)

    def step(self, logits: NDArray[Any], guess: int | None = None) -> Step:
        """Choose the next token from its logits (V,), and tell whether it is the one that was guessed."""
        token = sample(logits, self._sampling, self._rng)
        logprob = float(log_probabilities(logits[None], np.array([token]))[0])
        text, stopped = self._text.feed(token)
        index, self._index = self._index, self._index + 1
        self.remaining = 0 if stopped else self.remaining - 1
        reason = None
        if stopped:
            reason = "stop"
        elif self.remaining == 0:
            reason = "length"
            text += self._text.finish()
        return Step(index, token, text, logprob, reason, drafted=token == guess)


class _Text:
    """The text of a stream of tokens behind a prompt, up to whatever stops it."""

    def __init__(self, tokenizer: Any, stops: StopStrings, prompt: Sequence[int]) -> None:
        self._stops = stops
        self._stop_ids = frozenset() if tokenizer is None else tokenizer.stop_ids
        self._decoder = None if tokenizer is None else tokenizer.stream(after=prompt)

    def feed(self, token: int) -> tuple[str, bool]:
        """Take a token; return what can be shown, and whether the text ends here."""
        if self._decoder is None:
            return "", False
        if token in self._stop_ids:
            return self.finish(), True
        return self._stops.feed(self._decoder.feed(token))

    def finish(self) -> str:
        """Return what was held back."""
        if self._decoder is None:
            return ""
        shown, stopped = self._stops.feed(self._decoder.finish())
        return shown if stopped else shown + self._stops.finish()
