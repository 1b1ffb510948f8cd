"""What every reader yields: a tensor that can be read row by row, and a checkpoint made of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from math import prod

from npllama.checkpoint.source import Source
from npllama.config import ModelConfig
from npllama.dtypes import STORAGE, Array, Tensor


def _nothing() -> None:
    """Stand for a check that has nothing to do."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor in a file, known but not read.

    Attributes
    ----------
    name : str
        As the file spells it.
    shape : tuple of int
        Shape of the tensor of numbers.
    dtype : str
        Logical dtype of what ``read_rows`` yields (a key of `npllama.dtypes.STORAGE`).
    where : str
        Place for messages, for example ``consolidated.00.pth:consolidated.00/data/17``.
    read_rows : callable
        ``read_rows(start, stop)`` returns rows [start, stop) of the first axis as a new or read-only array in C order
        with the NumPy dtype ``STORAGE[dtype]`` (bfloat16 as bit patterns). A scalar counts as one row of shape ().
    nbytes : int
        Bytes that the tensor occupies in its files.
    encoding : str
        How the file stores it, where that differs from ``dtype`` (``"Q4_K"``).
    alias : hashable or None
        Equal for two tensors that are the same bytes of the same file: tied weights.
    verify : callable
        Called once after the tensor was read: checks whatever reading alone could not (a zip record's CRC-32).
        Raises CorruptDataError.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    where: str
    read_rows: Callable[[int, int], Array]
    nbytes: int
    encoding: str = ""
    alias: Hashable | None = None
    verify: Callable[[], None] = _nothing

    @property
    def n_rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as ``read_rows`` yields it."""
        return prod(self.shape[1:]) * STORAGE[self.dtype].itemsize

    def rows(self, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of the first axis."""
        return Tensor(self.read_rows(start, stop), self.dtype)

    def read(self) -> Array:
        """Read the whole tensor and verify it."""
        values = self.read_rows(0, self.n_rows)
        self.verify()
        return values.reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A checkpoint before conversion: its configuration, its tensors under canonical names, its tokenizer.

    Attributes
    ----------
    kind : str
        "meta", "hf", "gguf", or "state_dict" (the weights of one class, saved by torch by themselves).
    path : str
        What the user named.
    config : ModelConfig
        Architecture and numbers, from the checkpoint's own metadata.
    tensors : mapping of str to TensorRef
        Canonical name -> tensor of the whole model (shards merged, RoPE rows interleaved, fused rows split).
        A tied output matrix is absent.
    freq_factors : TensorRef or None
        Divisors of the RoPE inverse frequencies, shape (Dh/2,), where the file brings them (GGUF of Llama 3.1).
    tokenizer : mapping of str to bytes
        File name -> content of what goes to the store's ``tokenizer`` folder; empty when there is none.
    notes : tuple of str
        What a person should be told: assumptions made, tensors ignored.
    sources : tuple of Source
        Every file read, to record what was converted and to notice if it changed.
    rope_layout : str
        How the *source* orders the rotated rows, "interleaved" or "half-split"; the tensors here are interleaved.
    """

    kind: str
    path: str
    config: ModelConfig
    tensors: Mapping[str, TensorRef]
    freq_factors: TensorRef | None = None
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    rope_layout: str = "interleaved"
