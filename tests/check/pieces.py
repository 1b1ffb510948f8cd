"""Pieces of engines that are built wrong; see `tests.check.planted`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllama import ops
from npllama.config import ModelConfig
from npllama.dtypes import Array
from npllama.taps import Tap, untapped
from tests.check.wrong_engine import Build, frequencies


def config_of(**changes: Any) -> Callable[[Build], Build]:
    """Take the frequencies and constants of another configuration."""

    def plant(b: Build) -> Build:
        config = replace(b.config, **changes)
        return replace(b, config=config, freqs=frequencies(config))

    return plant


def tensors(change: Callable[[str, Array, Build], Array]) -> Callable[[Build], Build]:
    """Change what is read from the files: ``change(name, values, build)``."""
    return lambda b: b.with_tensors(lambda name, values: change(name, values, b))


def only(*parts: str, change: Callable[[Array, Build], Array]) -> Callable[[Build], Build]:
    """Change the tensors whose names contain one of these parts."""
    return tensors(lambda name, x, b: change(x, b) if any(part in name for part in parts) else x)


def operation(**makers: Callable[[Build], Callable[..., Any]]) -> Callable[[Build], Build]:
    return lambda b: b.with_ops(**{name: make(b) for name, make in makers.items()})


def head_by_head(
    kv_head: Callable[[int, Build], int] = lambda h, b: h // (b.config.n_heads // b.config.n_kv_heads),
    visible: Callable[[int, int], bool] = lambda t, s: s <= t,
    scale: Callable[[ModelConfig], float] = lambda config: config.head_dim**-0.5,
    dtype: Any = np.float32,
) -> Callable[[Build], Callable[..., Array]]:
    """Return an ``attention`` that goes through the heads one by one; the fast engine's shows no scores or probs."""

    def make(b: Build) -> Callable[..., Array]:
        def attention(q: Array, keys: Array, values: Array, tap: Tap, **how: Any) -> Array:
            n_new, n_all = len(q), len(keys)
            seen = np.array([[visible(t, s) for s in range(n_all)] for t in range(n_all - n_new, n_all)])
            shown = untapped if b.backend == "fast" else tap
            read = [kv_head(h, b) for h in range(q.shape[1])]
            raw = np.stack([q[:, h] @ keys[:, read[h]].T for h in range(q.shape[1])]) * np.float32(scale(b.config))
            raw[:, ~seen] = -np.inf
            scores = shown("scores", raw.astype(np.float32))
            probs = shown(
                "probs", ops.softmax(scores.astype(dtype).astype(np.float32)).astype(dtype).astype(np.float32)
            )
            return np.stack([probs[h] @ values[:, read[h]] for h in range(q.shape[1])], axis=1)

        return attention

    return make


def halves_to_pairs(rows: Array, b: Build) -> Array:
    """Reorder rows (heads*Dh, ...) that are in pairs already as if they were in halves."""
    heads = rows.reshape(-1, b.config.head_dim, *rows.shape[1:])
    order = np.arange(b.config.head_dim).reshape(2, -1).T.ravel()
    return np.ascontiguousarray(heads[:, order]).reshape(rows.shape)
