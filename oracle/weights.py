"""Weights of a model folder as torch tensors, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from npllama.checkpoint.names import expected
from npllama.config import ModelConfig
from npllama.dtypes import Tensor
from npllama.errors import ParameterError

#: Dtypes that a forward pass can run in, by name.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

#: How the bits of a stored dtype are to be read. What is not here is stored as integers and their scales.
_STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Weights by their names, for example "attention.wq.weight"; what a model does not have is not in it.
Named: TypeAlias = Mapping[str, torch.Tensor]


class Source(Protocol):
    """Where weights come from: `npllama.checkpoint.store.Store`, or anything that answers alike."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its canonical name."""

    def frequencies(self) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Return the RoPE inverse frequencies, (Dh/2,), of short texts and of long ones; None for what is not there."""


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
        Usually a memory map. bfloat16 bits are read as what they are, not computed with; integers with scales are the
        numbers that they stand for, exact in float64.
    dtype : torch.dtype
        Of the result. Widening is exact; what is wider is rounded once, as ``.to`` does it.
    index : any
        Index along the first axes.

    Returns
    -------
    torch.Tensor
        It owns its memory: torch has no read-only tensors, and the file must stay as it is.
    """
    if tensor.dtype in _STORED:
        return torch.from_numpy(np.array(tensor.data[index])).view(_STORED[tensor.dtype]).to(dtype)
    return torch.from_numpy(tensor.numbers(index, np.float64)).to(dtype)


class WeightReader:
    """Reads a model's weights when they are asked for, and keeps none.

    Parameters
    ----------
    source : Source
    dtype : torch.dtype
        What they are converted to.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        table = expected(replace(source.config, tied=False)).values()
        self._names = [entry.name for entry in table if not entry.stacked]

    def under(self, prefix: str) -> Named:
        """Read every weight whose canonical name begins so, ``layers.0.`` for example, but for the experts'.

        Returns
        -------
        mapping of str to torch.Tensor
            By the rest of the name.
        """
        return {name[len(prefix) :]: self.rows(name) for name in self._names if name.startswith(prefix)}

    def rows(self, name: str, index: Any = ...) -> torch.Tensor:
        """Read (the indexed rows of) one weight by its canonical name."""
        return to_torch(self._source.tensor(name), self._dtype, index)
