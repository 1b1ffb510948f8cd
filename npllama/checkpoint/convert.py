"""Checkpoint to store: every tensor streamed, nothing half-written, nothing lost when interrupted.

The order of events makes that so. All that can be checked is checked first. A tensor's file is written under a
temporary name, reaches the disk, gets its name, and is then noted in the journal. The manifest is written when all
files are there, and the folder gets its name last.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from npllama.checkpoint.names import EMBEDDING, OUTPUT, select
from npllama.checkpoint.open import open_checkpoint
from npllama.checkpoint.rope import frequencies
from npllama.checkpoint.source import Source, is_remote
from npllama.checkpoint.store import PARTIAL, Progress
from npllama.checkpoint.store import manifest as manifests
from npllama.checkpoint.store.disk import disk_errors, locked, new_file, require_space
from npllama.checkpoint.store.journal import Journal, open_journal
from npllama.checkpoint.store.manifest import ROPE_FREQS, ROPE_FREQS_LONG, Entry
from npllama.checkpoint.store.publish import check_destination, publish, recover
from npllama.checkpoint.store.stream import write_tensor
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.config import ModelConfig
from npllama.dtypes import FLOATS, PACKINGS, Array, Tensor, widen
from npllama.errors import NpllamaError, ParameterError, UnsafeFileError, UnsupportedError
from npllama.importance import importance

#: What the caller says -> logical dtype of the weights.
DTYPES = {"bf16": "bfloat16", "f32": "float32", "int8": "int8", "int4": "int4"}

_EDGE_BYTES = 1 << 20


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str = "bf16",
    layers: int | None = None,
    force: bool = False,
    rope_factor: float | None = None,
    verify_crc: bool = True,
    allow_nan: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint to a folder of memory-mappable .npy files.

    Run again after an interruption, it resumes, and the result is the same to the byte.

    Parameters
    ----------
    src : path-like
        A checkpoint's folder or file: Meta .pth, safetensors or GGUF; local or with a scheme.
    dst : path-like
        The model folder to write, on a local disk.
    dtype : {"bf16", "f32", "int8", "int4"}
        What all weights are stored as. A source of the same dtype keeps its bits; a quantised one is first brought
        back to numbers. int8 and int4 (`npllama.checkpoint.quantize`) are for matrices, the rest stays float32; for
        them the checkpoint is read twice, first to measure what its matrices multiply (`npllama.importance`).
    layers : int, optional
        Keep only the first so many layers. The text of such a model means nothing.
    force : bool
        Replace a model folder that is there; never another folder.
    rope_factor : float, optional
        RoPE scaling factor of a Meta checkpoint whose ``params.json`` does not say.
    verify_crc : bool
        Check the CRC-32 of every record of a .pth.
    allow_nan : bool
        Convert NaN and infinities instead of refusing them.
    progress : callable, optional
        ``progress(what, done, total)`` with bytes of the output.

    Returns
    -------
    Path
        ``dst``.

    Raises
    ------
    ParameterError, DestinationExistsError, UnsupportedError
        Something that is asked for cannot be.
    DiskSpaceError, FileAccessError, LockedError
        The disk, or another conversion to the same folder.
    NpllamaError
        The checkpoint: see the readers.
    """
    storage_dtype(dtype)
    check_destination(_target(dst), force)
    checkpoint = open_checkpoint(src, rope_factor=rope_factor, verify_crc=verify_crc)
    try:
        return convert_checkpoint(
            checkpoint,
            dst,
            dtype=dtype,
            layers=layers,
            force=force,
            verify_crc=verify_crc,
            allow_nan=allow_nan,
            progress=progress,
        )
    finally:
        for source in checkpoint.sources:
            source.close()


