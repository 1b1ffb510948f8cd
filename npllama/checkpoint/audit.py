"""How far a store's numbers are from those of the checkpoint that it was converted from."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from npllama.checkpoint.names import mismatch
from npllama.checkpoint.open import open_checkpoint
from npllama.checkpoint.store import Progress, Store
from npllama.checkpoint.store.manifest import ROPE_FREQS, ROPE_FREQS_LONG
from npllama.checkpoint.tensor import TensorRef
from npllama.dtypes import Tensor, widen
from npllama.errors import ConfigMismatchError

_BLOCK_NUMBERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Error:
    """How far stored numbers are from their source, of one tensor or of several.

    Attributes
    ----------
    count : int
        Numbers.
    nbytes : int
        Bytes that they are stored in, scales and minima included.
    largest : float
        Largest absolute difference.
    squared : float
        Sum of the squared differences.
    signal : float
        Sum of the squared source.
    """

    count: int = 0
    nbytes: int = 0
    largest: float = 0.0
    squared: float = 0.0
    signal: float = 0.0

    def __add__(self, other: Error) -> Error:
        return Error(
            self.count + other.count,
            self.nbytes + other.nbytes,
            max(self.largest, other.largest),
            self.squared + other.squared,
            self.signal + other.signal,
        )

    @property
    def sqnr(self) -> float | None:
        """Signal to quantisation noise: ``10 log10(signal / squared)`` in dB; None where one of them is zero."""
        return 10 * math.log10(self.signal / self.squared) if self.squared > 0 and self.signal > 0 else None

    @property
    def bits(self) -> float:
        """Bits for each number."""
        return 8 * self.nbytes / self.count if self.count else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the measures as plain JSON values."""
        return {
            "bits_per_weight": self.bits,
            "max_error": self.largest,
            "rms_error": math.sqrt(self.squared / self.count) if self.count else 0.0,
            "sqnr_db": self.sqnr,
        }


@dataclass(frozen=True, slots=True)
class Audit:
    """The errors of a store, tensor by tensor.

    Attributes
    ----------
    store : Store
        What was measured.
    errors : dict of str to Error
        By canonical name, in the order of the forward pass. Tied names and computed tensors are not in it.
    """

    store: Store
    errors: dict[str, Error]

    @property
    def total(self) -> Error:
        """The errors of all tensors together."""
        return sum(self.errors.values(), Error())

    def to_json(self) -> dict[str, Any]:
        """Return ``{"dtype", "tensors": [{"name", "dtype", "shape", ...}], "total"}`` as plain JSON values."""
        entries = self.store.entries
        return {
            "dtype": self.store.manifest["dtype"],
            "tensors": [
                {"name": name, "dtype": entries[name].dtype, "shape": list(entries[name].shape), **error.to_json()}
                for name, error in self.errors.items()
            ],
            "total": {"weights": self.total.count, "bytes": self.total.nbytes, **self.total.to_json()},
        }


def audit(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    rope_factor: float | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Read a checkpoint again and compare it with the store that was made of it, in float64.

    Parameters
    ----------
    src : path-like
        The checkpoint.
    dst : path-like
        The model folder.
    rope_factor : float, optional
        As for `npllama.checkpoint.convert.convert`.
    progress : callable, optional
        ``progress(what, done, total)`` in weights.

    Raises
    ------
    ConfigMismatchError
        The store is not of this checkpoint: a tensor is missing there, or has another shape.
    NpllamaError
        As from opening either.
    """
    store = Store.open(dst)
    # Without CRCs: the conversion has checked what it was asked to.
    checkpoint = open_checkpoint(src, rope_factor=rope_factor, verify_crc=False)
    try:
        names = [name for name in store.entries if name not in (ROPE_FREQS, ROPE_FREQS_LONG)]
        if missing := [name for name in names if name not in checkpoint.tensors]:
            raise mismatch("tensors are missing", missing, checkpoint.path)
        weights = {name: checkpoint.tensors[name] for name in names}
        total, done = sum(math.prod(ref.shape) for ref in weights.values()), 0
        errors: dict[str, Error] = {}
        for name, ref in weights.items():
            if progress is not None:
                progress("Auditing", done, total)
            done += math.prod(ref.shape)
            if ref.shape != store.entries[name].shape:
                raise ConfigMismatchError(
                    f"{name} has the shape {store.entries[name].shape}, in the checkpoint {ref.shape}",
                    file=store.path,
                    remedy="Name the checkpoint that the folder was converted from.",
                )
            errors[name] = measure(ref, store.tensor(name))
        return Audit(store, errors)
    finally:
        for source in checkpoint.sources:
            source.close()


def measure(ref: TensorRef, stored: Tensor) -> Error:
    """Compare a tensor with its source, some rows at a time."""
    rows = max(1, _BLOCK_NUMBERS * ref.n_rows // math.prod(ref.shape))
    total = Error(nbytes=stored.nbytes)
    for start in range(0, ref.n_rows, rows):
        stop = min(start + rows, ref.n_rows)
        source = widen(ref.read_rows(start, stop), ref.dtype, np.float64)
        error = source - stored.numbers(slice(start, stop), np.float64)
        squares = [float(np.vdot(values, values)) for values in (error, source)]
        total += Error(source.size, 0, float(np.abs(error).max()), *squares)
    return total
