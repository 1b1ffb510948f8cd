"""A trace: every tapped tensor of one run, in a folder of ``.npy`` files or in memory.

The folder is the meeting place of frameworks: torch writes one here, another machine without torch compares itself
with it. `npllama.check.trace_format` describes ``trace.json``; beside it lie ``NAME.npy`` for the prefill and
``step-000n/NAME.npy`` for decode step n.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from npllama.check import trace_format as form
from npllama.check.trace_format import Claim, Header, TapEntry, in_forward_order, tap_file
from npllama.config import ModelConfig
from npllama.errors import DestinationExistsError, DiskSpaceError, FileAccessError, NpllamaError, TapError, TraceError

__all__ = ["MemoryTrace", "TapEntry", "Trace", "TraceLike", "TraceSink", "TraceWriter"]

_NUMBERS = ("float16", "float32", "float64")
_LARGEST_JSON = 64 << 20
_PARTIAL = ".partial"


class TraceLike(Protocol):
    """What can be compared: a trace on disk or in memory, or an adapter around one."""

    @property
    def tokens(self) -> Sequence[int]:
        """Token id of every position, the prompt's first."""

    @property
    def prefill(self) -> int:
        """Tokens of step 0."""

    @property
    def steps(self) -> int:
        """Decode steps, one token each."""

    @property
    def dtype(self) -> str:
        """What the run computed in: a member of `npllama.check.trace_format.DTYPES`."""

    @property
    def producer(self) -> str:
        """Who wrote it; may be empty."""

    @property
    def model(self) -> Mapping[str, Any]:
        """What it says of the model; may be empty."""

    @property
    def taps(self) -> Sequence[TapEntry]:
        """Every tensor, by step and then in the order of the forward pass."""

    def read(self, name: str, step: int = 0) -> NDArray[Any]:
        """Return a tensor; TapError if the trace does not have it."""


class TraceSink(Protocol):
    """What a run is recorded into."""

    def add(self, step: int, name: str, array: NDArray[Any]) -> None:
        """Keep one tensor."""

    def extend(self, token: int) -> None:
        """Append the token of one more decode step, for a run that chooses its tokens on the way."""


class _Described:
    """The part of a trace that its header answers."""

    _header: Header
    _entries: dict[tuple[str, int], TapEntry]

    @property
    def tokens(self) -> list[int]:
        return list(self._header.tokens)

    @property
    def prefill(self) -> int:
        return self._header.prefill

    @property
    def steps(self) -> int:
        return self._header.steps

    @property
    def producer(self) -> str:
        return self._header.producer

    @property
    def model(self) -> Mapping[str, Any]:
        return self._header.model

    @property
    def taps(self) -> list[TapEntry]:
        return in_forward_order(list(self._entries.values()))

    @property
    def dtype(self) -> str:
        if self._header.dtype is not None:
            return self._header.dtype
        # A run is as exact as its least exact tensor.
        found = {entry.dtype for entry in self._entries.values()}
        return next((name for name in _NUMBERS if name in found), "float32")

    def _entry(self, name: str, step: int) -> TapEntry:
        entry = self._entries.get((name, step))
        if entry is None:
            raise TapError(f"the trace has no tensor {name!r} of step {step}")
        return entry


