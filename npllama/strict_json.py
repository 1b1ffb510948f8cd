"""JSON from strangers: one parser that refuses what the standard one lets through."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from npllama.errors import NpllamaError

_MAX_DIGITS = 400


def parse_object(text: str | bytes, *, error: type[NpllamaError], file: str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Refused, beyond what is not JSON: duplicate keys, ``NaN`` and ``Infinity``, numbers that overflow, integers of
    thousands of digits, nesting that exhausts the stack, a byte-order mark, text that is not UTF-8, and anything
    that is not an object at the top.

    Parameters
    ----------
    text : str or bytes
        The document.
    error : type
        The error class to raise.
    file : str
        The file's name, for the message.

    Raises
    ------
    NpllamaError
        Of the class ``error``.
    """

    def refuse(what: str) -> NpllamaError:
        return error(what, file=file, remedy="The file is damaged or was edited by hand; fetch it again.")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise refuse(f"the key {key!r} appears twice")
            found[key] = value
        return found

    def constant(name: str) -> Any:
        raise refuse(f"{name} is not a JSON number")

    try:
        document = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=_integer(refuse),
            parse_float=_real(refuse),
        )
    except UnicodeDecodeError as problem:
        raise refuse(f"not UTF-8 text at byte {problem.start}") from None
    except json.JSONDecodeError as problem:
        raise refuse(f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}") from None
    except RecursionError:
        raise refuse("not a sensible document: nested too deeply") from None
    if not isinstance(document, dict):
        raise refuse(f"expected a JSON object, found {type(document).__name__}")
    return document


def _integer(refuse: Callable[[str], NpllamaError]) -> Callable[[str], int]:
    def parse(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise refuse(f"an integer of {len(digits)} digits")
        return int(digits)

    return parse


def _real(refuse: Callable[[str], NpllamaError]) -> Callable[[str], float]:
    def parse(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise refuse(f"the number {digits} is too large")
        return value

    return parse
