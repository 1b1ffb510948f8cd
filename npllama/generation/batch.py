"""Many prompts at once: sequences decode together, and the weights are read once for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from npllama.cache import KVCache
from npllama.engine import Model
from npllama.errors import NpllamaError
from npllama.generation.plan import Plan, Settings, check_count, plan
from npllama.generation.prefill import PREFILL_CHUNK, announce
from npllama.generation.prompt import Prompt, prompt_ids
from npllama.generation.sampling import Sampling, random_generator
from npllama.generation.writer import Step, Writer

_SEEDS = 1 << 64


def generate_batch(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    lanes: int = 8,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    chunk: int = PREFILL_CHUNK,
) -> Generator[tuple[int, Step], None, None]:
    """Continue several prompts side by side.

    Parameters
    ----------
    model : Model
        A loaded model.
    prompts : sequence of str, sequence of int, or sequence of messages
        Each as for `npllama.generate`, and each the beginning of a sequence of its own.
    lanes : int
        How many sequences are in work at a time, each with a cache of its own. One that ends makes room for the next
        prompt at once.
    max_new_tokens, temperature, top_k, top_p, min_p, stop
        As for `npllama.generate`, the same for every prompt.
    seed : int, optional
        The prompt at index i draws its random numbers from the seed ``(seed + i) mod 2**64``. Without one every run
        differs.
    chunk : int
        Prompt tokens that one forward pass takes, of all prompts together. Sequences that are past their prompt go on
        meanwhile, by a token for each chunk.

    Returns
    -------
    generator of (int, Step)
        The index of a prompt and the next step of its text. Steps of one prompt come in order, those of different
        prompts mixed; the last one of each has a ``finish_reason``.

    Raises
    ------
    ContextOverflowError, ParameterError, TokenizerError
        As `npllama.generate`. What is wrong with a prompt is named ``prompts[i]``.

    Notes
    -----
    Everything is checked before this function returns, not at the first step.

    Each prompt gets the tokens that `npllama.generate` gives it alone with its seed, whatever the lanes, the neighbours
    and the chunk: its logits are the same numbers where they do not depend on how many rows are computed together, and
    elsewhere the same but for rounding, as for drafts.
    """
    settings = Settings(
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p),
        stop=stop,
        chunk=chunk,
    )
    settings.check(model)
    check_count("lanes", lanes)
    random_generator(seed)  # refuses a seed that is none, even if there are no prompts
    waiting = deque(
        _plan(model, index, prompt, settings, None if seed is None else (int(seed) + index) % _SEEDS)
        for index, prompt in enumerate(prompts)
    )
    return _steps(model, waiting, lanes, chunk)


def batch_ids(model: Model, prompts: Iterable[Prompt]) -> list[list[int]]:
    """Turn prompts into token ids, as `generate_batch` does; what is wrong with one is named ``prompts[i]``."""
    found = []
    for index, prompt in enumerate(prompts):
        with _named(index):
            found.append(prompt_ids(model, prompt))
    return found


@contextmanager
def _named(index: int) -> Iterator[None]:
    """Say of an error of the block which prompt is at fault."""
    try:
        yield
    except NpllamaError as problem:
        raise type(problem)(problem.message, remedy=problem.remedy, record=f"prompts[{index}]") from None


def _plan(model: Model, index: int, prompt: Prompt, settings: Settings, seed: int | None) -> tuple[int, Plan]:
    """Prepare a prompt; what is wrong with it is said to be wrong with that one."""
    with _named(index):
        return index, plan(model, prompt, settings, seed)


@dataclass(slots=True)
class _Lane:
    """A sequence in work.

    Attributes
    ----------
    index : int
        Of its prompt.
    pending : list of int
        Tokens to be fed before the next one can be chosen: the rest of the prompt, later the latest token.
    """

    index: int
    pending: list[int]
    cache: KVCache
    writer: Writer


def _steps(
    model: Model, waiting: deque[tuple[int, Plan]], lanes: int, chunk: int
) -> Generator[tuple[int, Step], None, None]:
    """Yield the steps of all sequences, with a forward pass for every round."""
    active: list[_Lane] = []
    while waiting or active:
        while waiting and len(active) < lanes:
            index, asked = waiting.popleft()
            announce(asked.cache, len(asked.ids))
            active.append(_Lane(index, asked.ids, asked.cache, asked.writer))
        fed = _portions(active, chunk)
        rows = model.forward_many([tokens for _, tokens in fed], [lane.cache for lane, _ in fed], last=True)
        for (lane, tokens), row in zip(fed, rows, strict=True):
            lane.pending = lane.pending[len(tokens) :]
            if not lane.pending:
                step = lane.writer.step(row[0])
                lane.pending = [step.token]
                yield lane.index, step
        active = [lane for lane in active if lane.writer.remaining]


def _portions(active: Iterable[_Lane], chunk: int) -> list[tuple[_Lane, list[int]]]:
    """Choose what each lane feeds to the next forward pass.

    It is a lane's latest token, or as much of its prompt as those before it leave of the chunk; a lane for which
    nothing is left sits the pass out.
    """
    fed, room = [], chunk
    for lane in active:
        decodes = len(lane.pending) == 1
        tokens = lane.pending if decodes else lane.pending[:room]
        room -= 0 if decodes else len(tokens)
        if tokens:
            fed.append((lane, tokens))
    return fed
