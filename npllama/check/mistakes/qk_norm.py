"""Mistakes in the norms of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, shown, where
from npllama.check.mistakes.rope import norms_in, to_halves
from npllama.check.rerun import Rerun, Seen, kind_of
from npllama.dtypes import Tensor
from npllama.taps import Tap


def weight_at(run: Rerun, name: str) -> Tensor:
    """Return the weight of the norm at a tap ``layers.i.q_norm`` or ``layers.i.k_norm``."""
    weight: Tensor = getattr(run.weights.layers[int(name.split(".")[1])], kind_of(name))
    return weight


def normed(run: Rerun, name: str, x: Array) -> Array:
    """Apply the norm at a tap to queries or keys x (T, H, Dh)."""
    rows = x.reshape((len(x), -1) if run.config.qk_norm == "projection" else (-1, run.config.head_dim))
    y: Array = run.ops.rms_norm(rows, weight_at(run, name), run.config.norm_eps)
    return y.reshape(x.shape)


def after_rope(run: Rerun) -> Rerun:
    """Turn first, and normalise what was turned; the taps hold what each step gives."""
    rope_tables, tables = run.ops.rope_tables, list[Array]()

    def remembered(*arguments: object) -> tuple[Array, Array]:
        tables[:] = rope_tables(*arguments)
        cos, sin = tables
        return cos, sin

    def around(inner: Tap, seen: Seen) -> Tap:
        def turned(name: str) -> Array:
            x: Array = run.ops.apply_rope(seen[kind_of(name)[0]], *tables)
            return x

        def tap(name: str, x: Array) -> Array:
            kind = kind_of(name)
            if kind in ("q_norm", "k_norm"):
                return inner(name, normed(run, name, turned(name)))
            if kind in ("q_rope", "k_rope"):
                inner(name, turned(name))
                return seen[f"{kind[0]}_norm"]
            return inner(name, x)

        return tap

    return replace(run.with_ops(rope_tables=remembered), tap=around)


def other_axes(kind: str, norm: Callable[[Array, Array, float], Array]) -> Plant:
    """Normalise over other numbers, in models that have norms of this kind and several heads.

    ``norm(x, weight, eps)`` is given heads (T, H, Dh), and the weight as the model has it.
    """

    def plant(run: Rerun) -> Rerun | None:
        def around(inner: Tap, seen: Seen) -> Tap:
            def tap(name: str, x: Array) -> Array:
                if kind_of(name) in ("q_norm", "k_norm"):
                    weight = weight_at(run, name).numbers(to=x.dtype)
                    x = norm(seen[kind_of(name)[0]], weight, run.config.norm_eps)
                return inner(name, x)

            return tap

        return replace(run, tap=around) if run.config.n_heads > 1 else None

    return where(f"qk-norm-{kind}", plant)


def over_projection(x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root mean square of all heads; every head has the same weight (Dh,)."""
    y: Array = x / np.sqrt(np.mean(x * x, axis=(1, 2), keepdims=True) + eps) * weight
    return y


def over_heads(x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root mean square of each head; the weight is that of all (H * Dh,)."""
    y: Array = x / np.sqrt(np.mean(x * x, axis=2, keepdims=True) + eps) * weight.reshape(x.shape[1:])
    return y


Q_NORM, K_NORM = "layers.0.q_norm", "layers.0.k_norm"
BARE = {"q_norm": lambda x, seen: seen["q"], "k_norm": lambda x, seen: seen["k"]}

ENTRIES = (
    Mistake(
        "qk-norm-missing",
        "Queries, keys or both are not normalised, although the model has norms for them.",
        "q_norm equals q, k_norm equals k, or neither is a tap; the scores are too large.",
        "Normalise queries and keys behind their projections, before RoPE.",
        (
            Way("queries and keys", Q_NORM, where("qk-norm", shown(**BARE))),
            Way("queries", Q_NORM, where("qk-norm", shown(q_norm=BARE["q_norm"]))),
            Way("keys", K_NORM, where("qk-norm", shown(k_norm=BARE["k_norm"]))),
        ),
    ),
    Mistake(
        "qk-norm-after-rope",
        "Queries and keys are normalised after RoPE instead of before it.",
        "The heads have the right length and the wrong direction: the weights meet other numbers than they should.",
        "Normalise first, then turn.",
        (Way("", Q_NORM, where("qk-norm rope", after_rope)),),
    ),
    Mistake(
        "qk-norm-axes",
        "The norms of queries and keys are taken over other numbers than the model's.",
        "q_norm and k_norm differ by a factor for each head and position.",
        "Qwen 3 normalises each head by itself, OLMo 2 all heads of a position together.",
        (
            Way("all heads together", Q_NORM, other_axes("head", over_projection)),
            Way("each head by itself", Q_NORM, other_axes("projection", over_heads)),
        ),
    ),
    Mistake(
        "qk-norm-row-order",
        "The rows of wq and wk were brought into the order of RoPE, the weights of their norms were not.",
        "q and k are right, q_norm and k_norm differ by a factor for each column of a head.",
        "Permute the weights of the norms exactly as the rows of wq and wk.",
        (Way("", Q_NORM, where("qk-norm rope", lambda run: norms_in(to_halves, run))),),
    ),
)
