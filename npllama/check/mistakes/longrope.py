"""Mistakes in longrope: two sets of frequencies, and a factor for cosines and sines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from npllama.check.mistakes.entry import Array, Mistake, Plant, Way, with_config
from npllama.check.rerun import Rerun
from npllama.config import ModelConfig, RopeScaling
from npllama.weights import Weights


def longrope(config: ModelConfig) -> RopeScaling | None:
    """Return a model's scaling if it is longrope."""
    scaling = config.rope_scaling
    return scaling if scaling is not None and scaling.kind == "longrope" else None


def where_lengths(matter: Callable[[int, int, int], bool], plant: Plant) -> Plant:
    """Make a mistake in texts of certain lengths: ``matter(prefill, all tokens, original context)``."""

    def planted(run: Rerun) -> Rerun | None:
        scaling = longrope(run.config)
        if scaling is None or not matter(run.prefill, len(run.tokens), scaling.original_max_seq_len):
            return None
        return plant(run)

    return planted


def frequencies(change: Callable[[Weights], Weights]) -> Plant:
    """Use other frequencies."""
    return lambda run: replace(run, weights=change(run.weights))


def scaling_with(change: Callable[[RopeScaling], RopeScaling]) -> Plant:
    """Scale in another way; no mistake where it is the model's."""

    def changed(config: ModelConfig) -> ModelConfig | None:
        scaling = longrope(config)
        return None if scaling is None else replace(config, rope_scaling=change(scaling))

    return with_config(changed)


def not_recomputed(run: Rerun) -> Rerun:
    """Keep the keys of a short text where it becomes a long one."""
    return replace(run, anew=lambda run, before, after: False)


def cosines_only(run: Rerun) -> Rerun | None:
    """Multiply the cosines by the factor, and not the sines."""
    scaling, rope_tables = longrope(run.config), run.ops.rope_tables

    def tables(*arguments: Any) -> tuple[Array, Array]:
        _, sin = rope_tables(*arguments[:3])
        cos, _ = rope_tables(*arguments)
        return cos, sin

    return None if scaling is None or scaling.attention_factor == 1 else run.with_ops(rope_tables=tables)


Q_ROPE = "layers.0.q_rope"

ENTRIES = (
    Mistake(
        "longrope-switch",
        "The factors for short texts are used in a long one, or the other way round.",
        "q_rope and k_rope differ from position 1 on; texts on the other side of the original context are right.",
        "Texts longer than original_max_position_embeddings have the long factors, at all positions; others the short.",
        (
            Way(
                "short factors always",
                Q_ROPE,
                where_lengths(
                    lambda prefill, end, original: end > original,
                    frequencies(lambda w: replace(w, rope_freqs_long=w.rope_freqs)),
                ),
            ),
            Way(
                "long factors always",
                Q_ROPE,
                where_lengths(
                    lambda prefill, end, original: prefill <= original,
                    frequencies(lambda w: replace(w, rope_freqs=w.rope_freqs_long)),
                ),
            ),
        ),
    ),
    Mistake(
        "longrope-cache-kept",
        "The cached keys stay turned by the short factors where a text grows beyond the original context.",
        "Everything is right up to the step that crosses; there q_rope and k_rope are right and the scores differ.",
        "Compute the cache anew at that step, with the long factors.",
        (
            Way(
                "",
                "layers.0.scores",
                where_lengths(lambda prefill, end, original: prefill <= original < end, not_recomputed),
                step=1,
            ),
        ),
    ),
    Mistake(
        "longrope-attention-factor",
        "Cosines and sines are not both multiplied by the attention factor.",
        "q_rope and k_rope are too short, or turned by another angle.",
        "Multiply both by attention_factor; where there is none, by sqrt(1 + ln(max / original) / ln(original)).",
        (
            Way("missing", Q_ROPE, scaling_with(lambda scaling: replace(scaling, attention_factor=1.0))),
            Way("on the cosines only", Q_ROPE, cosines_only),
        ),
    ),
)
