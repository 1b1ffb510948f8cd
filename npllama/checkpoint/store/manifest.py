"""The manifest: what a model folder holds, and the only description of it that is believed.

``manifest.json`` is JSON with one tensor on each line. Its last key, ``digest``, is the SHA-256 of the document without
that key, spelled with sorted keys and no spaces: ``json.dumps(document, sort_keys=True, separators=(",", ":"))``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npllama.checkpoint.names import EMBEDDING, OUTPUT, expected
from npllama.checkpoint.store.npy import data_bytes, header
from npllama.config import ModelConfig
from npllama.errors import ConfigMismatchError, CorruptDataError, NpllamaError, VersionError
from npllama.strict_json import parse_object
from npllama.version import VERSION

FORMAT_VERSION = 1
FILE_NAME = "manifest.json"
ROPE_FREQS = "rope.freqs"
#: Logical dtypes that the weights of a store can have.
DTYPES = ("bfloat16", "float32")

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
    sha256 : str
        Digest of the whole file, as ``sha256sum`` prints it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str = ""

    @property
    def file(self) -> str:
        """Path relative to the model folder; made from the canonical name, never taken from input."""
        return f"weights/{self.name}.npy"

    @property
    def header(self) -> bytes:
        """First bytes of the file."""
        return header(self.dtype, self.shape)

    @property
    def data_bytes(self) -> int:
        """Bytes of the numbers."""
        return data_bytes(self.dtype, self.shape)

    @property
    def file_bytes(self) -> int:
        """Exact size of the file."""
        return len(self.header) + self.data_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the tensor's line of the manifest."""
        return {
            "name": self.name,
            "file": self.file,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "group": None,
            "sha256": self.sha256,
        }


def layout(config: ModelConfig, dtype: str) -> dict[str, Entry]:
    """List the tensors of a store, without their digests.

    Parameters
    ----------
    config : ModelConfig
        A tied model has no ``output.weight``.
    dtype : str
        Of the weights; the RoPE frequencies are float32 in every store.

    Returns
    -------
    dict of str to Entry
        In the order of the forward pass; ``rope.freqs``, of shape (Dh/2,), comes last.
    """
    table = {name: Entry(name, dtype, wanted.shape) for name, wanted in expected(config).items()}
    table[ROPE_FREQS] = Entry(ROPE_FREQS, "float32", (config.head_dim // 2,))
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
        sha256 = line.get("sha256")
        if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
            raise _corrupt(f"the sha256 is {_shorten(sha256)}", file, entry.name)
        table[entry.name] = Entry(entry.name, entry.dtype, entry.shape, sha256)
        if line != table[entry.name].to_json() or any(isinstance(axis, bool) for axis in line["shape"]):
            raise _mismatch(f"{_shorten(line)} is not what the configuration asks for", file, entry.name)
    return table


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
