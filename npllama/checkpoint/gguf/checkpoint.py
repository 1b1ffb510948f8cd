"""A GGUF file as a checkpoint: configuration, canonical names, RoPE factors and tokenizer, all out of the one file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from npllama.checkpoint.assemble import assemble
from npllama.checkpoint.gguf.file import GgufFile, open_gguf
from npllama.checkpoint.gguf.tokenizer import tokenizer_files
from npllama.checkpoint.spellings import GGUF
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.config import ModelConfig, from_gguf
from npllama.dtypes import widen
from npllama.errors import ConfigMismatchError, UnsupportedError

_OUTPUT = "output.weight"
_FREQ_FACTORS = "rope_freqs.weight"
_LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
_MOST_FACTORS = 1 << 16  # far more than half of any head
_SPLIT_COUNT = "split.count"

#: Fields of a configuration of which a file's keys say nothing -> a tensor that it has where they are true.
_BIASES = {
    "qkv_bias": "blk.0.attn_q.bias",
    "attention_out_bias": "blk.0.attn_output.bias",
    "ffn_bias": "blk.0.ffn_up.bias",
}


def open_gguf_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file as a checkpoint.

    The rotated rows of the architecture "llama" are interleaved in GGUF files already (llama.cpp's converter reorders
    them); those of the others are in halves. A file without ``output.weight`` is tied. ``rope_freqs.weight`` becomes
    ``freq_factors``, the factors of longrope a part of the configuration. A tokenizer of a kind that npllama does not
    read leaves ``tokenizer`` empty and a note.

    Raises
    ------
    UnsupportedError
        An architecture or encoding that npllama does not read, or one part of a split file.
    ConfigMismatchError
        Tensors are missing, unknown, or of another shape than the metadata says.
    NpllamaError
        As `open_gguf`, `npllama.config.from_gguf`, `npllama.checkpoint.names.select` and `tokenizer_files` raise.
    """
    file = open_gguf(path)
    try:
        return _checkpoint(file)
    except BaseException:
        file.source.close()
        raise


def _checkpoint(file: GgufFile) -> Checkpoint:
    metadata, tensors, name = file.metadata, file.tensors, file.source.path
    parts = metadata.get(_SPLIT_COUNT, 1)
    if parts != 1:
        raise UnsupportedError(
            f"one of the {parts} parts of a split file",
            file=name,
            remedy="Join them with llama-gguf-split --merge and name the result.",
        )
    config, notes = from_gguf(
        metadata,
        name,
        tied=_OUTPUT not in tensors,
        freq_factors=_FREQ_FACTORS in tensors,
        biases=[field for field, tensor in _BIASES.items() if tensor in tensors],
        longrope=_longrope(tensors, name),
    )
    _check_stacks(file, config)
    spelling = GGUF[metadata["general.architecture"]]
    try:
        tokenizer = tokenizer_files(metadata, name)
    except UnsupportedError as problem:
        tokenizer = {}
        notes = (*notes, f"no tokenizer: {problem.message}; the model takes and gives token ids only")
    return Checkpoint(
        kind="gguf",
        path=name,
        config=config,
        tensors=assemble(tensors, config, "gguf", spelling, name),
        freq_factors=tensors.get(_FREQ_FACTORS),
        tokenizer=tokenizer,
        notes=notes,
        sources=(file.source,),
        rope_layout="half-split" if spelling.half_split else "interleaved",
    )


def _longrope(tensors: Mapping[str, TensorRef], file: str) -> tuple[list[float], list[float]] | None:
    """Read the factors of longrope, short and long; None where the file has none."""
    short, long = (tensors.get(name) for name in _LONGROPE)
    if short is None and long is None:
        return None
    if short is None or long is None:
        missing = _LONGROPE[short is not None]
        raise ConfigMismatchError(f"{missing} is missing", file=file, remedy="Convert the model again.")
    return _vector(short), _vector(long)


def _vector(ref: TensorRef) -> list[float]:
    """Read a short vector; how long it must be is the configuration's affair."""
    if len(ref.shape) != 1 or ref.n_rows > _MOST_FACTORS:
        raise ConfigMismatchError(
            f"its shape is {ref.shape}, expected one number for each pair of a head", file=ref.where
        )
    numbers: list[float] = widen(ref.read(), ref.dtype).tolist()
    return numbers


def _check_stacks(file: GgufFile, config: ModelConfig) -> None:
    """Raise ConfigMismatchError unless tensors of more than two axes hold one matrix for each expert."""
    count = 0 if config.experts is None else config.experts.count
    for name, depth in file.stacks.items():
        if depth != count:
            raise ConfigMismatchError(
                f"{name} holds {depth} matrices, but the model has {count} experts",
                file=file.source.path,
                remedy="The configuration and the weights belong to other models.",
            )
