"""``trace.json``: what a trace says of itself, and what it must say to be believed.

The format is meant to be written by anybody, with ``np.save`` and ten lines of JSON. So only ``tokens``, ``prefill``
and ``taps`` are required, and of a tap only its name; whatever else is there must be right. All that a prefill needs::

    for name, tensor in tensors.items():  # "layers.0.q_rope" and so on, or your framework's own names
        np.save(folder / f"{name}.npy", tensor)
    taps = [{"name": name} for name in tensors]
    (folder / "trace.json").write_text(json.dumps({"tokens": ids, "prefill": len(ids), "taps": taps}))
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from npllama.config import ModelConfig
from npllama.errors import NpllamaError, TapError, TraceError, UnsafeFileError, VersionError
from npllama.strict_json import parse_object
from npllama.taps import TAPS, spec_of

FORMAT_VERSION = 1
FILE_NAME = "trace.json"
#: What a run can compute in. Files hold float32 (float16 and bfloat16 runs: exact widenings) or float64. A run in int8
#: computes in float32, and rounds the inputs of products with weights as `npllama.rounding` declares it.
DTYPES = ("float16", "bfloat16", "float32", "float64", "int8")
ROPE_LAYOUTS = ("interleaved", "half-split")

_MOST_TOKENS = 1 << 22
_LARGEST_TOKEN = 1 << 31
_LONGEST_NAME = 200
#: Taps before this place in their table come before all layers, those without a layer behind it after them.
_FIRST_OF_A_LAYER = next(place for place, spec in enumerate(TAPS) if "{i}" in spec.name)
#: One part of a path that no file system mistakes for anything else.
_SAFE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True, slots=True)
class TapEntry:
    """One tensor of a trace.

    Attributes
    ----------
    name : str
        Name of the tap; a foreign trace may use another framework's.
    step : int
        0 is the prefill, n the n-th decode step.
    shape : tuple of int
        Shape of the array.
    dtype : str
        NumPy name of its dtype: "float16", "float32" or "float64".
    file : str
        Path relative to the trace's folder, with ``/`` between its parts; empty for a trace in memory.
    """

    name: str
    step: int
    shape: tuple[int, ...]
    dtype: str
    file: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a line of ``taps`` says, before the file has been looked at. None: it says nothing of that."""

    name: str
    step: int
    file: str
    shape: tuple[int, ...] | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class Header:
    """What ``trace.json`` says, apart from the taps.

    Attributes
    ----------
    tokens : tuple of int
        Every token id in order, the prompt's first: one for each position of the prefill and each decode step.
    prefill, steps : int
        Tokens of the prefill, number of decode steps.
    dtype : str or None
        What the run computed in, a member of `DTYPES`.
    producer : str
        Who wrote it; empty when it does not say.
    model : mapping
        Anything about the model; ``config_hash`` and ``rope_layout`` are understood.
    """

    tokens: tuple[int, ...]
    prefill: int
    steps: int
    dtype: str | None
    producer: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)


