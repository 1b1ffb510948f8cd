"""Typed access to a metadata mapping, and the rule that no key may go unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from npllama.config.model_config import LARGEST_INTEGER, LARGEST_NUMBER
from npllama.errors import ConfigError, UnsupportedError

Choice = TypeVar("Choice")


class Keys:
    """Typed access to a metadata mapping that remembers which keys were understood.

    Parameters
    ----------
    values : mapping of str to object
        The metadata.
    file : str
        Where they are from, for messages.
    """

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.file = file
        self._values = values
        self._used: set[str] = set()

    def error(self, key: str, wanted: str) -> ConfigError:
        """Say what a key holds and what was wanted."""
        found = f"is {self._values[key]!r}"[:80] if key in self._values else "is missing"
        return ConfigError(f"{key} {found}, expected {wanted}", file=self.file)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default for an absent key or null; the key counts as understood."""
        self._used.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer."""
        value = self.get(key, default)
        if not _is_integer(value):
            raise self.error(key, f"an integer of at most {LARGEST_INTEGER}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Return an integer or real number as a float."""
        value = self.get(key, default)
        if not _is_number(value):
            raise self.error(key, "a number")
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers; an absent key is an empty one."""
        values = self.get(key, [])
        if not isinstance(values, list) or not all(map(_is_integer, values)):
            raise self.error(key, f"a list of integers of at most {LARGEST_INTEGER}")
        return tuple(values)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of integers or real numbers as floats; an absent key is an empty one."""
        values = self.get(key, [])
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise self.error(key, "a list of numbers")
        return tuple(map(float, values))

    def part(self, key: str) -> dict[str, Any]:
        """Return an object of its own keys; an absent key is an empty one."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(f"{key} is {str(value)[:40]!r}, which is not a JSON object", file=self.file)
        return value

    def choice(self, key: str, choices: Mapping[str, Choice]) -> Choice:
        """Return what a word stands for; another word is a feature that npllama does not have."""
        value = self.get(key)
        if not isinstance(value, str) or value not in choices:
            raise UnsupportedError(
                f"{key} is {str(value)[:40]!r}", file=self.file, remedy=f"Supported: {', '.join(choices)}."
            )
        return choices[value]

    def flag(self, key: str) -> bool:
        """Return a truth value; an absent key is false."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def must_be(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """Accept an absent key or one of the allowed values; anything else is a model that npllama would get wrong."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedError(f"{key} is {value!r}: {why}", file=self.file)

    def finish(self, harmless: frozenset[str], prefix: str = "") -> None:
        """Refuse keys under ``prefix`` that were neither understood nor are known to be harmless."""
        unknown = sorted(
            key for key in self._values if key.startswith(prefix) and key not in self._used and key not in harmless
        )
        if unknown:
            raise ConfigError(
                f"unknown keys that could change the numbers: {', '.join(unknown[:8])}",
                file=self.file,
                remedy="This model has a feature that npllama does not know.",
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
