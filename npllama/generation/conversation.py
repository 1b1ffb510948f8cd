"""A dialog with a model: what has been said, and the cache that spares computing it again."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

from npllama.engine import Model
from npllama.generation.generate import generate
from npllama.generation.prompt import prompt_ids, tokenizer_of
from npllama.generation.writer import Step


class Conversation:
    """Messages in turn, answered by the model.

    Parameters
    ----------
    model : Model
        With a tokenizer.
    system : str, optional
        A first message with the role "system"; without it the chat template decides.
    capacity : int
        Positions that the whole dialog may take, at most the model's context.

    Raises
    ------
    TokenizerError
        The model has no tokenizer.

    Attributes
    ----------
    messages : list of dict
        {"role": ..., "content": ...} of every turn that has an answer, an interrupted one included.
    cache : KVCache
        Keys and values of the dialog so far.
    """

    def __init__(self, model: Model, *, system: str | None = None, capacity: int) -> None:
        tokenizer_of(model)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.cache = model.new_cache(capacity)
        self._model = model
        self._seen: list[int] = []  # the ids behind the cache; it holds the first `cache.length` of them

    def reply(self, text: str, **settings: Any) -> Generator[Step, None, None]:
        """Answer a message of the user.

        Parameters
        ----------
        text : str
            The message.
        **settings
            Those of `generate`: max_new_tokens, temperature, seed, stop ...

        Returns
        -------
        generator of Step
            Close it to interrupt the answer: what was said until then stays in the dialog. A turn that ends before
            any text is forgotten.

        Raises
        ------
        NpllamaError
            As `generate`; the dialog is then as it was before.

        Notes
        -----
        Of the rendered dialog, the part that equals what the cache holds is not computed again. An answer can come
        back from its text as other ids than those generated; all from the first difference on is then computed anew.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = prompt_ids(self._model, messages)
        shared = _common_prefix(self._seen[: self.cache.length], ids[:-1])  # at least one token must be fed
        self.cache.truncate(shared)
        steps = generate(self._model, ids[shared:], cache=self.cache, **settings)
        return self._answer(steps, messages, ids)

    def _answer(
        self, steps: Generator[Step, None, None], messages: list[dict[str, str]], ids: list[int]
    ) -> Generator[Step, None, None]:
        self._seen = ids
        answer = ""
        try:
            with closing(steps):
                for step in steps:
                    self._seen.append(step.token)
                    answer += step.text
                    yield step
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the beginning that two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
