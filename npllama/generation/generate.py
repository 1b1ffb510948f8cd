"""Generation: the prompt in chunks, then token after token, as a stream of records."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import zip_longest

import numpy as np

from npllama.cache import KVCache
from npllama.engine import Model
from npllama.generation.lookup import Lookup
from npllama.generation.plan import Plan, Settings, check_count, plan
from npllama.generation.prefill import PREFILL_CHUNK, prefill, reach
from npllama.generation.prompt import Prompt
from npllama.generation.sampling import Sampling
from npllama.generation.writer import Step


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
    lookup: int = 0,
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
    lookup : int
        Most tokens to draft at a time, 0 for none: what followed where the last tokens stood before is fed along with
        the latest token, and what the model itself would have written of it is kept. Faster where a text repeats
        itself or its prompt.
    cache : KVCache, optional
        What came before; the prompt is appended to it. By default a new one of the model's, as large as this call
        needs.

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

    Drafts change no token and no random number: at each drafted position the token is chosen from the model's own
    logits, as it would be without drafts, and the first that differs from its draft discards the rest. Where the
    logits of a position do not depend on how many are computed together (in exact arithmetic, and for up to 15 drafts
    with kernels in AVX-512 or AVX2), steps are equal to the last bit. Elsewhere logits may differ by rounding, and the
    texts where two tokens are as likely to within that: more often where inputs are rounded to int8, which enlarges it.
    """
    settings = Settings(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        stop=stop,
        chunk=chunk,
    )
    settings.check(model)
    check_count("lookup", lookup, least=0)
    return _steps(model, plan(model, prompt, settings, seed, cache), chunk, lookup)


def _steps(model: Model, asked: Plan, chunk: int, size: int) -> Generator[Step, None, None]:
    """Yield steps until the writer is done, guessing at most ``size`` tokens at a time."""
    cache, writer = asked.cache, asked.writer
    lookup = Lookup([*cache.tokens.tolist(), *asked.ids], size)
    logits = prefill(model, asked.ids, cache, chunk)
    drafts: list[int] = []
    while True:
        for row, guess in zip_longest(logits, drafts):  # one row more than drafts
            step = writer.step(row, guess)
            yield step
            if writer.remaining == 0:
                return
            lookup.add(step.token)
            if not step.drafted:
                break
            cache.advance(1)  # its keys and values were written with the draft
            cache.remember(np.array([step.token]))
        fed = cache.length + 1
        drafts = lookup.draft(min(writer.remaining - 1, reach(model, fed) - fed))
        logits = model.forward([step.token, *drafts], cache)
        cache.truncate(fed)
