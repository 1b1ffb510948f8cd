"""The inert values that a pickle program leaves behind, and what walking over them would cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from npllama.errors import ResourceLimitError, UnsafeFileError

_MAX_DEPTH = 64
_MAX_EXPANDED = 2_000_000


class Role(Enum):
    """What a program may do with a name."""

    NAME = "mention it"
    FUNCTION = "mention it, and apply it to arguments (which makes a Call)"
    MAPPING = "apply it to nothing or to a list of pairs (which makes a dict)"


@dataclass(frozen=True, slots=True, eq=False)
class Symbol:
    """A name that the program mentions: text, never resolved."""

    module: str
    name: str
    role: Role

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call that the program asks for and nobody makes; ``offset`` is the asking opcode's position."""

    function: Symbol
    arguments: tuple[Any, ...]
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class PersistentId:
    """A reference to something outside the program: torch's storages."""

    value: Any
    offset: int


Symbols: TypeAlias = Mapping[tuple[str, str], Role]


def kind(value: Any) -> str:
    """Name a value's type for a message."""
    return f"result of {value.function}" if isinstance(value, Call) else type(value).__name__


def survey(root: Any, *, file: str, record: str) -> None:
    """Bound what a walk over a value costs, visiting every container once.

    A container's weight is the number of values when everything shared is written out: a few dozen references to
    references can make it astronomical.

    Parameters
    ----------
    root : object
        Nested dicts, lists, tuples, `Call` and `PersistentId`.
    file, record : str
        Place for messages.

    Raises
    ------
    UnsafeFileError
        A container contains itself.
    ResourceLimitError
        The nesting is deeper, or the weight greater, than any checkpoint's.
    """
    done: dict[int, tuple[int, int]] = {}  # id -> (weight, height)
    open_ids = {id(root)}
    trail = [(root, _children(root), [1, 0])]
    while trail:
        node, rest, totals = trail[-1]
        for child in rest:
            if id(child) in open_ids:
                raise UnsafeFileError(
                    f"recursive structure: a {kind(child)} contains itself",
                    file=file,
                    record=record,
                    remedy="No checkpoint needs this: do not trust the file.",
                )
            if id(child) not in done and _is_container(child):
                open_ids.add(id(child))
                trail.append((child, _children(child), [1, 0]))
                break
            _add(totals, done.get(id(child), (1, 0)))
        else:
            trail.pop()
            open_ids.discard(id(node))
            done[id(node)] = (totals[0], totals[1])
            if trail:
                _add(trail[-1][2], done[id(node)])
        if totals[0] > _MAX_EXPANDED or len(trail) + totals[1] > _MAX_DEPTH:
            raise ResourceLimitError(
                f"the pickle's values are nested more than {_MAX_DEPTH} deep, or expand to more than {_MAX_EXPANDED}",
                file=file,
                record=record,
                remedy="No checkpoint is so large.",
            )


def _add(totals: list[int], child: tuple[int, int]) -> None:
    """Count a finished child in its parent's weight and height."""
    totals[0] += child[0]
    totals[1] = max(totals[1], child[1] + 1)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | Call | PersistentId)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        return iter(value.values())
    if isinstance(value, Call):
        return iter(value.arguments)
    if isinstance(value, PersistentId):
        return iter((value.value,))
    return iter(value if isinstance(value, list | tuple) else ())