def convert_checkpoint(
    checkpoint: Checkpoint,
    dst: str | os.PathLike[str],
    *,
    dtype: str = "bf16",
    layers: int | None = None,
    force: bool = False,
    verify_crc: bool = True,
    allow_nan: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint that is already open; parameters and errors as `convert`.

    ``verify_crc`` only records how the checkpoint was opened: work of an attempt that checked less is not taken over.
    """
    plan = _plan(checkpoint, storage_dtype(dtype), layers)
    target = _target(dst)
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            recover(target)
            check_destination(target, force)
            with _sources_unchanged(checkpoint.sources):
                known = _importance(plan, progress) if plan.dtype in PACKINGS else {}
            identity = _identity(plan, checkpoint, known, {"allow_nan": allow_nan, "verify_crc": verify_crc})
            journal = open_journal(target.with_name(target.name + PARTIAL), identity)
            with _sources_unchanged(checkpoint.sources):
                _write_tensors(plan, known, journal, allow_nan, progress)
            _write_tokenizer(journal.folder, checkpoint.tokenizer)
            config = _drop_equal_output(plan.config, journal)
            _write(
                journal.folder / manifests.FILE_NAME,
                manifests.encode(_manifest(checkpoint, plan, config, journal.done, identity["sources"])),
            )
            journal.remove()
            publish(journal.folder, target)
    return Path(dst)


# --- before the first byte -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What will be written.

    Attributes
    ----------
    config : ModelConfig
        Of the store, as far as is known before the numbers are read.
    dtype : str
        Logical dtype of the weights.
    refs : mapping of str to TensorRef
        Canonical name -> source, frequencies included, in the order of reading.
    entries : mapping of str to Entry
        The same names -> file, in the order of the forward pass.
    of_layers : int
        Layers of the checkpoint.
    """

    config: ModelConfig
    dtype: str
    refs: Mapping[str, TensorRef]
    entries: Mapping[str, Entry]
    of_layers: int


def storage_dtype(dtype: str) -> str:
    """Return the logical dtype that ``--dtype`` names; raises ParameterError."""
    if dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}", remedy=f"Choose one of: {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _target(dst: str | os.PathLike[str]) -> Path:
    if is_remote(dst):
        raise ParameterError("a model is memory-mapped, so its folder must be on a local disk", file=dst)
    # Not Path.resolve, which fails on a loop of links before anything can be said about it.
    target = Path(os.path.realpath(dst))
    if not target.name:
        raise ParameterError("not the name of a folder that could be written", file=dst)
    return target


def _plan(checkpoint: Checkpoint, dtype: str, layers: int | None) -> _Plan:
    """Check a whole checkpoint and decide what to write."""
    whole = checkpoint.config
    if layers is not None and (type(layers) is not int or not 0 < layers <= whole.n_layers):
        raise ParameterError(f"layers is {layers!r}, expected a number from 1 to {whole.n_layers}")
    tensors = select(checkpoint.tensors, whole, checkpoint.path)
    output, embedding = tensors.get(OUTPUT), tensors[EMBEDDING]
    tied = whole.tied or (output is not None and output.alias is not None and output.alias == embedding.alias)
    config = replace(whole.first_layers(whole.n_layers if layers is None else layers), tied=tied)
    entries = manifests.layout(config, dtype)
    divisors = checkpoint.freq_factors
    factors = None if divisors is None else widen(divisors.read(), divisors.dtype)
    tables = dict(zip((ROPE_FREQS, ROPE_FREQS_LONG), frequencies(whole, factors), strict=True))
    freqs = {name: _in_memory(name, values) for name, values in tables.items() if values is not None}
    # In the reader's order, which is the one that reads each file front to back.
    refs = {name: tensors[name] for name in checkpoint.tensors if name in entries} | freqs
    for name, ref in refs.items():
        if ref.dtype not in FLOATS:
            raise UnsupportedError(f"{name} has the dtype {ref.dtype}", file=ref.where)
    for name in checkpoint.tokenizer:
        if not manifests.TOKENIZER_FILE.fullmatch(f"tokenizer/{name}"):
            raise UnsafeFileError(f"{name!r} is not the name of a tokenizer's file", file=checkpoint.path)
    return _Plan(config, dtype, refs, entries, whole.n_layers)


def _in_memory(name: str, values: Array) -> TensorRef:
    return TensorRef(name, values.shape, "float32", name, lambda start, stop: values[start:stop], values.nbytes)


def _importance(plan: _Plan, progress: Progress | None) -> dict[str, Array]:
    """Measure what the matrices multiply; the embedding counts as what it is where it is the output, too."""
    sizes = {name: ref.n_rows * ref.row_bytes for name, ref in plan.refs.items() if len(ref.shape) > 1}
    total, done = sum(sizes.values()), 0

    def counted(ref: TensorRef) -> TensorRef:
        def read_rows(start: int, stop: int) -> Array:
            nonlocal done
            done += (stop - start) * ref.row_bytes
            if progress:
                progress("Measuring", done, total)
            return ref.read_rows(start, stop)

        return replace(ref, read_rows=read_rows)

    matrices = {name: counted(plan.refs[name]) for name in sizes}
    matrices |= {name: matrices[same] for name, same in manifests.ties(plan.config).items()}

    def find(name: str) -> TensorRef | Tensor | None:
        ref = plan.refs.get(name)
        return matrices.get(name) or (ref and ref.rows(0, ref.n_rows))

    tables = (plan.refs[name].read() if name in plan.refs else None for name in (ROPE_FREQS, ROPE_FREQS_LONG))
    found = importance(plan.config, find, *tables)
    if progress:
        progress("Measuring", total, total)
    # A lookup needs no measure. An output that turns out to be the embedding must have become the same integers.
    return found | ({EMBEDDING: found[OUTPUT]} if OUTPUT in found else {})


def _identity(
    plan: _Plan, checkpoint: Checkpoint, known: Mapping[str, Array], options: Mapping[str, bool]
) -> dict[str, Any]:
    """Describe everything that the output depends on, as plain JSON values."""
    return {
        "format_version": manifests.FORMAT_VERSION,
        "producer": manifests.producer(),
        "config": plan.config.to_json(),
        "dtype": plan.dtype,
        "of_layers": plan.of_layers,
        "importance": hashlib.sha256(b"".join(known[name].tobytes() for name in sorted(known))).hexdigest(),
        **{
            name: hashlib.sha256(plan.refs[name].read().tobytes()).hexdigest()
            for name in (ROPE_FREQS, ROPE_FREQS_LONG)
            if name in plan.refs
        },
        "tokenizer": {name: hashlib.sha256(content).hexdigest() for name, content in checkpoint.tokenizer.items()},
        "notes": list(checkpoint.notes),
        "sources": [{**asdict(source.fingerprint), "edges": _edges(source)} for source in checkpoint.sources],
        **options,
    }


def _edges(source: Source) -> str:
    """Digest of the first and the last MiB, where all formats keep their directories; of all of a small file."""
    first = min(_EDGE_BYTES, source.size)
    last = max(first, source.size - _EDGE_BYTES)
    return hashlib.sha256(source.read(0, first) + source.read(last, source.size - last)).hexdigest()


# --- the work ------------------------------------------------------------------------------------------------------


def _write_tensors(
    plan: _Plan, known: Mapping[str, Array], journal: Journal, allow_nan: bool, progress: Progress | None
) -> None:
    total = sum(entry.data_bytes for entry in plan.entries.values())
    done = sum(plan.entries[name].data_bytes for name in journal.done)
    what = "Starting over" if journal.restarted else "Resuming" if done else "Converting"
    require_space(journal.folder, total - done)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(what, done, total)

    advance(0)
    for name, ref in plan.refs.items():
        if name not in journal.done:
            sha256 = write_tensor(
                journal.folder,
                plan.entries[name],
                ref,
                importance=known.get(name),
                allow_nan=allow_nan,
                advance=advance,
            )
            journal.append(name, sha256)


@contextlib.contextmanager
def _sources_unchanged(sources: tuple[Source, ...]) -> Iterator[None]:
    """Raise SourceChangedError if a source changed during the block, in place of whatever error that led to."""
    try:
        yield
    except NpllamaError:
        for source in sources:
            source.check_unchanged()
        raise
    for source in sources:
        source.check_unchanged()


def _write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / "tokenizer").mkdir(exist_ok=True)
        _write(folder / "tokenizer" / name, content)


