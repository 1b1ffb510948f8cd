"""A ``state_dict`` that stands alone: no configuration beside it, and everything told by names and shapes.

One architecture is known: the decoder in the manner of GPT-1 that tutorials build, with ``word_embedding``,
``position_embedding`` and ``layers.{i}.attention.queries``. It has LayerNorm behind each sum, learned positions, a ReLU
and no norm before the output. Two things about its attention are its own:

- It splits a row into heads *before* it projects, so one matrix (Dh, Dh) serves all heads. As a projection of the whole
  row that is the matrix repeated along the diagonal, zero elsewhere, and so it is stored.
- It divides scores by the root of D, not of Dh.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from npllama.checkpoint.assemble import assemble
from npllama.checkpoint.names import mismatch
from npllama.checkpoint.pth.file import PthFile, open_pth
from npllama.checkpoint.spellings import GPT1_DECODER
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.config import ModelConfig
from npllama.config.model_config import model_config
from npllama.dtypes import STORAGE, Array
from npllama.errors import UnsupportedError

_EMBEDDING = "word_embedding.weight"
_POSITIONS = "position_embedding.weight"
_QUERIES = "layers.0.attention.queries.weight"
_FFN = "layers.0.feed_forward.0.weight"
_SHARED = re.compile(r"layers\.\d+\.attention\.(queries|keys|values)\.weight")
_LAYER = re.compile(r"layers\.(\d+)\.")
_LAYER_NORM_EPS = 1e-5  # torch's, which the class does not change


def open_state_dict(path: str | os.PathLike[str], *, verify_crc: bool = True) -> Checkpoint | None:
    """Open a ``.pth`` that holds the parameters of a known class.

    Parameters
    ----------
    path : path-like
        The file.
    verify_crc : bool
        As for `open_pth`.

    Returns
    -------
    Checkpoint or None
        None where the tensors are those of something else.

    Raises
    ------
    ConfigMismatchError
        Tensors are missing, unknown, or of shapes that contradict one another.
    UnsupportedError
        Projections from one head's width to the whole one, for more than one head.
    NpllamaError
        As `open_pth` raises.
    """
    path = os.fspath(path)
    with ExitStack() as stack:
        file = open_pth(path, verify_crc=verify_crc)
        stack.callback(file.source.close)
        prefix = next((name.removesuffix(_EMBEDDING) for name in file.tensors if name.endswith(_EMBEDDING)), None)
        if prefix is None or prefix + _QUERIES not in file.tensors:
            return None
        checkpoint = _checkpoint(path, file, prefix)
        stack.pop_all()
    return checkpoint


def _checkpoint(path: str, file: PthFile, prefix: str) -> Checkpoint:
    found = {name.removeprefix(prefix): ref for name, ref in file.tensors.items()}
    config = _config(found, path)
    found = {name: _repeated(ref, config.n_heads) if _SHARED.fullmatch(name) else ref for name, ref in found.items()}
    notes = [
        *file.notes,
        *([f"the names' prefix {prefix!r} was taken off"] if prefix else []),
        f"{config.n_heads} heads of {config.head_dim}, told by the shape of the projections",
        "each layer's one projection for all heads is stored along the diagonal of the usual matrix: the same numbers",
        f"scores are divided by the root of {config.dim}, the width of the model, as the class does",
        "the class keeps no vocabulary: the model takes and gives token ids only",
    ]
    return Checkpoint(
        kind="state_dict",
        path=path,
        config=config,
        tensors=assemble(found, config, "hf", GPT1_DECODER, path),
        notes=tuple(notes),
        sources=(file.source,),
    )


def _config(found: Mapping[str, TensorRef], path: str) -> ModelConfig:
    """Tell the model's numbers by the shapes of its first tensors."""
    missing = [name for name in (_POSITIONS, _FFN) if name not in found]
    if missing:
        raise mismatch("tensors are missing", missing, path)
    flat = [name for name in (_EMBEDDING, _POSITIONS, _QUERIES, _FFN) if len(found[name].shape) != 2]
    if flat:
        raise mismatch("tensors are no matrices", flat, path)
    vocab_size, dim = found[_EMBEDDING].shape
    rows, head_dim = found[_QUERIES].shape
    if not head_dim or dim % head_dim:
        raise mismatch(f"projections do not divide a width of {dim}", [f"{_QUERIES} is {(rows, head_dim)}"], path)
    n_heads = dim // head_dim
    if rows == dim != head_dim:
        raise UnsupportedError(
            f"the projections widen a head of {head_dim} to {dim}, and {n_heads} such heads do not fit into a row "
            f"of {dim}: the class that has them fails in its first call",
            file=path,
            record=_QUERIES,
            remedy="Give it projections from the head's width to the head's width, and train it again.",
        )
    uneven = [
        f"{name} is {ref.shape}, expected {(head_dim, head_dim)}"
        for name, ref in found.items()
        if _SHARED.fullmatch(name) and ref.shape != (head_dim, head_dim)
    ]
    if uneven:
        raise mismatch("projections are not of one head's width", uneven, path)
    return model_config(
        path,
        family="GPT1Decoder",
        dim=dim,
        n_layers=len({match[1] for name in found if (match := _LAYER.match(name))}),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=head_dim,
        hidden_dim=found[_FFN].shape[0],
        vocab_size=vocab_size,
        norm_eps=_LAYER_NORM_EPS,
        rope_theta=10_000.0,
        rope_scaling=None,
        max_seq_len=found[_POSITIONS].shape[0],
        tied=False,
        norm="layer",
        norm_order="post",
        final_norm=False,
        attention_out_bias=True,
        ffn_bias=True,
        output_bias=True,
        positions="learned",
        activation="relu",
        gated=False,
        score_dim=dim,
    )


def _repeated(ref: TensorRef, times: int) -> TensorRef:
    """Return a square matrix several times along the diagonal of a larger one."""
    size = ref.shape[0]

    def read_rows(start: int, stop: int) -> Array:
        block = ref.read_rows(0, size)
        rows = np.zeros((stop - start, times * size), STORAGE[ref.dtype])
        for row in range(start, stop):
            head, place = divmod(row, size)
            rows[row - start, head * size : (head + 1) * size] = block[place]
        return rows

    return replace(ref, shape=(times * size, times * size), read_rows=read_rows, alias=None)
