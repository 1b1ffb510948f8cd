"""Generation: the prompt in chunks, then one token at a time, as a stream of records."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from npllama.cache import KVCache
from npllama.errors import ContextOverflowError, ParameterError, TokenizerError
from npllama.generation.sampling import Sampling, is_integer, log_probabilities, random_generator, sample
from npllama.generation.stop import StopStrings
from npllama.model import Model
from npllama.text.chat import dialog_prompt

#: A text, token ids, or the messages of a dialog ({"role": ..., "content": ...}).
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

PREFILL_CHUNK = 512


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
    """

    index: int
    token: int
    text: str
    logprob: float
    finish_reason: str | None = None


def generate(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    chunk: int = PREFILL_CHUNK,
    cache: KVCache | None = None,
) -> Generator[Step, None, None]:
    """Continue a prompt.

    Parameters
    ----------
    model : Model
        A loaded model.
    prompt : str, sequence of int, or sequence of messages
        A text is completed as it is; BOS comes first where the tokenizer says so and the cache is empty. Messages go
        through the chat template. Ids are taken as they are.
    max_new_tokens : int
        Most tokens to generate. Where the context ends earlier, generation ends there, with "length".
    temperature, top_k, top_p, min_p
        See `Sampling`; the default is greedy.
    seed : int, optional
        Of the random numbers; without one every run differs.
    stop : sequence of str
        Strings that end the generation as soon as they are complete; they are not part of the text.
    chunk : int
        Prompt tokens that one forward pass takes.
    cache : KVCache, optional
        What came before; the prompt is appended to it. By default a new one, as large as this call needs.

    Returns
    -------
    generator of Step
        Tokens are computed as they are asked for. After any step, or when the generator is closed or fails, the cache
        holds the prompt and every generated token but the last, which was never fed to the model.

    Raises
    ------
    ContextOverflowError
        The prompt does not fit.
    ParameterError
        A setting is out of its range, an id is outside the vocabulary, or there is nothing to start from.
    TokenizerError
        A text or a stop string is given, but the model has no tokenizer.

    Notes
    -----
    Everything is checked before this function returns, not at the first step.
    """
    settings = Sampling(temperature, top_k, top_p, min_p)
    settings.check_vocabulary(model.config.vocab_size)
    rng = random_generator(seed)
    stops = StopStrings(stop)
    if stop and model.tokenizer is None:
        raise TokenizerError("stop strings need a tokenizer, and this model has none")
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if not is_integer(value) or value < 1:
            raise ParameterError(f"{name} is {value!r}, expected an integer of 1 or more")
    ids = prompt_ids(model, prompt, start=cache is None or cache.length == 0)
    context = model.config.max_seq_len if cache is None else cache.capacity
    used = 0 if cache is None else cache.length
    if used + len(ids) > context:
        behind = f" behind {used} cached ones" if used else ""
        raise ContextOverflowError(
            f"the prompt has {len(ids)} tokens{behind}, but the context holds {context}",
            remedy="Shorten the prompt.",
        )
    count = min(max_new_tokens, context - used - len(ids) + 1)  # the last token takes no place: it is not fed
    if cache is None:
        cache = KVCache(model.config, len(ids) + count - 1)
    return _steps(model, ids, cache, count, settings, rng, stops, chunk)


def prompt_ids(model: Model, prompt: Prompt, *, start: bool = True) -> list[int]:
    """Turn a prompt into token ids.

    Parameters
    ----------
    model : Model
        Gives the tokenizer and the size of the vocabulary.
    prompt : str, sequence of int, or sequence of messages
        As for `generate`.
    start : bool
        The prompt begins a sequence: a text then gets its BOS.

    Returns
    -------
    list of int
        At least one id, all in the vocabulary.

    Raises
    ------
    ParameterError
        No ids, or one outside the vocabulary (with its index).
    TokenizerError
        A text or messages, but no tokenizer.
    """
    if isinstance(prompt, str):
        ids = _tokenizer(model).encode(prompt, bos=None if start else False)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        ids = dialog_prompt(_tokenizer(model), cast("Sequence[Mapping[str, Any]]", prompt))
    else:
        ids = list(prompt)
    if not ids:
        raise ParameterError(
            "the prompt is empty, and no BOS token stands before it", remedy="Give at least one token to start from."
        )
    for index, token in enumerate(ids):
        if not is_integer(token) or not 0 <= token < model.config.vocab_size:
            raise ParameterError(
                f"the prompt's token {token!r} at index {index} is not an id from 0 to {model.config.vocab_size - 1}"
            )
    return [int(token) for token in ids]


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        raise TokenizerError(
            "this model has no tokenizer: it takes and gives token ids only",
            remedy="Give ids, or convert the checkpoint again with its tokenizer beside it.",
        )
    return model.tokenizer


def prefill(model: Model, ids: Sequence[int], cache: KVCache, chunk: int = PREFILL_CHUNK) -> Any:
    """Feed a prompt to the model in chunks.

    Parameters
    ----------
    model : Model
        The model.
    ids : sequence of int
        The prompt, at least one token.
    cache : KVCache
        Grows by the prompt.
    chunk : int
        Tokens of one forward pass: bounds the memory that a long prompt takes.

    Returns
    -------
    ndarray of shape (1, V)
        Logits behind the last token.
    """
    logits = None
    for begin in range(0, len(ids), chunk):
        logits = model.forward(ids[begin : begin + chunk], cache, last=True)
    return logits


def _steps(
    model: Model,
    ids: Sequence[int],
    cache: KVCache,
    count: int,
    settings: Sampling,
    rng: np.random.Generator,
    stops: StopStrings,
    chunk: int,
) -> Generator[Step, None, None]:
    """Yield ``count`` steps, or fewer where something stops them."""
    text = _Text(model.tokenizer, stops)
    logits = prefill(model, ids, cache, chunk)
    for index in range(count):
        token = sample(logits[0], settings, rng)
        logprob = float(log_probabilities(logits, np.array([token]))[0])
        shown, stopped = text.feed(token)
        if stopped or index == count - 1:
            yield Step(
                index, token, shown + ("" if stopped else text.finish()), logprob, "stop" if stopped else "length"
            )
            return
        yield Step(index, token, shown, logprob)
        logits = model.forward([token], cache, last=True)


class _Text:
    """The text of a stream of tokens, up to whatever stops it."""

    def __init__(self, tokenizer: Any, stops: StopStrings) -> None:
        self._stops = stops
        self._stop_ids = frozenset() if tokenizer is None else tokenizer.stop_ids
        self._decoder = None if tokenizer is None else tokenizer.stream()

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
