"""Twin of `npllama.ops.apply_rope`, bit by bit.

Nothing is fused: of ``a cos - b sin`` either product could be, and which one it is would differ between the kernels
that turn heads.
"""

from __future__ import annotations

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.jit import compiled
from npllama.kernels.threads import rows_worth, share


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turn each interleaved pair of each head by its position's angle. See `npllama.ops.apply_rope`."""
    y = np.empty_like(x)
    share(len(x), lambda a, b: _apply_rope(x[a:b], cos[a:b], sin[a:b], y[a:b]), least=rows_worth(x))
    return y


@compiled(exact=True)
def _apply_rope(x: Array, cos: Array, sin: Array, y: Array) -> None:
    n_new, n_heads, head_dim = x.shape
    for t in range(n_new):
        for h in range(n_heads):
            for j in range(head_dim // 2):
                a, b = x[t, h, 2 * j], x[t, h, 2 * j + 1]
                y[t, h, 2 * j] = a * cos[t, j] - b * sin[t, j]
                y[t, h, 2 * j + 1] = a * sin[t, j] + b * cos[t, j]