class Trace(_Described):
    """A trace on disk. Tensors are memory maps; nothing is read before it is asked for."""

    def __init__(self, path: Path, header: Header, entries: Sequence[TapEntry]) -> None:
        self.path = path
        self._header = header
        self._entries = {(entry.name, entry.step): entry for entry in entries}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Trace:
        """Open a trace's folder, and check that every file is there and is what ``trace.json`` says.

        Raises
        ------
        TraceError
            Not a trace, or one that contradicts itself.
        UnsafeFileError
            A file lies outside the folder.
        VersionError
            Written in a newer format.
        FileAccessError
            Something cannot be read.
        """
        folder = Path(path)
        description = folder / form.FILE_NAME
        if not folder.exists():
            raise FileAccessError("no such folder", file=folder, remedy="Check the path of the trace.")
        if not description.is_file():
            raise TraceError(
                f"not a trace: there is no {form.FILE_NAME}",
                file=folder,
                remedy="Record one with `npllama trace`, or write it beside your own .npy files.",
            )
        try:
            if description.stat().st_size > _LARGEST_JSON:
                raise TraceError(f"more than {_LARGEST_JSON} bytes", file=description)
            text = description.read_bytes()
        except OSError as problem:
            raise FileAccessError(f"cannot read: {problem.strerror}", file=description) from None
        header, claims = form.decode(text, str(description))
        return cls(folder, header, [_found(folder, claim) for claim in claims])

    def read(self, name: str, step: int = 0) -> NDArray[Any]:
        """Map a tensor, read-only; TapError if there is none of that name and step."""
        return _map(self.path, self._entry(name, step).file)


def _found(folder: Path, claim: Claim) -> TapEntry:
    """Look at a tap's file, and hold it to what was claimed of it."""
    array = _map(folder, claim.file)
    place = folder / claim.file
    dtype = array.dtype.name
    if dtype not in _NUMBERS:
        raise TraceError(
            f"the array is {array.dtype}, expected float32 or float64",
            file=place,
            remedy="Widen bfloat16 to float32 before saving, and set the trace's dtype to bfloat16.",
        )
    if claim.shape is not None and claim.shape != array.shape:
        raise TraceError(f"the array has shape {array.shape}, {form.FILE_NAME} says {claim.shape}", file=place)
    if claim.dtype in _NUMBERS and claim.dtype != dtype:
        raise TraceError(f"the array is {dtype}, {form.FILE_NAME} says {claim.dtype}", file=place)
    return TapEntry(claim.name, claim.step, array.shape, dtype, claim.file)


def _map(folder: Path, file: str) -> NDArray[Any]:
    path = folder / file
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()) or not path.is_file():
            raise TraceError("not a regular file inside the trace's folder", file=path)
        # Not np.load, which also opens zip archives and pickles.
        return np.lib.format.open_memmap(path, mode="r")
    except NpllamaError:
        raise
    except FileNotFoundError:
        raise TraceError(f"{form.FILE_NAME} names this file, but it is missing", file=path) from None
    except (OSError, RuntimeError) as problem:  # RuntimeError: a loop of symbolic links
        raise FileAccessError(f"cannot read: {problem}", file=path) from None
    except (ValueError, SyntaxError, TypeError, OverflowError) as problem:
        raise TraceError(f"not a .npy array of numbers: {str(problem)[:200]}", file=path) from None


