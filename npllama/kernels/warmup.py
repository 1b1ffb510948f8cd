"""Compile every kernel before the first token needs it, so that waiting can be shown as what it is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
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
    at_once: bool = False,
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
    at_once : bool
        Its layers are run as one operation (`npllama.kernels.through_layers`).
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
        # Enough work to be shared between threads.
        lambda: ops.linear(np.ones((160, 256), np.float32), stored(256, 256)),
        lambda: attend(1),
        (lambda: ops.layer_norm(square, stored(2), stored(2), 1e-5))
        if layer_norm
        else (lambda: ops.rms_norm(square, stored(2), 1e-5)),
        lambda: ops.apply_rope(square[None], square[:1, :1], square[:1, :1]),
        (lambda: ops.glu(square, square, "silu")) if gated else (lambda: ops.activate(square, "silu")),
        lambda: ops.softmax(square),
        *([lambda: _through_one_layer(ops, stored)] if at_once else ()),
    )
    for done, step in enumerate(steps):
        if progress is not None:
            progress("compiling kernels", done, len(steps))
        step()
    if progress is not None:
        progress("compiling kernels", len(steps), len(steps))


def _through_one_layer(ops: Any, stored: Callable[..., Tensor]) -> None:
    """Run a layer of 32 numbers and one head at once."""
    config = SimpleNamespace(
        dim=32, n_heads=1, n_kv_heads=1, head_dim=32, hidden_dim=32, n_layers=1, activation="silu", norm="rms",
        norm_order="pre", norm_eps=1e-5, qk_norm="none", gated=True, positions="rope", experts=None, score_dim=None,
        window=lambda i: None,
    )  # fmt: skip
    matrices = dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w3", "w2"), stored(32, 32))
    norms = dict.fromkeys(("attention_norm", "ffn_norm"), stored(32))
    others = dict.fromkeys((*(f"{name}_bias" for name in matrices), "q_norm", "k_norm"))
    weights = SimpleNamespace(layers=(SimpleNamespace(**matrices, **norms, **others),))
    cache = SimpleNamespace(length=0, room=lambda: np.zeros((2, 1, 1, 1, 32), np.float32))
    turns = np.zeros((1, 16), np.float32)
    ops.through_layers(weights, config)(np.zeros((1, 32), np.float32), (turns, turns), cache)


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
