"""The manifest: what a model folder holds, and the only description of it that is believed.

``manifest.json`` is JSON with one tensor on each line. Its last key, ``digest``, is the SHA-256 of the document without
that key, spelled with sorted keys and no spaces: ``json.dumps(document, sort_keys=True, separators=(",", ":"))``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from npllama.checkpoint.names import EMBEDDING, OUTPUT, expected
from npllama.checkpoint.store.npy import data_bytes, header
from npllama.config import ModelConfig
from npllama.dtypes import GROUP, PACKINGS, SCALE, n_groups
from npllama.errors import ConfigMismatchError, CorruptDataError, NpllamaError, VersionError
from npllama.strict_json import parse_object
from npllama.version import VERSION

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
ROPE_FREQS, ROPE_FREQS_LONG = "rope.freqs", "rope.freqs_long"
#: Logical dtypes that the weights of a store can have.
DTYPES = ("bfloat16", "float32", *PACKINGS)

#: What a tensor's files hold, in order; a tensor that is not quantised has only the first.
PARTS = ("data", "scale", "min")

_KEYS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "producer": str,
    "config": dict,
    "dtype": str,
    "rope_layout": str,
    "source_rope_layout": str,
    "truncated": (dict, type(None)),
    "tied": dict,
    "tokenizer": list,
    "source": dict,
    "notes": list,
    "tensors": list,
    "complete": bool,
    "digest": str,
}
_SHA256 = re.compile("[0-9a-f]{64}")
#: A file directly in the tokenizer folder.
TOKENIZER_FILE = re.compile(r"tokenizer/(?!\.)[^/\\\0]+")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a tensor.

    Attributes
    ----------
    file : str
        Path relative to the model folder; made from the canonical name, never taken from input.
    dtype : str
        Logical dtype of the array, a key of `npllama.dtypes.STORAGE`.
    shape : tuple of int
        Shape of the array.
    sha256 : str
        Digest of the whole file, as ``sha256sum`` prints it; empty when it is not known yet.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def header(self) -> bytes:
        """First bytes of the file."""
        return header(self.dtype, self.shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the array."""
        return data_bytes(self.dtype, self.shape)

    @property
    def file_bytes(self) -> int:
        """Exact size of the file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a store.

    Attributes
    ----------
    name : str
        Canonical name.
    dtype : str
        Logical dtype.
    shape : tuple of int
        Shape of the tensor of numbers.
    sha256 : tuple of str
        Digest of each part's file; empty when they are not known yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensor's files: ``weights/NAME.npy``, and ``NAME.scale.npy`` and ``NAME.min.npy`` where it has them."""
        packing = PACKINGS.get(self.dtype)
        if packing is None:
            arrays = [(self.dtype, self.shape)]
        else:
            rows, width = self.shape[:-1], self.shape[-1]
            groups = (SCALE, (*rows, n_groups(width)))
            arrays = [(packing.storage, (*rows, packing.row_bytes(width))), groups, *[groups] * packing.has_minima]
        digests = self.sha256 or ("",) * len(arrays)
        files = part_files(self.name, len(arrays))
        return tuple(Part(file, *array, digest) for file, array, digest in zip(files, arrays, digests, strict=True))

    @property
    def data_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.data_bytes for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return the tensor's line of the manifest; the further parts of a quantised one are objects in it."""
        first, *rest = self.parts
        return {
            "name": self.name,
            "file": first.file,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "group": GROUP if self.dtype in PACKINGS else None,
            "sha256": first.sha256,
            **{kind: {"file": part.file, "sha256": part.sha256} for kind, part in zip(PARTS[1:], rest, strict=False)},
        }


def part_files(name: str, count: int) -> tuple[str, ...]:
    """Return the paths of a tensor's first ``count`` parts, relative to the model folder."""
    return tuple(f"weights/{name}{'' if kind == PARTS[0] else '.' + kind}.npy" for kind in PARTS[:count])


