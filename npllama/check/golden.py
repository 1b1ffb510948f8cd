"""A small recorded run beside the weights, so that an installation proves itself on the processor that it runs on.

``MODEL/golden/`` holds two traces of the same few tokens, ``truth`` (float64) and ``reference`` (float32), of the taps
that see every part of the model, and ``golden.json`` with the digest of the manifest that they belong to and of every
file. Replaying it takes seconds and needs neither torch nor a network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from npllama.check.compare import compare
from npllama.check.report import Report
from npllama.check.run import Engine, run_trace
from npllama.check.trace import Trace, TraceLike, TraceWriter
from npllama.checkpoint.store import Store
from npllama.errors import FileAccessError, ParameterError, TraceError, VersionError
from npllama.strict_json import parse_object

FOLDER = "golden"
FORMAT_VERSION = 1
#: What is kept: positions (which logits cannot see), both halves of every layer, and what comes out.
TAPS = ("tok_embeddings", "*.q_rope", "*.k_rope", "*.resid_mid", "*.resid_post", "norm", "logits")

_INDEX = "golden.json"
_PREFILL, _DECODE = 10, 2
_REMEDY = "Record it again: npllama verify MODEL --record."


@dataclass(frozen=True, slots=True)
class Golden:
    """A recorded run of a model."""

    reference: Trace
    truth: Trace


def golden_tokens(vocab_size: int) -> list[int]:
    """Return the token ids of a recorded run: the same for every model of that vocabulary."""
    return [int(token) for token in np.random.default_rng(0).integers(0, vocab_size, _PREFILL + _DECODE)]


def record_golden(store: Store, reference: Engine, truth: Engine, tokens: Sequence[int] | None = None) -> Path:
    """Run a model twice and keep both runs beside its weights.

    Parameters
    ----------
    store : Store
        The model folder to write to; an older recording in it is replaced.
    reference, truth : Model
        The model in float32, best with the numpy backend, and in float64.
    tokens : sequence of int, optional
        What to run: all but the last two go in at once.

    Returns
    -------
    Path
        The golden folder.
    """
    ids = golden_tokens(store.config.vocab_size) if tokens is None else list(tokens)
    if len(ids) <= _DECODE:
        raise ParameterError(f"{len(ids)} tokens, expected more than {_DECODE}")
    runs = [run_trace(model, ids, prefill=len(ids) - _DECODE) for model in (reference, truth)]
    return write_golden(store, *runs)


def write_golden(store: Store, reference: TraceLike, truth: TraceLike) -> Path:
    """Keep a run that somebody else recorded, for example the oracle, beside the weights; see `record_golden`."""
    target = store.path / FOLDER
    partial = store.path / f"{FOLDER}.{os.getpid()}.partial"
    try:
        for name, trace in (("reference", reference), ("truth", truth)):
            _copy(trace, partial / name, store)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        index = {
            "format_version": FORMAT_VERSION,
            "manifest": store.manifest["digest"],
            "files": {path.relative_to(partial).as_posix(): _sha256(path) for path in files},
        }
        (partial / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="ascii")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as problem:
        raise FileAccessError(f"cannot write: {problem.strerror or problem}", file=target) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def open_golden(store: Store) -> Golden | None:
    """Open the run that is recorded beside a model's weights; None when there is none.

    Raises
    ------
    TraceError
        It is damaged, or belongs to other weights.
    VersionError
        Written in a newer format.
    """
    folder = store.path / FOLDER
    index = folder / _INDEX
    if not folder.exists():
        return None
    try:
        values = parse_object(index.read_bytes(), error=TraceError, file=str(index))
    except OSError as problem:
        raise TraceError(f"cannot be read: {problem.strerror or problem}", file=index, remedy=_REMEDY) from None
    version, files = values.get("format_version"), values.get("files")
    if type(version) is int and version > FORMAT_VERSION:
        raise VersionError(f"golden format {version}; this npllama reads {FORMAT_VERSION}", file=index)
    if version != FORMAT_VERSION or not isinstance(files, dict):
        raise TraceError("format_version or files is not what it must be", file=index, remedy=_REMEDY)
    if values.get("manifest") != store.manifest["digest"]:
        raise TraceError("the recorded run belongs to other weights", file=index, remedy=_REMEDY)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {_INDEX}
    if present != set(files):
        odd = sorted(present.symmetric_difference(files))
        raise TraceError(f"missing or unexpected files: {', '.join(odd[:4])}", file=folder, remedy=_REMEDY)
    for name, digest in files.items():
        if _sha256(folder / name) != digest:
            raise TraceError(f"the SHA-256 is not the one in {_INDEX}", file=folder / name, remedy=_REMEDY)
    return Golden(Trace.open(folder / "reference"), Trace.open(folder / "truth"))


def replay(model: Engine, golden: Golden) -> Report:
    """Run the recorded tokens again, and compare.

    Parameters
    ----------
    model : Model
        The installation to prove, any backend.
    golden : Golden
        From `open_golden`.

    Returns
    -------
    Report
    """
    ids = golden.reference.tokens
    largest = max(ids)
    if largest >= model.config.vocab_size:
        raise TraceError(
            f"token {largest} is outside the model's vocabulary of {model.config.vocab_size}",
            file=golden.reference.path,
            remedy=_REMEDY,
        )
    return compare(run_trace(model, ids, prefill=golden.reference.prefill), golden.reference, golden.truth)


def _copy(trace: TraceLike, path: Path, store: Store) -> None:
    """Write the taps that are kept of a trace."""
    with TraceWriter(
        path,
        producer=trace.producer,
        dtype=trace.dtype,
        tokens=trace.tokens,
        prefill=trace.prefill,
        config=store.config,
    ) as writer:
        for entry in trace.taps:
            if any(fnmatchcase(entry.name, pattern) for pattern in TAPS):
                writer.add(entry.step, entry.name, trace.read(entry.name, entry.step))
        writer.finish()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
