"""Mistakes in RoPE: its frequencies, its layout, its positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from npllama.check.mistakes.entry import Altered, Array, Mistake, Plant, Way, decodes, shown, where, with_layers
from npllama.check.rerun import Rerun, Seen
from npllama.checkpoint.rope import frequencies, inverse_frequencies
from npllama.config import ModelConfig, RopeScaling
from npllama.dtypes import Tensor
from npllama.model import rope_at
from npllama.weights import LayerWeights


def frequencies_of(change: Callable[[ModelConfig], ModelConfig | None]) -> Plant:
    """Turn with the frequencies of another configuration; no mistake when they are the model's own."""

    def plant(run: Rerun) -> Rerun | None:
        config = change(run.config)
        if config is None or config == run.config:
            return None
        own, divisors = run.config.rope_scaling, None
        if own is not None and own.kind == "factors" and run.weights.rope_freqs is not None:
            # They came as a tensor of the checkpoint, and are found again in the frequencies they were applied to.
            divisors = inverse_frequencies(replace(run.config, rope_scaling=None)) / run.weights.rope_freqs
        freqs, long = frequencies(config, divisors)
        return replace(run, weights=replace(run.weights, rope_freqs=freqs, rope_freqs_long=long))

    return where("rope", plant)


def theta(value: float) -> Plant:
    """Turn with another base."""
    return frequencies_of(lambda config: replace(config, rope_theta=value))


def factor(value: float) -> Plant:
    """Stretch the frequencies as Llama 3.1 does, by another factor than the model's."""

    def change(config: ModelConfig) -> ModelConfig | None:
        scaling = config.rope_scaling or RopeScaling("llama3")
        return replace(config, rope_scaling=replace(scaling, factor=value)) if scaling.kind == "llama3" else None

    return frequencies_of(change)


def to_pairs(x: Array) -> Array:
    """Reorder the last axis (Dh) from halves ``[x0 x1 .. | y0 y1 ..]`` to interleaved pairs ``[x0 y0 x1 y1 ..]``."""
    return np.ascontiguousarray(x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2)).reshape(x.shape)


def to_halves(x: Array) -> Array:
    """Reorder the last axis (Dh) from interleaved pairs to halves."""
    return np.ascontiguousarray(x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2)).reshape(x.shape)


def turned(turn: Callable[[Callable[..., Array], Array, Array, Array], Array]) -> Plant:
    """Turn in another way: ``turn(rope, x, cos, sin)``, where ``rope`` is how it should be done."""
    return where(
        "rope",
        lambda run: run.with_ops(apply_rope=lambda x, cos, sin: turn(run.ops.apply_rope, x, cos, sin)),
    )


def unturned(seen: Seen, name: str) -> Array:
    """Return queries ("q") or keys ("k") as they are before RoPE: behind their norm, where they have one."""
    return seen[f"{name}_norm" if f"{name}_norm" in seen else name]


def not_turned(*names: str) -> Plant:
    """Leave queries ("q"), keys ("k") or both as they are."""
    change = {f"{name}_rope": lambda x, seen, name=name: unturned(seen, name) for name in names}
    return where("rope", shown(**change))


