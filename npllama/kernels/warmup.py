"""Compile every kernel before the first token needs it, so that waiting can be shown as what it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npllama.dtypes import Tensor, narrow
from npllama.kernels.activation import swiglu
from npllama.kernels.attend import attention, softmax
from npllama.kernels.matmul import linear
from npllama.kernels.norm import rms_norm
from npllama.kernels.rope import apply_rope


def compile_kernels(dtype: str, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Call every kernel once with tiny arrays of the types that a model stored in ``dtype`` brings.

    Parameters
    ----------
    dtype : str
        "float32" or "bfloat16".
    progress : callable, optional
        Called as ``progress("compiling kernels", done, total)``.
    """

    def stored(*shape: int) -> Tensor:
        data = narrow(np.ones(shape, np.float32), dtype)
        data.setflags(write=False)  # like a memory map; Numba compiles for read-only arrays apart
        return Tensor(data, dtype)

    def attend(n_new: int) -> None:
        keys = np.ones((n_new, 1, 2), np.float32)
        attention(np.ones((n_new, 1, 2), np.float32), keys, keys, lambda name, x: x)

    square = np.ones((2, 2), np.float32)
    steps: tuple[Callable[[], object], ...] = (
        lambda: linear(square, stored(2, 2)),
        lambda: linear(np.ones((8, 256), np.float32), stored(256, 256)),  # enough work to be shared between threads
        lambda: attend(1),
        lambda: attend(2),
        lambda: rms_norm(square, stored(2), 1e-5),
        lambda: apply_rope(square[None], square[:1, :1], square[:1, :1]),
        lambda: swiglu(square, square),
        lambda: softmax(square),
    )
    for done, step in enumerate(steps):
        if progress is not None:
            progress("compiling kernels", done, len(steps))
        step()
    if progress is not None:
        progress("compiling kernels", len(steps), len(steps))
