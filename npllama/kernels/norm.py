"""Twins of `npllama.ops.rms_norm` and `layer_norm`."""

from __future__ import annotations

import numpy as np

from npllama.dtypes import Array, Tensor
from npllama.kernels.jit import compiled, widened
from npllama.kernels.threads import rows_worth, share


def rms_norm(x: Array, weight: Tensor, eps: float) -> Array:
    """Scale each row to a root mean square of one, then by the weight. See `npllama.ops.rms_norm`."""
    y = np.empty_like(x)
    share(len(x), lambda a, b: _rms_norm(x[a:b], weight.data, np.float32(eps), y[a:b]), least=rows_worth(x))
    return y


@compiled()
def _rms_norm(x: Array, weight: Array, eps: np.float32, y: Array) -> None:
    n_new, dim = x.shape
    for t in range(n_new):
        total = np.float32(0)
        for j in range(dim):
            total += x[t, j] * x[t, j]
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + eps)
        for j in range(dim):
            y[t, j] = x[t, j] * scale * widened(weight[j])


def layer_norm(x: Array, weight: Tensor, bias: Tensor, eps: float) -> Array:
    """Shift and scale each row to mean 0 and variance 1, then by weight and bias. See `npllama.ops.layer_norm`."""
    y = np.empty_like(x)
    share(
        len(x),
        lambda a, b: _layer_norm(x[a:b], weight.data, bias.data, np.float32(eps), y[a:b]),
        least=rows_worth(x),
    )
    return y


@compiled()
def _layer_norm(x: Array, weight: Array, bias: Array, eps: np.float32, y: Array) -> None:
    n_new, dim = x.shape
    for t in range(n_new):
        mean = np.float32(0)
        for j in range(dim):
            mean += x[t, j]
        mean /= np.float32(dim)
        total = np.float32(0)
        for j in range(dim):
            centred = x[t, j] - mean
            total += centred * centred
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + eps)
        for j in range(dim):
            y[t, j] = (x[t, j] - mean) * scale * widened(weight[j]) + widened(bias[j])
