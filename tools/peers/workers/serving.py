"""An engine's end of the line: one JSON object a line comes in on stdin, one answers it on stdout.

Only the standard library is used, because this runs in the interpreter of every engine.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

_SAMPLE_TOKENS, _SAMPLE_LOGITS = 16, 1000


class Engine(Protocol):
    """A model that is loaded.

    Attributes
    ----------
    version : str
        Of the engine and what it stands on.
    vocab_size : int
        V.
    weight_bytes, position_bytes : int
        What decoding a token reads of the weights, and of the cache for every position before it.
    """

    version: str
    vocab_size: int
    weight_bytes: int
    position_bytes: int

    def start(self, capacity: int) -> None:
        """Begin a text of at most so many tokens."""

    def feed(self, tokens: list[int]) -> None:
        """Run the next tokens and compute the logits behind the last; return when all is done."""

    def logits(self) -> Sequence[float]:
        """Return the logits behind the last token, (V,)."""


def serve(load: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]]) -> None:
    """Load with the settings of the command line, say what was loaded, and answer orders until stdin ends.

    Parameters
    ----------
    load : callable
        Takes the settings; returns the first message, and the function that answers an order.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.stdout = sys.stderr  # unlike stdout it keeps no line back, which whoever is killed would lose
    greeting, answer = load(json.loads(sys.argv[1]))
    print(json.dumps(greeting), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def serve_engine(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Serve an engine: orders are ``{"prompt": P, "decode": N, "seconds": S}``, answered by `measure`."""

    def loaded(settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
        engine = load(settings)
        engine.start(_SAMPLE_TOKENS)
        engine.feed(random_tokens(_SAMPLE_TOKENS, engine.vocab_size))
        greeting = {
            "version": engine.version,
            "weight_bytes": engine.weight_bytes,
            "position_bytes": engine.position_bytes,
            "logits": [float(value) for value in engine.logits()[:_SAMPLE_LOGITS]],
        }
        return greeting, lambda order: measure(engine, order["prompt"], order["decode"], order["seconds"])

    serve(loaded)


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """Return token ids, the same for every engine."""
    numbers = random.Random(0)
    return [numbers.randrange(vocab_size) for _ in range(count)]


def measure(
    engine: Engine, prompt: int, decode: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Prefill ``prompt`` tokens, then decode up to ``decode`` behind them, at most for so many seconds.

    The same passes, with two decoded tokens, run once before the clock starts: a model that has been idle may have been
    written to disk or dropped from memory meanwhile.

    Returns
    -------
    dict
        ``prefill`` and ``decode`` in tokens per second.
    """
    tokens = random_tokens(prompt + decode, engine.vocab_size)
    engine.start(prompt + decode)  # as large as the one that is timed: an engine may make a new one to grow
    for fed in (tokens[:prompt], tokens[:1], tokens[:1]):
        engine.feed(fed)
    engine.start(prompt + decode)
    begin = clock()
    engine.feed(tokens[:prompt])
    middle = end = clock()
    done = 0
    for token in tokens[prompt:]:
        engine.feed([token])
        done += 1
        end = clock()
        if end - middle >= seconds:
            break
    return {"prefill": prompt / (middle - begin), "decode": done / (end - middle)}
