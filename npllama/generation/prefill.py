"""Feeding a prompt to a model, and what its length means to a model with two sets of RoPE frequencies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npllama.cache import KVCache
from npllama.engine import Model

PREFILL_CHUNK = 512


def prefill(
    model: Model, ids: Sequence[int], cache: KVCache, chunk: int = PREFILL_CHUNK, *, horizon: int | None = None
) -> Any:
    """Feed a prompt to the model in chunks.

    Parameters
    ----------
    model : Model
        The model.
    ids : sequence of int
        The prompt.
    cache : KVCache
        Grows by the prompt.
    chunk : int
        Tokens of one forward pass: bounds the memory that a long prompt takes.
    horizon : int, optional
        How many positions are known to come in all, where more follow than the prompt's.

    Returns
    -------
    ndarray of shape (1, V)
        Logits behind the last token; None for a prompt of none.
    """
    announce(cache, len(ids) if horizon is None else horizon)
    logits = None
    for begin in range(0, len(ids), chunk):
        logits = model.forward(ids[begin : begin + chunk], cache, last=True)
    return logits


def announce(cache: KVCache, positions: int) -> None:
    """Tell an empty cache how many positions are known to come.

    A longrope model then turns the first chunk of a long prompt by the frequencies of long texts, as it does when it
    gets the prompt in one piece. What is cached already has been turned: the model itself computes it anew where the
    text outgrows it.
    """
    if cache.length == 0:
        cache.horizon = positions


def reach(model: Model, length: int) -> int:
    """Return the number of positions up to which a text of ``length`` positions keeps its RoPE frequencies.

    It is the model's context, but for a longrope model whose text is within the original one still.
    """
    config, scaling = model.config, model.config.rope_scaling
    if scaling is None or scaling.kind != "longrope" or config.is_long(length):
        return config.max_seq_len
    return min(scaling.original_max_seq_len, config.max_seq_len)
