"""Twin of `npllama.ops.swiglu`."""

from __future__ import annotations

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.jit import compiled, exp


def swiglu(gate: Array, up: Array) -> Array:
    """Gate one projection by the other: ``silu(gate) * up``. See `npllama.ops.swiglu`."""
    act = np.empty_like(gate)
    _swiglu(gate, up, act)
    return act


@compiled()
def _swiglu(gate: Array, up: Array, act: Array) -> None:
    n_new, width = gate.shape
    for t in range(n_new):
        for j in range(width):
            act[t, j] = gate[t, j] / (np.float32(1) + exp(-gate[t, j])) * up[t, j]