def config_hash(config: ModelConfig) -> str:
    """Digest that two traces of the same architecture share."""
    return hashlib.sha256(json.dumps(config.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe_model(config: ModelConfig | None) -> dict[str, Any]:
    """Return what npllama and its oracle say of a model in ``trace.json``."""
    if config is None:
        return {"rope_layout": "interleaved"}
    return {"config_hash": config_hash(config), "rope_layout": "interleaved", "config": config.to_json()}


def tap_file(name: str, step: int) -> str:
    """Path of a tap's array in the trace's folder; TraceError for a name that makes none."""
    if not _SAFE_PART.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise TraceError(f"the tap name {name!r} cannot be a file name", remedy='Say the "file" of this tap.')
    return f"{name}.npy" if step == 0 else f"step-{step:04d}/{name}.npy"


@lru_cache(maxsize=1 << 14)
def forward_rank(name: str) -> tuple[int, int, int]:
    """Place of a tap in the forward pass, as a key to sort by; names that are no tap's come last."""
    try:
        place = TAPS.index(spec_of(name))
    except TapError:
        return (3, 0, 0)
    parts = name.split(".")
    if len(parts) == 3:
        return (1, int(parts[1]), place)
    return (0 if place < _FIRST_OF_A_LAYER else 2, 0, place)


def in_forward_order(taps: list[TapEntry]) -> list[TapEntry]:
    """Sort by step, then by the forward pass; unknown names keep their order among themselves."""
    return sorted(taps, key=lambda tap: (tap.step, forward_rank(tap.name)))


def encode(header: Header, taps: list[TapEntry]) -> bytes:
    """Spell a ``trace.json``, one line for each tap."""
    head = {
        "format_version": FORMAT_VERSION,
        "producer": header.producer,
        "dtype": header.dtype,
        "tokens": list(header.tokens),
        "prefill": header.prefill,
        "steps": header.steps,
        "model": dict(header.model),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join(json.dumps(asdict(tap)) for tap in taps)
    return ("{\n" + ",\n".join([*lines, f'"taps": [\n{rows}\n]']) + "\n}\n").encode()


def decode(text: bytes, file: str) -> tuple[Header, list[Claim]]:
    """Read a ``trace.json`` strictly.

    Raises
    ------
    TraceError
        A required key is missing, or a value is not what it can be.
    VersionError
        Written in a newer format.
    UnsafeFileError
        The file of a tap is outside the folder.
    """
    return _Reader(file).read(parse_object(text, error=TraceError, file=file))


class _Reader:
    """Checks the values of one ``trace.json``; every complaint names the file and the key."""

    def __init__(self, file: str) -> None:
        self._file = file

    def read(self, values: Mapping[str, Any]) -> tuple[Header, list[Claim]]:
        version = self._integer(values, "format_version", 1, default=FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise VersionError(
                f"trace format {version}; this npllama reads up to {FORMAT_VERSION}",
                file=self._file,
                remedy="Update npllama.",
            )
        tokens = self._tokens(values)
        prefill = self._integer(values, "prefill", 1, most=len(tokens))
        steps = self._integer(values, "steps", 0, default=len(tokens) - prefill)
        if prefill + steps != len(tokens):
            raise self._wrong(
                "tokens", f"has {len(tokens)} ids", f"{prefill} of the prefill and one for each of {steps} decode steps"
            )
        header = Header(
            tokens,
            prefill,
            steps,
            self._choice(values, "dtype", DTYPES),
            self._text(values, "producer"),
            self._model(values),
        )
        return header, self._taps(values, steps)

    def _wrong(self, key: str, found: str, wanted: str) -> NpllamaError:
        return TraceError(f"{key} {found}, expected {wanted}", file=self._file)

    def _integer(
        self, values: Mapping[str, Any], key: str, least: int, *, most: int = _MOST_TOKENS, default: int | None = None
    ) -> int:
        value = values.get(key, default)
        if type(value) is not int or not least <= value <= most:
            found = f"is {value!r}"[:80] if key in values else "is missing"
            raise self._wrong(key, found, f"an integer from {least} to {most}")
        return value

    def _text(self, values: Mapping[str, Any], key: str) -> str:
        value = values.get(key, "")
        if not isinstance(value, str):
            raise self._wrong(key, f"is {value!r}"[:80], "a text")
        return value

    def _choice(self, values: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str | None:
        value = values.get(key)
        if value is None or (isinstance(value, str) and value in allowed):
            return value
        raise self._wrong(key, f"is {value!r}"[:80], f"one of {', '.join(allowed)}")

    def _tokens(self, values: Mapping[str, Any]) -> tuple[int, ...]:
        tokens = values.get("tokens")
        if not isinstance(tokens, list) or not 0 < len(tokens) <= _MOST_TOKENS:
            found = "is missing" if tokens is None else "is not that"
            raise self._wrong("tokens", found, "a list of at least one token id")
        for place, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < _LARGEST_TOKEN:
                raise self._wrong(f"tokens[{place}]", f"is {token!r}"[:80], "a token id")
        return tuple(tokens)

    def _model(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        model = values.get("model", {})
        if not isinstance(model, dict):
            raise self._wrong("model", f"is {model!r}"[:80], "an object")
        self._choice(model, "rope_layout", ROPE_LAYOUTS)
        return model

    def _taps(self, values: Mapping[str, Any], steps: int) -> list[Claim]:
        lines = values.get("taps")
        if not isinstance(lines, list) or not lines:
            raise self._wrong("taps", "is missing or empty", "a list of tensors")
        claims = [self._tap(line, f"taps[{i}]", steps) for i, line in enumerate(lines)]
        seen: set[tuple[str, int]] = set()
        for claim in claims:
            if (claim.name, claim.step) in seen:
                raise self._wrong("taps", f"has {claim.name} of step {claim.step} twice", "each tensor once")
            seen.add((claim.name, claim.step))
        return claims

    def _tap(self, line: Any, place: str, steps: int) -> Claim:
        if not isinstance(line, dict):
            raise self._wrong(place, f"is {line!r}"[:80], "an object")
        name = line.get("name")
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise self._wrong(f"{place}.name", f"is {name!r}"[:80], "a name")
        step = self._integer(line, "step", 0, most=steps, default=0)
        file = line["file"] if "file" in line else tap_file(name, step)
        shape = line.get("shape")
        if shape is not None and not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise self._wrong(f"{place}.shape", f"is {shape!r}"[:80], "a list of integers")
        dtype = self._choice(line, "dtype", DTYPES)
        return Claim(name, step, self._path(file, place), None if shape is None else tuple(shape), dtype)

    def _path(self, file: Any, place: str) -> str:
        if isinstance(file, str) and all(_SAFE_PART.fullmatch(part) for part in file.split("/")):
            return file
        raise UnsafeFileError(
            f"{place}.file is {file!r}"[:160] + ", expected the path of a file inside the trace's folder",
            file=self._file,
            remedy="Use letters, digits, '.', '_', '+' and '-', with '/' between folders.",
        )
