"""Compile every kernel before the first token needs it, so that waiting can be shown as what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npllama.dtypes import PACKINGS, SCALE, STORAGE, Array, Tensor, n_groups


def compile_kernels(
    ops: Any,
    dtype: str,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    layer_norm: bool = False,
    gated: bool = True,
) -> None:
    """Call every kernel that a model needs once, with tiny arrays of the types that it brings.

    Parameters
    ----------
    ops : namespace
        The kernels, by the names of their operations.
    dtype : str
        Of the model's matrices: "float32", "bfloat16", "int8" or "int4"; with these two its vectors are float32.
    progress : callable, optional
        Called as ``progress("compiling kernels", done, total)``.
    layer_norm, gated : bool
        The model has LayerNorm, and not RMSNorm; its feed-forward layer has a gate.
    """

    def stored(*shape: int) -> Tensor:
        return _zeros(dtype if len(shape) > 1 or dtype not in PACKINGS else "float32", shape)

    def attend(n_new: int) -> Array:
        keys = np.ones((n_new, 1, 2), np.float32)
        context: Array = ops.attention(np.ones((n_new, 1, 2), np.float32), keys, keys, lambda name, x: x)
        return context

    square = np.ones((2, 2), np.float32)
    steps: tuple[Callable[[], object], ...] = (
        lambda: ops.linear(square, stored(2, 2)),
        lambda: ops.linear(np.ones((1, 64), np.float32), stored(64, 64)),
        *(
            # Enough work to be shared between threads, for one, two and three matrices at a time.
            lambda count=count: ops.linears(np.ones((160, 256), np.float32), [stored(256, 256)] * count)
            for count in (1, 2, 3)
        ),
        lambda: attend(1),
        (lambda: ops.layer_norm(square, stored(2), stored(2), 1e-5))
        if layer_norm
        else (lambda: ops.rms_norm(square, stored(2), 1e-5)),
        lambda: ops.apply_rope(square[None], square[:1, :1], square[:1, :1]),
        (lambda: ops.glu(square, square, "silu")) if gated else (lambda: ops.activate(square, "silu")),
        lambda: ops.softmax(square),
    )
    for done, step in enumerate(steps):
        if progress is not None:
            progress("compiling kernels", done, len(steps))
        step()
    if progress is not None:
        progress("compiling kernels", len(steps), len(steps))


def _zeros(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor of zeros; read-only like a memory map, since Numba compiles for read-only arrays apart."""

    def array(kind: str, *lengths: int) -> Array:
        zeros = np.zeros(lengths, STORAGE[kind])
        zeros.setflags(write=False)
        return zeros

    packing = PACKINGS.get(dtype)
    if packing is None:
        return Tensor(array(dtype, *shape), dtype)
    rows, width = shape
    scales, minima = (array(SCALE, rows, n_groups(width)) for _ in range(2))
    data = array(packing.storage, rows, packing.row_bytes(width))
    return Tensor(data, dtype, scales, minima if packing.has_minima else None, width)
