"""RoPE settings of a ``config.json``, in both of their spellings.

Older files have ``rope_theta`` and, where the frequencies are stretched, ``rope_scaling``; newer ones have
``rope_parameters`` for all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from npllama.config.keys import Keys
from npllama.config.model_config import RopeScaling
from npllama.errors import UnsupportedError

_ORIGINAL = "original_max_position_embeddings"


def rope_settings(keys: Keys, context: int, synonyms: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read how a model turns its queries and keys.

    Parameters
    ----------
    keys : Keys
        The whole document.
    context : int
        ``max_position_embeddings``.
    synonyms : mapping of str to str, optional
        What the family calls a kind of scaling -> what everybody calls it.

    Returns
    -------
    dict
        ``rope_theta`` and ``rope_scaling`` of a `ModelConfig`.
    """
    keys.must_be("partial_rotary_factor", [1], "RoPE must turn whole heads")
    keys.must_be("rope_interleaved", [False], "the rotated rows must be ordered by halves")
    theta, original = keys.number("rope_theta"), keys.get(_ORIGINAL)
    older, newer = keys.part("rope_scaling"), keys.part("rope_parameters")
    # What the document says of the original context outside of the settings goes before what it says inside.
    defaults = {"rope_theta": theta, _ORIGINAL: context}
    overrides = {} if original is None else {_ORIGINAL: original}
    settings = Keys({**defaults, **(older or newer), **overrides}, keys.file)

    settings.must_be("partial_rotary_factor", [1], "RoPE must turn whole heads")
    kinds = (settings.get("rope_type"), settings.get("type"), "default")
    kind = next(word for word in kinds if word is not None)
    kind = (synonyms or {}).get(kind, kind) if isinstance(kind, str) else None
    if kind not in _KINDS:
        raise UnsupportedError(
            f"RoPE scaling of type {kinds[0] or kinds[1]!r}", file=keys.file, remedy=f"Supported: {', '.join(_KINDS)}."
        )
    found = {"rope_theta": settings.number("rope_theta"), "rope_scaling": _KINDS[kind](settings, context)}
    settings.finish(frozenset({_ORIGINAL}))
    return found


def _llama3(keys: Keys, context: int) -> RopeScaling:
    return RopeScaling(
        "llama3",
        keys.number("factor"),
        keys.number("low_freq_factor"),
        keys.number("high_freq_factor"),
        keys.integer(_ORIGINAL),
    )


def _longrope(keys: Keys, context: int) -> RopeScaling:
    """Read longrope's factors.

    The attention factor is, unless it is given, ``sqrt(1 + ln(factor) / ln(original))`` with ``factor = context /
    original`` (Ding et al., https://arxiv.org/abs/2402.13753), and 1 for a context that was not stretched.
    """
    original = keys.integer(_ORIGINAL)
    if original < 2:
        raise keys.error(_ORIGINAL, "a number of tokens")
    factor = keys.number("factor", context / original)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        "longrope",
        original_max_seq_len=original,
        short_factors=keys.numbers("short_factor"),
        long_factors=keys.numbers("long_factor"),
        attention_factor=keys.number("attention_factor", attention),
    )


#: Kind of scaling -> reader of its settings, given the context.
_KINDS: dict[str, Callable[[Keys, int], RopeScaling | None]] = {
    "default": lambda keys, context: None,
    "linear": lambda keys, context: RopeScaling("linear", keys.number("factor")),
    "llama3": _llama3,
    "longrope": _longrope,
}
