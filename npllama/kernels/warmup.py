"""Compile every kernel before the first token needs it, so that waiting can be shown as what it is.

Compiling takes one processor half a minute and more. So a second process compiles a share of the kernels, the first
time that they are needed: what it leaves in the folder of compiled kernels, this one finds there.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from npllama.dtypes import PACKINGS, SCALE, STORAGE, Array, Tensor, bfloat16, n_groups
from npllama.kernels.jit import cache_folder
from npllama.kernels.paths import twins

Step = Callable[[], object]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a model asks of the kernels.

    Attributes
    ----------
    dtype : str
        Of the model's matrices: "float32", "bfloat16", "int8" or "int4"; with these two its vectors are float32.
    path : str or None
        One of `npllama.kernels.features.PATHS`; None for the best one.
    activations : str
        One of `npllama.rounding.ACTIVATIONS`.
    cache_dtype : str
        One of `npllama.cache.CACHE_DTYPES`.
    layer_norm, gated : bool
        The model has LayerNorm, and not RMSNorm; its feed-forward layer has a gate.
    at_once : bool
        Its layers are run as one operation (`npllama.kernels.through_layers`).
    """

    dtype: str
    path: str | None = None
    activations: str = "float32"
    cache_dtype: str = "float32"
    layer_norm: bool = False
    gated: bool = True
    at_once: bool = False


def compile_kernels(needs: Needs, progress: Progress | None = None) -> None:
    """Call every kernel that a model needs once, with tiny arrays of the types that it brings.

    Parameters
    ----------
    needs : Needs
    progress : callable, optional
        Called as ``progress("compiling kernels", done, total)``.
    """
    mine, shared = _steps(needs)
    total = len(mine) + len(shared)

    def take(steps: Sequence[Step], done: int) -> None:
        for number, step in enumerate(steps, done):
            if progress is not None:
                progress("compiling kernels", number, total)
            step()

    with _without_collections():
        with _compiled_elsewhere(needs):
            take(mine, 0)
        take(shared, len(mine))
    if progress is not None:
        progress("compiling kernels", total, total)


def compile_share(*needs: Any) -> None:
    """Compile what another process that compiles for the same `Needs` leaves to this one."""
    with _without_collections():
        for step in _steps(Needs(*needs))[1]:
            step()


@contextmanager
def _compiled_elsewhere(needs: Needs) -> Iterator[None]:
    """Have another process compile its share, if nobody has yet; wait for it at the end.

    Whether it succeeds does not matter: what it has not compiled is compiled here.
    """
    folder = cache_folder()
    done = None if folder is None else folder / f"{'-'.join(map(str, _values(needs)))}.compiled"
    if done is None or done.exists() or not sys.executable or (os.cpu_count() or 1) < 2:
        yield
        return
    other = _started(needs)
    if other is None:
        yield
        return
    with other:
        try:
            yield
        except BaseException:
            other.kill()
            raise
    if other.returncode == 0:
        with suppress(OSError):  # a full disk: it is asked again then
            done.touch()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Let nobody look for garbage: compilers keep so much alive that a sixth of their time would go into that."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _started(needs: Needs) -> subprocess.Popen[bytes] | None:
    """Start the other process, or return None where the system does not let us."""
    command = f"from npllama.kernels.warmup import compile_share; compile_share(*{_values(needs)!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    quiet = subprocess.DEVNULL
    with suppress(OSError):
        return subprocess.Popen(
            [sys.executable, "-c", command], stdin=quiet, stdout=quiet, stderr=quiet, env=environment
        )
    return None


def _values(needs: Needs) -> tuple[Any, ...]:
    return tuple(getattr(needs, name) for name in needs.__slots__)


def _steps(needs: Needs) -> tuple[Sequence[Step], Sequence[Step]]:
    """Return what calls every kernel: the products and what is small; and the rest, which takes as long."""
    dtype, ops = needs.dtype, SimpleNamespace(**twins(needs.path, needs.activations))
    cached = bfloat16() if needs.cache_dtype == "bfloat16" else np.dtype(np.float32)

    def stored(*shape: int) -> Tensor:
        return _zeros(dtype if len(shape) > 1 or dtype not in PACKINGS else "float32", shape)

    def attend(n_new: int) -> Array:
        keys = np.ones((n_new, 1, 2), cached)
        context: Array = ops.attention(np.ones((n_new, 1, 2), np.float32), keys, keys, lambda name, x: x)
        return context

    square = np.ones((2, 2), np.float32)
    mine: tuple[Step, ...] = (
        # Enough work to be shared between threads.
        lambda: ops.linear(np.ones((160, 256), np.float32), stored(256, 256)),
        (lambda: ops.layer_norm(square, stored(2), stored(2), 1e-5))
        if needs.layer_norm
        else (lambda: ops.rms_norm(square, stored(2), 1e-5)),
        lambda: ops.apply_rope(square[None], square[:1, :1], square[:1, :1]),
        (lambda: ops.glu(square, square, "silu")) if needs.gated else (lambda: ops.activate(square, "silu")),
        lambda: ops.add(square, square),
        lambda: ops.softmax(square),
    )
    few: tuple[Step, ...] = (
        lambda: ops.linear(square, stored(2, 2)),
        lambda: ops.linear(np.ones((1, 64), np.float32), stored(64, 64)),
    )
    if needs.at_once:  # compiles most of what few tokens take, with attention last: here that is last, attention first
        return (lambda: attend(1), *mine, *few), (lambda: _through_one_layer(ops, stored, cached),)
    return (*mine, *few), (lambda: attend(1),)


def _through_one_layer(ops: Any, stored: Callable[..., Tensor], cached: np.dtype[Any]) -> None:
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
    cache = SimpleNamespace(length=0, room=lambda: np.zeros((2, 1, 1, 1, 32), cached))
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