def norms_in(order: Callable[[Array], Array], run: Rerun) -> Rerun:
    """Put the weights of the norms of queries and keys into another order within each head."""

    def reordered(weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        return Tensor(order(weight.numbers().reshape(-1, run.config.head_dim)).reshape(-1), "float32")

    def change(w: LayerWeights) -> LayerWeights:
        return replace(w, q_norm=reordered(w.q_norm), k_norm=reordered(w.k_norm))

    return with_layers(run, change)


def rows_in(order: Callable[[Array], Array]) -> Plant:
    """Take the rows of wq and wk for ones in another order within each head, with their biases and their norms."""
    reordered = shown(q=lambda x, seen: order(x), k=lambda x, seen: order(x))
    return where("rope", lambda run: reordered(norms_in(order, run)))


def positions(place: Callable[[int], int], *, decoding: bool = False) -> Plant:
    """Let a forward call that begins at ``start`` believe that it begins at ``place(start)``."""

    def plant(run: Rerun) -> Rerun | None:
        tables = run.ops.rope_tables
        changed = run.with_ops(rope_tables=lambda freqs, start, *rest: tables(freqs, place(start), *rest))
        return None if decoding and not decodes(run) else changed

    return where("rope", plant)


def values_turned(run: Rerun) -> Rerun:
    """Turn the values as well, on their way into the cache."""

    def altered(cache: Any, seen: Seen) -> Any:
        def append(layer: int, k: Array, v: Array) -> Any:
            end = cache.length + len(v)
            tables = rope_at(run.weights, run.config, run.ops, cache.length, len(v), max(cache.horizon, end))
            return cache.append(layer, k, run.ops.apply_rope(v, *tables))

        return Altered(cache, append=append)

    return replace(run, cache=altered)


Q_ROPE, K_ROPE = "layers.0.q_rope", "layers.0.k_rope"

ENTRIES = (
    Mistake(
        "rope-theta",
        "The base of the RoPE frequencies is not the model's.",
        "q_rope and k_rope differ from position 1 on, in all pairs but the first; short prompts still read well.",
        "Read rope_theta from the checkpoint: 10000 for Llama 1 and 2, 500000 for Llama 3.",
        tuple(Way(f"{value:.0f}", Q_ROPE, theta(value)) for value in (1e4, 1e5, 5e5, 1e6)),
    ),
    Mistake(
        "rope-scaling-missing",
        "The RoPE frequencies are not stretched, although the model's are.",
        "q_rope and k_rope differ in the slow pairs only, more with every position; long texts fall apart.",
        "Apply the checkpoint's rope_scaling; Meta's params.json only says use_scaled_rope.",
        (Way("", Q_ROPE, frequencies_of(lambda config: replace(config, rope_scaling=None))),),
    ),
    Mistake(
        "rope-scaling-factor",
        "The RoPE frequencies are stretched by a factor that is not the model's.",
        "q_rope and k_rope differ in the slow pairs only, and by little at short distances.",
        "The factor is 8 for Llama 3.1 and 3.3, 32 for Llama 3.2 1B and 3B; Llama 3.0 has none.",
        tuple(Way(f"{value:.0f}", Q_ROPE, factor(value)) for value in (8.0, 32.0)),
    ),
    Mistake(
        "rope-on-halves",
        "RoPE turns number j with number j + Dh/2, but the rows are in interleaved pairs.",
        "q_rope and k_rope differ everywhere but at position 0; the text is fluent for some words, then rubbish.",
        "Turn neighbours, (x[2j], x[2j+1]), or bring the rows of wq and wk into halves first.",
        (Way("", Q_ROPE, turned(lambda rope, x, cos, sin: to_halves(rope(to_pairs(x), cos, sin)))),),
    ),
    Mistake(
        "rope-row-order",
        "The rows of wq and wk, with what belongs to them, are in another order than RoPE expects.",
        "q and k differ already, as permutations within each head, at every position.",
        "Hugging Face's rows are in halves, Meta's in pairs: permute once, and K by its own number of heads.",
        (
            Way("left in halves", "layers.0.q", rows_in(to_halves)),
            Way("permuted twice", "layers.0.q", rows_in(to_pairs)),
        ),
    ),
    Mistake(
        "rope-backwards",
        "RoPE turns by the negative angle.",
        "q_rope and k_rope differ from position 1 on, at exactly the right length.",
        "A pair is (a cos - b sin, a sin + b cos): look for a swapped sign or swapped halves.",
        (Way("", Q_ROPE, turned(lambda rope, x, cos, sin: rope(x, cos, -sin))),),
    ),
    Mistake(
        "rope-missing",
        "Queries, keys or both are not turned at all.",
        "q_rope equals q, or k_rope equals k; word order hardly matters to the model.",
        "Apply RoPE to queries and keys, before keys go into the cache.",
        (
            Way("queries and keys", Q_ROPE, not_turned("q", "k")),
            Way("queries", Q_ROPE, not_turned("q")),
            Way("keys", K_ROPE, not_turned("k")),
        ),
    ),
    Mistake(
        "rope-on-values",
        "RoPE is applied to the values as well.",
        "Probabilities are right, but the context differs from position 1 on.",
        "Turn queries and keys only.",
        (Way("", "layers.0.context", where("rope", values_turned)),),
    ),
    Mistake(
        "positions-off-by-one",
        "Positions are counted from one, or from minus one.",
        "q_rope and k_rope differ, the logits do not: RoPE sees distances only.",
        "The first token is at position 0, BOS included.",
        (
            Way("one ahead", Q_ROPE, positions(lambda start: start + 1)),
            Way("one behind", Q_ROPE, positions(lambda start: start - 1)),
        ),
    ),
    Mistake(
        "positions-at-decode",
        "The prefill has the right positions, the decode steps have not.",
        "The prefill is perfect; q_rope and k_rope differ at the first decode step.",
        "A decode step is at the position that equals the number of cached ones.",
        tuple(
            Way(label, Q_ROPE, positions(place, decoding=True), step=1)
            for label, place in (
                ("one ahead", lambda start: start + (start > 0)),
                ("one behind", lambda start: start - (start > 0)),
                ("from zero again", lambda start: 0),
            )
        ),
    ),
)
