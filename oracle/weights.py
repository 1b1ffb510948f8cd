"""Weights of a model folder as torch tensors, one layer in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from npllama.config import ModelConfig
from npllama.dtypes import Tensor
from npllama.errors import ParameterError, UnsupportedError

#: Dtypes that a forward pass can run in, by name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

#: How the bits of a stored dtype are to be read.
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Source(Protocol):
    """Where weights come from: `npllama.checkpoint.store.Store`, or anything that answers alike."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its canonical name."""

    def rope_freqs(self) -> NDArray[np.float32]:
        """Return the RoPE inverse frequencies, shape (Dh/2,)."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a name in `DTYPES`.

    Raises
    ------
    ParameterError
        The name is not in it.
    """
    if name not in DTYPES:
        raise ParameterError(f"the dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def to_torch(tensor: Tensor, dtype: torch.dtype, index: Any = ...) -> torch.Tensor:
    """Copy (the indexed part of) a stored weight into memory and convert it.

    Parameters
    ----------
    tensor : Tensor
        Usually a memory map. bfloat16 bits are read as what they are, not computed with.
    dtype : torch.dtype
        Of the result. Widening is exact; a float32 weight is rounded to bfloat16 as ``.to`` does it.
    index : any
        Index along the first axes.

    Returns
    -------
    torch.Tensor
        It owns its memory: torch has no read-only tensors, and the file must stay as it is.

    Raises
    ------
    UnsupportedError
        The weight is stored in a dtype that torch has no twin of.
    """
    if tensor.dtype not in _STORED:
        raise UnsupportedError(
            f"the oracle does not read weights stored as {tensor.dtype}",
            remedy="Check a conversion with --dtype f32 or bf16.",
        )
    return torch.from_numpy(np.array(tensor.data[index])).view(_STORED[tensor.dtype]).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Weights of one decoder layer, by their canonical names."""

    attention_norm: torch.Tensor  # (D,)
    wq: torch.Tensor  # (H*Dh, D)
    wk: torch.Tensor  # (K*Dh, D)
    wv: torch.Tensor  # (K*Dh, D)
    wo: torch.Tensor  # (D, H*Dh)
    ffn_norm: torch.Tensor  # (D,)
    w1: torch.Tensor  # (F, D)
    w3: torch.Tensor  # (F, D)
    w2: torch.Tensor  # (D, F)


_PLACES = {
    "attention_norm": "attention_norm",
    "wq": "attention.wq",
    "wk": "attention.wk",
    "wv": "attention.wv",
    "wo": "attention.wo",
    "ffn_norm": "ffn_norm",
    "w1": "feed_forward.w1",
    "w3": "feed_forward.w3",
    "w2": "feed_forward.w2",
}


def read_layer(source: Source, i: int, dtype: torch.dtype) -> Layer:
    """Read layer ``i`` and convert it to ``dtype``."""
    return Layer(
        **{field: to_torch(source.tensor(f"layers.{i}.{place}.weight"), dtype) for field, place in _PLACES.items()}
    )