def _write(path: Path, content: bytes) -> None:
    with new_file(path, len(content)) as file:
        file.write(content)


def _drop_equal_output(config: ModelConfig, journal: Journal) -> ModelConfig:
    """Tie an output matrix that turned out to be the embedding, number for number."""
    if config.tied or journal.done[OUTPUT] != journal.done[EMBEDDING]:
        return config
    for file in manifests.part_files(OUTPUT, len(journal.done[OUTPUT])):
        (journal.folder / file).unlink(missing_ok=True)
    return replace(config, tied=True)


def _manifest(
    checkpoint: Checkpoint,
    plan: _Plan,
    config: ModelConfig,
    sha256: Mapping[str, tuple[str, ...]],
    sources: list[Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "format_version": manifests.FORMAT_VERSION,
        "producer": manifests.producer(),
        "config": config.to_json(),
        "dtype": plan.dtype,
        "rope_layout": "interleaved",
        "source_rope_layout": checkpoint.rope_layout,
        "truncated": {"layers": config.n_layers, "of": plan.of_layers} if config.n_layers < plan.of_layers else None,
        "tied": manifests.ties(config),
        "tokenizer": [
            {"file": f"tokenizer/{name}", "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in checkpoint.tokenizer.items()
        ],
        "source": {
            "kind": checkpoint.kind,
            "files": [
                {"name": source.name, "size": source.size, "edges": known["edges"]}
                for source, known in zip(checkpoint.sources, sources, strict=True)
            ],
        },
        "notes": list(checkpoint.notes),
        "tensors": [
            replace(entry, sha256=sha256[name]).to_json()
            for name, entry in manifests.layout(config, plan.dtype).items()
        ],
        "complete": True,
    }
