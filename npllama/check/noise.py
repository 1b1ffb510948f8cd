"""How large an error may be before it means something: noise floors, and the thresholds of a verdict.

Two correct programs never agree to the last bit. What they may differ by is not one tolerance: it grows from tap to
tap, differs from token to token, and depends on what the run computed in. So it is measured. Where a float64 run of the
same model is at hand (the *truth*), the reference's own squared error against it, token by token, is the **noise
floor**, and a candidate's squared error is judged in units of it (its *ratio*). Without a truth the floor is
**estimated** from the dtype and the depth of the tap, and the thresholds stand further apart.

A measured floor is held between two bounds. One rounding of every number is never too much to ask (a single row of the
reference can be exact by luck); the same holds for the typical row of that tap. And what no rounding can explain is not
noise: a reference that itself departs from the truth does not raise the floor without end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from npllama.check.rows import Rows, energy, squared_error
from npllama.check.trace import TraceLike
from npllama.dtypes import Array
from npllama.errors import TraceError

Verdict = Literal["match", "differs", "cannot tell"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where a verdict turns, in units of the noise floor.

    Attributes
    ----------
    match : float
        A ratio up to this is a match.
    differs : float
        A ratio above this is a difference; between the two, nobody can tell.
    """

    match: float
    differs: float

    def judge(self, ratio: float) -> Verdict:
        """Return the verdict on a ratio."""
        if ratio <= self.match:
            return "match"
        return "differs" if ratio > self.differs else "cannot tell"


@dataclass(frozen=True, slots=True)
class Limits:
    """Thresholds for the two questions that are asked of a tensor.

    Attributes
    ----------
    token : Thresholds
        For the worst token: is there one that is wrong? A single token's rounding is a matter of luck: where one close
        score decides over a row, an honest error exceeds another honest error a hundred times now and then.
    typical : Thresholds
        For the median token, of `FEW` or more: are most of them wrong? Luck evens out, so these are closer. It does
        not where all tokens look at the same one, as trained models let them: the error of its key is everybody's.
    """

    token: Thresholds
    typical: Thresholds

    def judge(self, worst: float, typical: float | None) -> Verdict:
        """Return the verdict on a tensor: the graver one of the two."""
        verdicts = {self.token.judge(worst), "match" if typical is None else self.typical.judge(typical)}
        return next(verdict for verdict in _GRAVE_FIRST if verdict in verdicts)


_GRAVE_FIRST: tuple[Verdict, ...] = ("differs", "cannot tell", "match")

# Chosen from `tools/calibrate.py`, which prints the distributions again. In a hundred and sixty random models correct
# engines reached, measured, 150 at the worst token and 1.7 at a typical one in float32, 13 and 1.0 in bfloat16;
# estimated, 46 and 5.5 in float32, 364 and 15 in bfloat16. Mistakes begin at 3e7 in float32; the smallest ones are
# below the rounding of bfloat16. A 16-bit run is rounded anew at every tap, which leaves less to luck. So is one in
# int8 at every product: in SmolLM2 the ratios were 40 and 2.3, in a hundred random models 3.5 and 1.1. In float32,
# SmolLM2 reached 17 at a typical token of one layer's attention, with another BLAS than the reference's; one operation
# off by 1e-5 of its result is above 100.
_MEASURED_16 = Limits(token=Thresholds(100.0, 1000.0), typical=Thresholds(5.0, 30.0))
_MEASURED_32 = Limits(token=Thresholds(1000.0, 10_000.0), typical=Thresholds(40.0, 100.0))
_ESTIMATED = Limits(token=Thresholds(300.0, 30_000.0), typical=Thresholds(30.0, 1000.0))


def limits(dtype: str, *, measured: bool) -> Limits:
    """Return the thresholds for a candidate that computes in ``dtype``, with a measured or an estimated floor."""
    if not measured:
        return _ESTIMATED
    return _MEASURED_16 if dtype in ("int8", "float16", "bfloat16") else _MEASURED_32


#: Fewer tokens than these have no typical one.
FEW = 8

#: Error of one operation on the reference's inputs, in units of `typical` at depth 0: above it, the operation is wrong.
LOCAL = 100.0