def weight_dtype(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return what a weight is stored as in a store of ``dtype``.

    Only matrices are quantised. Vectors, thousands of times smaller, stay float32; so do routers, since the least
    change of one can send a token to another expert.
    """
    is_matrix = len(shape) > 1 and not name.endswith("router.weight")
    return dtype if is_matrix or dtype not in PACKINGS else "float32"


def layout(config: ModelConfig, dtype: str) -> dict[str, Entry]:
    """List the tensors of a store, without their digests.

    Parameters
    ----------
    config : ModelConfig
        A tied model has no ``output.weight``.
    dtype : str
        Of the weights; a quantised store keeps small tensors, and every store the RoPE frequencies, in float32.

    Returns
    -------
    dict of str to Entry
        In the order of the forward pass; the RoPE frequencies, of shape (Dh/2,), come last, where there are any.
    """
    shapes = {name: wanted.shape for name, wanted in expected(config).items()}
    table = {name: Entry(name, weight_dtype(name, shape, dtype), shape) for name, shape in shapes.items()}
    longrope = config.rope_scaling is not None and config.rope_scaling.kind == "longrope"
    for name, there in {ROPE_FREQS: True, ROPE_FREQS_LONG: longrope}.items():
        if there and config.positions == "rope":
            table[name] = Entry(name, "float32", (config.head_dim // 2,))
    return table


def producer() -> str:
    """Name and version of the program that writes."""
    return f"npllama {VERSION}"


def ties(config: ModelConfig) -> dict[str, str]:
    """Names that are other names' tensors."""
    return {OUTPUT: EMBEDDING} if config.tied else {}


def is_model_folder(folder: Path) -> bool:
    """Tell whether npllama wrote a folder, however old, new or damaged the rest of it is."""
    try:
        document = json.loads((folder / FILE_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("producer")).startswith("npllama ")


def encode(document: Mapping[str, Any]) -> bytes:
    """Write a manifest; the digest is added, or replaced."""
    body = {key: value for key, value in document.items() if key != "digest"}
    lines = [f"{json.dumps(key)}: {_spread(value)}" for key, value in {**body, "digest": _digest(body)}.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("ascii")


def decode(text: bytes, file: str) -> dict[str, Any]:
    """Read a manifest and check all of it that can be checked without the other files.

    Raises
    ------
    VersionError
        Written by a newer npllama.
    CorruptDataError
        Not what `encode` wrote.
    ConfigError, ConfigMismatchError
        The configuration is impossible, or the tensors are not those that it asks for.
    """
    document = parse_object(text, error=CorruptDataError, file=file)
    version = document.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise _corrupt(f"format_version is {version!r}, expected {FORMAT_VERSION}", file)
    if version > FORMAT_VERSION:
        raise VersionError(
            f"format version {version}; this npllama reads up to {FORMAT_VERSION}",
            file=file,
            remedy="Update npllama, or convert the checkpoint again with this one.",
        )
    for key, kind in _KEYS.items():
        if not isinstance(document.get(key), kind) or key not in document:
            raise _corrupt(f"{key} is {_shorten(document.get(key))}", file)
    body = {key: value for key, value in document.items() if key != "digest"}
    if document["digest"] != _digest(body):
        raise _corrupt("the digest of the manifest does not fit its content", file)
    _check_content(document, file)
    return document


def entries(document: Mapping[str, Any], config: ModelConfig, file: str) -> dict[str, Entry]:
    """Return the tensors of a manifest, which must be exactly those of the configuration.

    Raises
    ------
    ConfigMismatchError, CorruptDataError
        They are not.
    """
    lines = document["tensors"]
    if config.n_layers > len(lines):  # before a table of that many layers is made
        raise _mismatch(f"{config.n_layers} layers cannot be {len(lines)} tensors", file)
    wanted = layout(config, document["dtype"])
    found = [line.get("name") if isinstance(line, dict) else None for line in lines]
    if found != list(wanted):
        position = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(wanted))
        raise _mismatch(f"{len(found)} tensors, expected {len(wanted)}; they differ first at number {position}", file)
    table = {}
    for line, entry in zip(lines, wanted.values(), strict=True):
        sha256 = _digests(line, len(entry.parts))
        for digest in sha256:
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                raise _corrupt(f"the sha256 is {_shorten(digest)}", file, entry.name)
        table[entry.name] = replace(entry, sha256=sha256)
        if line != table[entry.name].to_json() or any(isinstance(axis, bool) for axis in line["shape"]):
            raise _mismatch(f"{_shorten(line)} is not what the configuration asks for", file, entry.name)
    return table


def _digests(line: Mapping[str, Any], count: int) -> tuple[Any, ...]:
    """Return whatever a tensor's line has where its parts' digests should be."""
    places = (line, *(line.get(kind) for kind in PARTS[1:count]))
    return tuple(place.get("sha256") if isinstance(place, dict) else None for place in places)


def _check_content(document: Mapping[str, Any], file: str) -> None:
    """Check the keys that stand alone."""
    config = ModelConfig.from_json(document["config"], file)
    checks = {
        "complete": document["complete"],
        "dtype": document["dtype"] in DTYPES,
        "rope_layout": document["rope_layout"] == "interleaved",
        "tied": document["tied"] == ties(config),
        "tokenizer": all(_is_tokenizer_line(line) for line in document["tokenizer"]),
        "notes": all(isinstance(note, str) for note in document["notes"]),
        "truncated": document["truncated"] is None or _is_truncation(document["truncated"], config.n_layers),
    }
    for key, fine in checks.items():
        if not fine:
            raise _corrupt(f"{key} is {_shorten(document[key])}", file)


def _is_truncation(value: Mapping[str, Any], n_layers: int) -> bool:
    return (
        set(value) == {"layers", "of"}
        and all(type(number) is int for number in value.values())
        and value["layers"] == n_layers < value["of"]
    )


def _is_tokenizer_line(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and set(line) == {"file", "sha256"}
        and all(isinstance(value, str) for value in line.values())
        and TOKENIZER_FILE.fullmatch(line["file"]) is not None
        and _SHA256.fullmatch(line["sha256"]) is not None
    )


def _spread(value: Any) -> str:
    """Spell a value; a list of objects gets one line for each."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "\n]"
    return json.dumps(value)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _corrupt(message: str, file: str, record: str | None = None) -> NpllamaError:
    return CorruptDataError(message, file=file, record=record, remedy="Convert the checkpoint again.")


def _mismatch(message: str, file: str, record: str | None = None) -> NpllamaError:
    return ConfigMismatchError(message, file=file, record=record, remedy="Convert the checkpoint again.")
