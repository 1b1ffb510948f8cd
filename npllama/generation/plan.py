"""What is asked of a generation: checked as a whole before the first token is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from npllama.cache import KVCache
from npllama.engine import Model
from npllama.errors import ContextOverflowError, ParameterError, TokenizerError
from npllama.generation.prompt import Prompt, prompt_ids
from npllama.generation.sampling import Sampling, is_integer, random_generator
from npllama.generation.stop import StopStrings
from npllama.generation.writer import Writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for every prompt; see `npllama.generation.generate.generate`."""

    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str]
    chunk: int

    def check(self, model: Model) -> None:
        """Raise ParameterError or TokenizerError if they are out of range, or nothing that this model can do."""
        self.sampling.check_vocabulary(model.config.vocab_size)
        StopStrings(self.stop)
        if self.stop and model.tokenizer is None:
            raise TokenizerError("stop strings need a tokenizer, and this model has none")
        check_count("max_new_tokens", self.max_new_tokens)
        check_count("chunk", self.chunk)


@dataclass(frozen=True, slots=True)
class Plan:
    """One sequence to be written.

    Attributes
    ----------
    ids : list of int
        The prompt.
    cache : KVCache
        What came before it, with room for all that will be fed: the prompt, and every new token but the last.
    writer : Writer
        Writes the new tokens.
    """

    ids: list[int]
    cache: KVCache
    writer: Writer


def plan(model: Model, prompt: Prompt, settings: Settings, seed: int | None, cache: KVCache | None = None) -> Plan:
    """Prepare a prompt, with settings that were checked.

    Raises
    ------
    ContextOverflowError
        It does not fit behind what is cached.
    ParameterError
        An id is outside the vocabulary, there is nothing to start from, or the seed is none.
    TokenizerError
        A text or messages, but no tokenizer.
    """
    rng = random_generator(seed)
    used = 0 if cache is None else cache.length
    ids = prompt_ids(model, prompt, start=used == 0)
    context = model.config.max_seq_len if cache is None else cache.capacity
    if used + len(ids) > context:
        behind = f" behind {used} cached ones" if used else ""
        raise ContextOverflowError(
            f"the prompt has {len(ids)} tokens{behind}, but the context holds {context}",
            remedy="Shorten the prompt.",
        )
    count = min(settings.max_new_tokens, context - used - len(ids) + 1)  # the last token is not fed: it takes no place
    if cache is None:
        cache = model.new_cache(len(ids) + count - 1)
    return Plan(ids, cache, Writer(model.tokenizer, ids, count, settings.sampling, rng, StopStrings(settings.stop)))


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ParameterError unless a value is an integer of ``least`` or more."""
    if not is_integer(value) or value < least:
        raise ParameterError(f"{name} is {value!r}, expected an integer of {least} or more")