#: Relative distance between a number and the one that a dtype rounds it to, at most; for int8, whose steps are those of
#: 64 numbers, what costs Gaussian ones as much.
UNIT_ROUNDOFF = {"int8": 2.0**-6, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

# A reference that is further from the truth than so many times `typical` is not noisy but wrong.
_BEYOND_ROUNDING = {"int8": 100.0, "float16": 1e4, "bfloat16": 1e4, "float32": 1e4, "float64": 1e4}
# Rounding a number with an evenly distributed logarithm costs u² / 6.5 of its square on average.
_ONE_ROUNDING = 1 / 6
# What a layer's linear maps cost, in squared roundoffs: sums in float32 or float64 round at every term, a 16-bit run
# sums in float32 and rounds the result.
_SUMS = {"int8": 1.0, "float16": 1.0, "bfloat16": 1.0, "float32": 128.0, "float64": 128.0}
# Growth of the squared error from layer to layer, in the cost of the first.
_GROWTH = 4.0
# Two float32 units in the last place of an angle: what tables of frequencies, cosines and sines differ by when they
# are computed with other libraries or in another order.
_ANGLE_ERROR = 2.0**-22
_NATIVE = ("npllama", "oracle")
# Taps before a model's first layer, and those of a layer up to its softmax. A router's softmax is not counted: what it
# gives are probabilities of a few experts, which differ by less than its logits do.
_EMBEDDED = frozenset({"tok_embeddings", "pos_embeddings", "embeddings"})
_BEFORE_SOFTMAX = frozenset({"attention_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "scores"})


def one_rounding(dtype: str) -> float:
    """Squared relative error of rounding every number of a tensor once."""
    return UNIT_ROUNDOFF[dtype] ** 2 * _ONE_ROUNDING


def typical(name: str, dtype: str, n_layers: int) -> float:
    """Squared relative error that a run in ``dtype`` may well have at a tap: a rough upper estimate from its depth.

    Parameters
    ----------
    name : str
        Canonical tap name.
    dtype : str
        What the run computes in.
    n_layers : int
        Layers below the final norm.

    Notes
    -----
    ``u² * c * (1 + 4 * d)`` with u the unit roundoff, c = 1 for 16-bit dtypes and 128 for the others (whose sums round
    at every term), and d the number of softmaxes passed, which are what spreads an error.
    """
    parts = name.split(".")
    depth = n_layers
    if name in _EMBEDDED:
        depth = 0
    elif len(parts) == 3:
        depth = int(parts[1]) + (parts[2] not in _BEFORE_SOFTMAX)
    return float(UNIT_ROUNDOFF[dtype] ** 2 * _SUMS[dtype] * (1 + _GROWTH * depth))


def alone(dtype: str) -> str:
    """Return the dtype whose noise the operations of a run make one by one, on inputs that are given.

    Runs in int8 round the same inputs to the same integers. What is left is float32.
    """
    return "float32" if dtype == "int8" else dtype


def local_limit(*dtypes: str) -> float:
    """Squared relative error above which an operation on the right inputs is wrong, in runs of these dtypes."""
    return LOCAL * max(typical("tok_embeddings", alone(dtype), 0) for dtype in dtypes)


def is_foreign(trace: TraceLike) -> bool:
    """Tell whether a trace may come from a program with RoPE tables of its own.

    npllama and its oracle read the frequencies from the store; a trace of theirs names itself, its model and its
    layout.
    """
    native = trace.producer.startswith(_NATIVE) and {"config_hash", "rope_layout"} <= set(trace.model)
    return not native


@dataclass(frozen=True, slots=True, eq=False)
class Floors:
    """Noise floors of one pair of traces.

    Attributes
    ----------
    rows : dict
        (tap, step) -> squared error that each row may have, shape (T,).
    measured : bool
        From a truth, at the candidate's own dtype.
    limits : Limits
        The thresholds that go with floors of this kind.
    suspect : list of tuple
        (tap, step) where the reference itself departs from the truth by more than any rounding.
    """

    rows: dict[tuple[str, int], Rows]
    measured: bool
    limits: Limits
    suspect: list[tuple[str, int]]


def floors(reference: TraceLike, truth: TraceLike | None, *, dtype: str, foreign: bool, n_layers: int) -> Floors:
    """Work out the noise floor of every tap, step and token.

    Parameters
    ----------
    reference : TraceLike
        Canonical names and shapes.
    truth : TraceLike, optional
        A float64 run of the same model on the same tokens.
    dtype : str
        What the candidate computes in.
    foreign : bool
        Allow for RoPE tables that were computed elsewhere, at the taps that they reach.
    n_layers : int
        Layers of the model, as far as the traces show them.

    Returns
    -------
    Floors

    Raises
    ------
    TraceError
        The truth is a run of something else, or has tensors of other shapes.
    """
    base = reference if truth is None else truth
    scale = (UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF[reference.dtype]) ** 2
    found: dict[tuple[str, int], Rows] = {}
    suspect: list[tuple[str, int]] = []
    truths = {(entry.name, entry.step): entry for entry in base.taps}
    by_name: dict[str, list[int]] = {}
    for entry in reference.taps:
        if (entry.name, entry.step) in truths:
            by_name.setdefault(entry.name, []).append(entry.step)
    for name, steps in by_name.items():
        energies = {step: energy(name, base.read(name, step)) for step in steps}
        # A row that happens to be small is as inexact as the others: it is the sum of numbers of their size.
        common = float(np.median(np.concatenate(list(energies.values()))))
        scales = {step: np.maximum(rows, common) for step, rows in energies.items()}
        if truth is None:
            cost = typical(name, dtype, n_layers)
            if reference.dtype != "float64":
                cost += typical(name, reference.dtype, n_layers)
            found.update({(name, step): cost * scales[step] for step in steps})
            continue
        errors = {step: _error(reference, truth, name, step) * scale for step in steps}
        ratios = np.concatenate([errors[step] / np.maximum(scales[step], np.finfo(float).tiny) for step in steps])
        least = max(float(np.median(ratios)), one_rounding(dtype))
        most = typical(name, dtype, n_layers) * _BEYOND_ROUNDING[dtype]
        for step in steps:
            if (errors[step] > most * scales[step]).any():
                suspect.append((name, step))
            found[name, step] = np.clip(errors[step], least * scales[step], most * scales[step])
    if foreign:
        _allow_for_angles(found, base)
    measured = truth is not None and dtype == reference.dtype
    return Floors(found, measured, limits(dtype, measured=measured), suspect)


def _error(reference: TraceLike, truth: TraceLike, name: str, step: int) -> Rows:
    mine, theirs = reference.read(name, step), truth.read(name, step)
    if mine.shape != theirs.shape:
        raise TraceError(f"{name} of step {step} has shape {mine.shape} in the reference, {theirs.shape} in the truth")
    return squared_error(name, mine, theirs)


def _allow_for_angles(found: dict[tuple[str, int], Rows], base: TraceLike) -> None:
    """Raise the floors of rotated queries and keys by two ulp of each angle, and those of all that follows in step.

    An error at q_rope that is F times the noise there causes, further on, at most F times the noise that there is: it
    spreads as that noise does. A token sees the keys of all before it, whose angles are smaller.
    """
    theta = _theta(base)
    factor: dict[int, Rows] = {}
    for entry in _forward(base, found):
        floor, tail = found[entry], entry[0].rpartition(".")[2]
        step = entry[1]
        gain = factor.get(step)
        raised = floor if gain is None else floor * (1 + gain)
        if tail in ("q_rope", "k_rope"):
            angles = _angle_error(base.read(*entry), _positions(base, step), theta)
            raised = raised + angles
            safe = np.maximum(floor, np.finfo(float).tiny)
            here = np.maximum.accumulate(angles / safe)
            factor[step] = here if gain is None else np.maximum(gain, here)
        found[entry] = raised


def _forward(base: TraceLike, found: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    known = set(found)
    return [(entry.name, entry.step) for entry in base.taps if (entry.name, entry.step) in known]


def _positions(base: TraceLike, step: int) -> Rows:
    first = 0 if step == 0 else base.prefill + step - 1
    return np.arange(first, base.prefill + step, dtype=np.float64)


def _angle_error(rotated: Array, positions: Rows, theta: float) -> Rows:
    """Squared error of each row of queries or keys (T, H, Dh) whose angles are two ulp off."""
    half = rotated.shape[-1] // 2
    freqs = theta ** (-np.arange(half) / half)
    pairs = np.square(rotated.astype(np.float64)).reshape(*rotated.shape[:2], half, 2).sum((1, 3))  # (T, Dh/2)
    off = np.outer(positions, freqs) * _ANGLE_ERROR
    rows: Rows = np.einsum("tj,tj->t", pairs, np.square(np.minimum(off, 1.0)))
    return rows


def _theta(base: TraceLike) -> float:
    """Return the base of the frequencies; where the trace does not say, 1: every pair turns as fast as the fastest."""
    config = base.model.get("config")
    value = config.get("rope_theta") if isinstance(config, dict) else None
    return float(value) if isinstance(value, int | float) and 1 < value < 1e12 else 1.0
