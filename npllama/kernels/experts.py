"""Twin of `npllama.ops.expert_linear`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from npllama.dtypes import Array, Tensor
from npllama.kernels.matmul import linear


def expert_linear(x: Array, chosen: NDArray[np.int64], stack: Tensor, n_experts: int) -> Array:
    """Multiply each row by the matrix of its own expert. See `npllama.ops.expert_linear`."""
    return expert_linear_by(linear, x, chosen, stack, n_experts)


def expert_linear_by(
    linear: Callable[[Array, Tensor], Array], x: Array, chosen: NDArray[np.int64], stack: Tensor, n_experts: int
) -> Array:
    """Do `expert_linear` by the ``linear`` of some path."""
    m = stack.shape[0] // n_experts
    y = np.empty((*chosen.shape, m), np.float32)
    for expert in np.unique(chosen):
        mine = chosen == expert  # (T, A)
        y[mine] = linear(x[mine], stack.rows(expert * m, (expert + 1) * m))
    return y
