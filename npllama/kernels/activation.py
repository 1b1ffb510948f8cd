"""Twins of `npllama.ops.activate`, `glu` and `add`, which treat each number by itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npllama.dtypes import Array
from npllama.kernels.jit import compiled, exp
from npllama.kernels.subroutines import subroutine
from npllama.kernels.threads import share

_SILU, _RELU, _GELU, _GELU_TANH = range(4)
#: Name in a configuration -> number of the branch in `_activated`.
KINDS = {"silu": _SILU, "relu": _RELU, "gelu": _GELU, "gelu_tanh": _GELU_TANH}
_SQRT_HALF = np.float32(math.sqrt(0.5))
_SQRT_8_PI = np.float32(math.sqrt(8 / math.pi))


def activate(x: Array, activation: str) -> Array:
    """Apply an activation to numbers of any shape. See `npllama.ops.activate`."""
    y = np.empty_like(x, order="C")
    flat_x, flat_y, kind = x.reshape(-1), y.reshape(-1), KINDS[activation]
    share(x.size, lambda a, b: _activate(flat_x[a:b], flat_y[a:b], kind))
    return y


def glu(gate: Array, up: Array, activation: str) -> Array:
    """Gate one projection by the other: ``activation(gate) * up``. See `npllama.ops.glu`."""
    act = np.empty_like(gate, order="C")
    flat_gate, flat_up, flat_act, kind = gate.reshape(-1), up.reshape(-1), act.reshape(-1), KINDS[activation]
    share(act.size, lambda a, b: _glu(flat_gate[a:b], flat_up[a:b], flat_act[a:b], kind))
    return act


def add(x: Array, y: Array) -> Array:
    """Add what a step computed to the residual stream. See `npllama.ops.add`."""
    total = np.empty_like(x, order="C")
    flat_x, flat_y, flat_total = x.reshape(-1), y.reshape(-1), total.reshape(-1)
    share(x.size, lambda a, b: _add(flat_x[a:b], flat_y[a:b], flat_total[a:b]))
    return total


@compiled()
def _activate(x: Array, y: Array, kind: int) -> None:
    for j in range(x.shape[0]):
        y[j] = _activated(x[j], kind)


@compiled()
def _glu(gate: Array, up: Array, act: Array, kind: int) -> None:
    for j in range(gate.shape[0]):
        act[j] = _activated(gate[j], kind) * up[j]


@compiled()
def _add(x: Array, y: Array, total: Array) -> None:
    for j in range(x.shape[0]):
        total[j] = x[j] + y[j]


@subroutine(inline=True)
def _activated(x: Any, kind: int) -> Any:
    """One number through the activation. The branch is the same for a whole loop, and the compiler takes it out."""
    if kind == _SILU:
        return x / (np.float32(1) + exp(-x))
    if kind == _RELU:
        return max(x, np.float32(0))
    if kind == _GELU:
        return x * np.float32(0.5) * (np.float32(1) + np.float32(math.erf(x * _SQRT_HALF)))
    # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))
    return x / (np.float32(1) + exp(-_SQRT_8_PI * (x + np.float32(0.044715) * x * x * x)))
