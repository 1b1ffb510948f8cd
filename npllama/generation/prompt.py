"""Prompts in every form that they come in, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from npllama.engine import Model
from npllama.errors import ParameterError, TokenizerError
from npllama.generation.sampling import is_integer
from npllama.text.chat import dialog_prompt

#: A text, token ids, or the messages of a dialog ({"role": ..., "content": ...}).
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def prompt_ids(model: Model, prompt: Prompt, *, start: bool = True) -> list[int]:
    """Turn a prompt into token ids.

    Parameters
    ----------
    model : Model
        Gives the tokenizer and the size of the vocabulary.
    prompt : str, sequence of int, or sequence of messages
        As for `npllama.generation.generate.generate`.
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
        ids = tokenizer_of(model).encode(prompt, bos=None if start else False)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        ids = dialog_prompt(tokenizer_of(model), cast("Sequence[Mapping[str, Any]]", prompt))
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


def tokenizer_of(model: Model) -> Any:
    """Return a model's tokenizer, or raise a `TokenizerError` where it has none."""
    if model.tokenizer is None:
        raise TokenizerError(
            "this model has no tokenizer: it takes and gives token ids only",
            remedy="Give ids, or convert the checkpoint again with its tokenizer beside it.",
        )
    return model.tokenizer
