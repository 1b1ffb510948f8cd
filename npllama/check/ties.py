"""Experts chosen at a near-tie: where a rounding decides which of two experts a token is sent to, both are right.

A choice is not continuous. Two sound runs whose routers agree to the last few bits may ask different experts, and then
nothing of what follows is close. That is no mistake, and no match either: nobody can tell. It is told from a wrong
choice by the margin between the last expert that is asked and the next one, which must be within the noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npllama.check.noise import Floors
from npllama.check.trace import TraceLike
from npllama.check.trace_format import forward_rank
from npllama.dtypes import Array

_PROBS, _WEIGHTS = ".router_probs", ".router_weights"
_IN_A_LAYER, _BEHIND_ALL = 1, 2  # first part of a tap's rank


@dataclass(frozen=True, slots=True)
class Tie:
    """A token that a candidate may rightly send to other experts than the truth does.

    Attributes
    ----------
    layer, step, row : int
        Where, and which of the step's tokens.
    """

    layer: int
    step: int
    row: int


def near_ties(candidate: TraceLike, base: TraceLike, floors: Floors) -> tuple[Tie, ...]:
    """Find the tokens that a candidate sends to other experts, or may do, where the noise decides.

    Parameters
    ----------
    candidate : TraceLike
        Without ``router_weights`` it is not known where it sends its tokens.
    base : TraceLike
        The truth, or the reference where there is none; with ``router_probs`` and ``router_weights``.
    floors : Floors
        The noise.

    Notes
    -----
    Probabilities within a squared distance of n from the right ones move a difference of two by at most sqrt(2 n).
    """
    mine = {(entry.name, entry.step) for entry in candidate.taps}
    found = []
    for name, step in floors.rows:
        weights = name.removesuffix(_PROBS) + _WEIGHTS
        if not name.endswith(_PROBS) or (weights, step) not in floors.rows:
            continue
        asked = base.read(weights, step) > 0  # (T, E)
        allowed = floors.limits.token.match * floors.rows[name, step]
        close = _margins(base.read(name, step), asked) <= np.sqrt(2 * allowed)
        if (weights, step) in mine:
            own = candidate.read(weights, step) > 0
            close &= (own != asked).any(axis=1) if own.shape == asked.shape else False
        found += [Tie(forward_rank(name)[1], step, int(row)) for row in np.flatnonzero(close)]
    return tuple(found)


def _margins(probs: Array, asked: NDArray[np.bool_]) -> NDArray[np.float64]:
    """How much more probable the last expert is that a token asks than the next one: (T, E), (T, E) -> (T,)."""
    least = np.where(asked, probs, np.inf).min(axis=1)
    next_one = np.where(asked, -np.inf, probs).max(axis=1)
    margins: NDArray[np.float64] = np.asarray(least - next_one, np.float64)
    return margins


def touched(ties: Iterable[Tie], name: str, step: int, count: int) -> NDArray[np.bool_]:
    """Tell which of the ``count`` tokens of a tensor follow from one of the choices; shape (count,).

    In its own layer a choice touches its token alone; behind that, all tokens that attend to it.
    """
    part, layer, place = forward_rank(name)
    rows = np.zeros(count, bool)
    for tie in ties:
        if part == _BEHIND_ALL or (part == _IN_A_LAYER and layer > tie.layer):
            if tie.step < step:
                rows[:] = True
            elif tie.step == step:
                rows[min(tie.row, count - 1) :] = True
        elif part == _IN_A_LAYER and (layer, step) == (tie.layer, tie.step):
            rows[tie.row] |= place > forward_rank(f"layers.{layer}{_PROBS}")[2]
    return rows
