"""A GGUF file as a checkpoint: configuration, canonical names, RoPE factors and tokenizer, all out of the one file."""

from __future__ import annotations

import os

from npllama.checkpoint.gguf.file import GgufFile, open_gguf
from npllama.checkpoint.gguf.tokenizer import tokenizer_files
from npllama.checkpoint.names import select
from npllama.checkpoint.tensor import Checkpoint
from npllama.config import from_gguf
from npllama.errors import UnsupportedError

_OUTPUT = "output.weight"
_FREQ_FACTORS = "rope_freqs.weight"
_SPLIT_COUNT = "split.count"


def open_gguf_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a GGUF file as a checkpoint.

    The rotated rows of the architecture "llama" are interleaved in GGUF files already (llama.cpp's converter reorders
    them), so every tensor is taken as it is. A file without ``output.weight`` is tied. ``rope_freqs.weight`` becomes
    ``freq_factors``. A tokenizer of a kind that npllama does not read leaves ``tokenizer`` empty and a note.

    Raises
    ------
    UnsupportedError
        An architecture or encoding that npllama does not read, or one part of a split file.
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
    config, notes = from_gguf(metadata, name, tied=_OUTPUT not in tensors, freq_factors=_FREQ_FACTORS in tensors)
    try:
        tokenizer = tokenizer_files(metadata, name)
    except UnsupportedError as problem:
        tokenizer = {}
        notes = (*notes, f"no tokenizer: {problem.message}; the model takes and gives token ids only")
    return Checkpoint(
        kind="gguf",
        path=name,
        config=config,
        tensors=select(tensors, config, "gguf", name),
        freq_factors=tensors.get(_FREQ_FACTORS),
        tokenizer=tokenizer,
        notes=notes,
        sources=(file.source,),
    )
