"""Mistakes with sliding windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from npllama.check.mistakes.entry import Mistake, Plant, Way, with_config
from npllama.config import ModelConfig

Windows = tuple[int, ...]


def windows(change: Callable[[Windows], Windows]) -> Plant:
    """Give the layers other windows (0: none); no mistake in a model without, or where they are the same."""

    def changed(config: ModelConfig) -> ModelConfig | None:
        return replace(config, windows=change(config.windows)) if any(config.windows) else None

    return with_config(changed)


def wider(by: int) -> Plant:
    """Let every layer that has a window see so many positions more."""
    return windows(lambda widths: tuple(max(1, width + by) if width else 0 for width in widths))


SCORES = "layers.0.scores"

ENTRIES = (
    Mistake(
        "window-off-by-one",
        "The sliding window is one position too wide or too narrow.",
        "Each row of scores has one finite number more, or fewer, from the position on at which the window is full.",
        "A query sees W positions, its own included: those from t - W + 1 to t.",
        (Way("too wide", SCORES, wider(1)), Way("too narrow", SCORES, wider(-1))),
    ),
    Mistake(
        "window-missing",
        "There is no sliding window: every position sees all before it.",
        "Prompts shorter than the window are right; the scores of others have no -inf before it.",
        "Put -inf where a key lies W positions or more before its query.",
        (Way("", SCORES, windows(lambda widths: tuple(0 for _ in widths))),),
    ),
    Mistake(
        "window-on-wrong-layers",
        "The sliding windows are those of other layers.",
        "Layers that should see all positions see few, and the other way round.",
        "Read layer_types, or which layers come first: the checkpoint says which layers have a window.",
        (
            Way("the next layer's", SCORES, windows(lambda widths: (*widths[1:], widths[0]))),
            Way("on every layer", SCORES, windows(lambda widths: tuple(max(widths) for _ in widths))),
        ),
    ),
)