class MemoryTrace(_Described):
    """A trace that lives in memory: the same to read as `Trace`, the same to fill as `TraceWriter`.

    Parameters
    ----------
    tokens : sequence of int
        Token id of every position that the run will be fed, the prompt's first.
    prefill : int
        How many of them belong to step 0; each of the others is a decode step.
    dtype : str
        What the run computes in.
    producer : str
        Who runs.
    config : ModelConfig, optional
        The model.
    model : mapping, optional
        What to say of it instead, for a run that is not npllama's.
    """

    def __init__(
        self,
        *,
        tokens: Sequence[int],
        prefill: int,
        dtype: str = "float32",
        producer: str = "npllama",
        config: ModelConfig | None = None,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        header = _new_header(producer, dtype, tokens, prefill, config)
        self._header = header if model is None else replace(header, model=model)
        self._entries = {}
        self._arrays: dict[tuple[str, int], NDArray[Any]] = {}

    def add(self, step: int, name: str, array: NDArray[Any]) -> None:
        """Keep one tensor (not a copy of it)."""
        self._entries[name, step] = TapEntry(name, step, array.shape, array.dtype.name)
        self._arrays[name, step] = array

    def extend(self, token: int) -> None:
        """Append the token of one more decode step."""
        self._header = _extended(self._header, token)

    def read(self, name: str, step: int = 0) -> NDArray[Any]:
        """Return a tensor; TapError if there is none of that name and step."""
        self._entry(name, step)
        return self._arrays[name, step]


class TraceWriter:
    """Writes a trace's folder; it appears under its name when all of it is there.

    Used in a ``with`` block, an exception removes what was written so far.

    Parameters
    ----------
    path : path-like
        Folder to make; it must not exist, or be empty.
    producer : str
        Program that runs.
    dtype : str
        What the run computes in; the arrays of a bfloat16 run are exact float32 widenings.
    tokens : sequence of int
        Token ids that the run will be fed, the prompt's first.
    prefill : int
        How many of them belong to step 0.
    steps : int, optional
        Decode steps in the end, to be checked by `finish`; by default as many as there are tokens for.
    config : ModelConfig, optional
        The model.

    Raises
    ------
    DestinationExistsError
        There is something at ``path``.
    FileAccessError, DiskSpaceError
        It cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        producer: str,
        dtype: str,
        tokens: Sequence[int],
        prefill: int,
        steps: int | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        self.path = Path(path)
        self._header = _new_header(producer, dtype, tokens, prefill, config)
        self._steps = steps
        self._entries: dict[tuple[str, int], TapEntry] = {}
        if os.path.lexists(self.path) and not (self.path.is_dir() and not any(self.path.iterdir())):
            raise DestinationExistsError("it exists", file=self.path, remedy="Remove it, or choose another folder.")
        self._partial = self.path.with_name(f"{self.path.name}.{os.getpid()}{_PARTIAL}")
        with _writing(self._partial):
            self._partial.mkdir(parents=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)  # finish() has renamed it

    def add(self, step: int, name: str, array: NDArray[Any]) -> None:
        """Write one tensor, of float32 or float64."""
        entry = TapEntry(name, step, array.shape, array.dtype.name, tap_file(name, step))
        if entry.dtype not in _NUMBERS:
            raise TraceError(f"{name} is {array.dtype}, expected float32 or float64", file=self.path)
        if (name, step) in self._entries:
            raise TraceError(f"{name} of step {step} was written twice", file=self.path)
        file = self._partial / entry.file
        with _writing(file):
            file.parent.mkdir(exist_ok=True)
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        self._entries[name, step] = entry

    def extend(self, token: int) -> None:
        """Append the token of one more decode step."""
        self._header = _extended(self._header, token)

    def finish(self) -> Path:
        """Write ``trace.json`` and give the folder its name; TraceError if steps are missing."""
        wanted = self._header.steps if self._steps is None else self._steps
        last = max((step for _, step in self._entries), default=-1)
        if self._header.steps != wanted or not 0 <= last <= wanted:
            raise TraceError(
                f"{wanted} decode steps were announced, tokens came for {self._header.steps} and tensors up to "
                f"step {last}",
                file=self.path,
            )
        text = form.encode(self._header, in_forward_order(list(self._entries.values())))
        with _writing(self.path):
            (self._partial / form.FILE_NAME).write_bytes(text)
            self._partial.rename(self.path)
        return self.path


def _new_header(producer: str, dtype: str, tokens: Sequence[int], prefill: int, config: ModelConfig | None) -> Header:
    ids = tuple(int(token) for token in tokens)
    if dtype not in form.DTYPES:
        raise TraceError(f"the dtype is {dtype!r}, expected one of {', '.join(form.DTYPES)}")
    if not 1 <= prefill <= len(ids):
        raise TraceError(f"a prefill of {prefill} tokens, expected 1 to {len(ids)}")
    return Header(ids, prefill, len(ids) - prefill, dtype, producer, form.describe_model(config))


def _extended(header: Header, token: int) -> Header:
    return replace(header, tokens=(*header.tokens, int(token)), steps=header.steps + 1)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says while writing into an error about the file."""
    try:
        yield
    except OSError as problem:
        kind: Callable[..., NpllamaError] = FileAccessError
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            kind = DiskSpaceError
        raise kind(f"cannot write: {problem.strerror or problem}", file=problem.filename or path) from None
