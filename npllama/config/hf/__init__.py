"""Readers of Hugging Face's ``config.json``, a module for each line of families.

A reader turns the settings of one family into the fields of a `ModelConfig`. What a file leaves out has the value that
the family's own configuration class in transformers gives it: tables of such defaults stand beside the readers. The
sizes that fix the shapes of the weights have none, for a file without them is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from npllama.config.keys import Keys


@dataclass(frozen=True, slots=True)
class Family:
    """How to read the configuration of one family.

    Attributes
    ----------
    read : callable
        ``read(keys)`` returns the fields of a `ModelConfig`, but for its ``family``.
    defaults : mapping of str to object
        What an absent key stands for.
    harmless : frozenset of str
        Keys that do not touch the forward pass, beside those that are harmless in every family.
    """

    read: Callable[[Keys], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
