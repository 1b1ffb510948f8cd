"""Typed access to a metadata mapping, and the rule that no key may go unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from npllama.config.model_config import LARGEST_INTEGER, LARGEST_NUMBER
from npllama.errors import ConfigError, UnsupportedError


class Keys:
    """Typed access to a metadata mapping that remembers which keys were understood."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self._values = values
        self._file = file
        self._used: set[str] = set()

    def error(self, key: str, wanted: str) -> ConfigError:
        """Say what a key holds and what was wanted."""
        found = f"is {self._values[key]!r}"[:80] if key in self._values else "is missing"
        return ConfigError(f"{key} {found}, expected {wanted}", file=self._file)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default for an absent key or null; the key counts as understood."""
        self._used.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > LARGEST_INTEGER:
            raise self.error(key, f"an integer of at most {LARGEST_INTEGER}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return an integer or real number as a float."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
            raise self.error(key, "a number")
        return float(value)

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
            raise UnsupportedError(f"{key} is {value!r}: {why}", file=self._file)

    def finish(self, harmless: frozenset[str], prefix: str = "") -> None:
        """Refuse keys under ``prefix`` that were neither understood nor are known to be harmless."""
        unknown = sorted(
            key for key in self._values if key.startswith(prefix) and key not in self._used and key not in harmless
        )
        if unknown:
            raise ConfigError(
                f"unknown keys that could change the numbers: {', '.join(unknown[:8])}",
                file=self._file,
                remedy="This model has a feature that npllama does not know.",
            )
