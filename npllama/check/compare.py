"""Two traces and, where there is one, the float64 truth: a verdict for each tap, and the first that differs.

NumPy only. Everything that needs no arithmetic is settled first: other tokens, another division into steps, missing
taps, other shapes and dtypes, numbers that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npllama.check import coarse, noise
from npllama.check.adapters import adapted, guide
from npllama.check.logits import summarise
from npllama.check.noise import Floors, Verdict
from npllama.check.report import Report, Side, TapRow
from npllama.check.rows import Rows, blocks, energy, squared_error
from npllama.check.ties import Tie, near_ties, touched
from npllama.check.trace import TapEntry, TraceLike
from npllama.check.trace_format import forward_rank
from npllama.dtypes import Array
from npllama.errors import TraceError

Key = tuple[str, int]

_NEAR_TIE = "a token was sent to another expert where two are equally probable, as far as rounding shows"

#: NumPy dtypes that a run's tensors may be saved in: 16-bit runs are widened, nothing is narrowed.
_SAVED_AS = {
    "int8": ("float32",),
    "float16": ("float16", "float32"),
    "bfloat16": ("float32",),
    "float32": ("float32",),
    "float64": ("float64",),
}


def compare(
    candidate: TraceLike,
    reference: TraceLike,
    truth: TraceLike | None = None,
    *,
    local: Mapping[Key, float] | None = None,
) -> Report:
    """Judge a candidate's trace.

    Parameters
    ----------
    candidate : TraceLike
        The run to judge; names and layouts of other frameworks are understood.
    reference : TraceLike
        A run that is trusted, in the candidate's dtype if possible: its own error is the noise floor.
    truth : TraceLike, optional
        A float64 run of the same model. Without one the floor is estimated, and the verdict more cautious.
    local : mapping, optional
        (tap, step) -> squared relative error of that operation alone, from `npllama.check.run.shadow_run`.

    Returns
    -------
    Report

    Raises
    ------
    TraceError
        Reference and truth are not runs of the same model on the same tokens, or a run in int8 is held against one that
        does not measure its noise (`npllama.check.coarse`).
    """
    if truth is not None and (list(truth.tokens), truth.prefill) != (list(reference.tokens), reference.prefill):
        raise TraceError(
            "the truth was fed other tokens than the reference, or in other steps",
            remedy="Record both with the same --tokens and --decode.",
        )
    coarse.check_sides(candidate, reference, truth)
    empty = Report("cannot tell", "", candidate=_side(candidate), reference=_side(reference),
                   truth=None if truth is None else _side(truth))  # fmt: skip
    refused = _other_run(candidate, reference)
    if refused is not None:
        return replace(empty, **refused)
    like = guide([trace for trace in (truth, reference, candidate) if trace is not None])
    notes: list[str] = []
    sides: list[TraceLike] = []
    for title, trace in (("candidate", candidate), ("reference", reference), ("truth", truth)):
        if trace is not None:
            trace, done = adapted(trace, like=like)
            sides.append(trace)
            notes += [f"{title}: {note}" for note in done]
    comparison = _Comparison(sides[0], sides[1], None if truth is None else sides[2], local or {})
    return comparison.report(empty, notes)


def _side(trace: TraceLike) -> Side:
    return Side(trace.producer, trace.dtype, len(trace.tokens), trace.prefill)


def _other_run(candidate: TraceLike, reference: TraceLike) -> dict[str, Any] | None:
    """Return what a report says of runs that cannot be compared tensor by tensor; None when they can."""
    mine, theirs = list(candidate.tokens), list(reference.tokens)
    common = min(len(mine), len(theirs))
    # A run that stopped decoding earlier was fed the same tokens as far as it went.
    shorter = candidate.prefill == reference.prefill <= common
    if mine[:common] != theirs[:common] or (len(mine) != len(theirs) and not shorter):
        place = next((i for i in range(common) if mine[i] != theirs[i]), common)
        found, wanted = (str(x[place]) if place < len(x) else "none" for x in (mine, theirs))
        reason = (
            f"The runs were fed other tokens: {len(mine)} and {len(theirs)}; at position {place} the candidate has "
            f"{found}, the reference {wanted}."
        )
        return {"verdict": "differs", "reason": reason, "first_divergence": "tokens", "step": 0}
    if candidate.prefill != reference.prefill:
        reason = (
            f"The candidate's prefill has {candidate.prefill} tokens, the reference's {reference.prefill}: "
            "the same tokens in other steps are other tensors. Record one of them again."
        )
        return {"verdict": "cannot tell", "reason": reason}
    return None


@dataclass(frozen=True, slots=True)
class _Comparison:
    """One comparison of traces that have the same tokens, names and layouts."""

    candidate: TraceLike
    reference: TraceLike
    truth: TraceLike | None
    local: Mapping[Key, float]

    def report(self, empty: Report, notes: list[str]) -> Report:
        mine = {(entry.name, entry.step): entry for entry in self.candidate.taps}
        theirs = {(entry.name, entry.step): entry for entry in self.reference.taps}
        foreign = any(noise.is_foreign(trace) for trace in (self.candidate, self.truth or self.reference))
        floors = noise.floors(
            self.reference, self.truth, dtype=self.candidate.dtype, foreign=foreign, n_layers=_depth(theirs)
        )
        ties = near_ties(self.candidate, self.truth or self.reference, floors)
        rows = tuple(self._row(entry, theirs[key], floors, ties) for key, entry in mine.items() if key in theirs)
        finite = [row.step for row in rows if row.name == "logits" and row.ratio is not None]
        filled = replace(
            empty,
            rows=rows,
            missing=tuple(_label(key) for key in theirs if key not in mine),
            extra=tuple(_label(key) for key in mine if key not in theirs),
            notes=(*notes, *self._notes(floors, foreign, ties)),
            logits=summarise(self.candidate, self.reference, finite),
            limits=floors.limits,
            measured=floors.measured,
        )
        return replace(filled, **_conclusion(filled))

    def _notes(self, floors: Floors, foreign: bool, ties: tuple[Tie, ...]) -> list[str]:
        notes = []
        if self.truth is None:
            exact = "the reference is exact" if self.reference.dtype == "float64" else "there is no float64 truth"
            notes.append(f"{exact}: the noise floor is estimated from dtype and depth, not measured")
        elif not floors.measured:
            notes.append(
                f"the reference computed in {self.reference.dtype}, the candidate in {self.candidate.dtype}: the "
                "noise floor is scaled from one to the other"
            )
        if self.candidate.dtype == coarse.DTYPE and not self.local:
            notes.append("a mistake that is smaller than the noise of int8 is not seen in a trace alone")
        if foreign:
            notes.append("RoPE tables computed elsewhere: two ulp of each angle are allowed at the taps they reach")
        if ties:
            notes.append(
                f"{len(ties)} tokens were sent to other experts, or may have been, where a router's margin is within"
                " the noise: what follows from that is no difference, and no match"
            )
        if floors.suspect:
            notes.append(
                f"the reference itself departs from the truth, first at {_label(floors.suspect[0])}: it is not trusted"
                " beyond what rounding explains"
            )
        return notes

    def _row(self, entry: TapEntry, wanted: TapEntry, floors: Floors, ties: tuple[Tie, ...]) -> TapRow:
        row = TapRow(entry.name, entry.step, entry.shape, "differs")
        if entry.shape != wanted.shape:
            return replace(row, finding=f"shape {entry.shape}, the reference has {wanted.shape}")
        allowed = _SAVED_AS[self.candidate.dtype]
        if entry.dtype not in allowed:
            return replace(row, finding=f"saved as {entry.dtype} by a run that says it is {self.candidate.dtype}")
        key = (entry.name, entry.step)
        mine, theirs = self.candidate.read(*key), self.reference.read(*key)
        finding, blame = _not_finite(mine, theirs)
        if finding:
            return replace(row, finding=finding, verdict="differs" if blame else "cannot tell")
        row = replace(row, **_measures(entry.name, mine, theirs))
        if key not in floors.rows:
            return replace(row, verdict="cannot tell", finding="the truth does not have it")
        base = theirs if self.truth is None else self.truth.read(*key)
        floor = floors.rows[key]
        errors = squared_error(entry.name, mine, base)
        ratios = _ratios(errors, floor)
        worst = int(ratios.argmax())
        typical, verdict = _judged(floors, ratios)
        excused = touched(ties, *key, len(ratios))
        if verdict == "differs" and excused.any() and _judged(floors, ratios[~excused])[1] != "differs":
            verdict, row = "cannot tell", replace(row, finding=_NEAR_TIE)
        if self.candidate.dtype == coarse.DTYPE:
            verdict, finding = coarse.judge(verdict, errors, energy(entry.name, base), self.local.get(key))
            row = replace(row, finding=row.finding or finding)
        total = float(energy(entry.name, theirs).sum())
        row = replace(
            row,
            ratio=float(ratios[worst]),
            typical=typical,
            token=worst + (0 if entry.step == 0 else self.reference.prefill + entry.step - 1),
            noise_db=_decibels(float(floor.sum()), total),
            verdict=verdict,
        )
        if key in self.local:
            wrong = self.local[key] > noise.local_limit(self.candidate.dtype, self.reference.dtype)
            origin = None if verdict == "match" and not wrong else "local" if wrong else "inherited"
            row = replace(row, local_db=_decibels(self.local[key], 1.0), origin=origin)
        return row


def _judged(floors: Floors, ratios: Rows) -> tuple[float | None, Verdict]:
    """Return the ratio at the median token, if there are enough of them, and the verdict on them all."""
    typical = float(np.median(ratios)) if len(ratios) >= noise.FEW else None
    return typical, floors.limits.judge(float(ratios.max(initial=0.0)), typical)


def _depth(taps: Mapping[Key, TapEntry]) -> int:
    """Layers that a trace shows; one at least."""
    return max((forward_rank(name)[1] + 1 for name, _ in taps if forward_rank(name)[0] == 1), default=1)


def _label(key: Key) -> str:
    return key[0] if key[1] == 0 else f"{key[0]}@{key[1]}"


def _not_finite(mine: Array, theirs: Array) -> tuple[str, bool]:
    """Say where numbers are missing, and whether the candidate is to blame; an empty text when all is well."""
    good, wanted = np.isfinite(mine), np.isfinite(theirs)
    masked = ~wanted & (theirs == -np.inf)
    if (~wanted & ~masked).any():
        return "the reference has numbers that are not finite", False
    if np.isnan(mine).any():
        return f"{int(np.isnan(mine).sum())} of {mine.size} numbers are NaN", True
    if not np.array_equal(good, wanted):
        odd = int((good != wanted).sum())
        return (
            f"{odd} of {mine.size} numbers are infinite, or masked, where the reference's are not, or not masked",
            True,
        )
    return "", True


def _measures(name: str, mine: Array, theirs: Array) -> dict[str, Any]:
    """Distances between two tensors of one shape; positions that the reference masks count nothing."""
    largest = squared = dot = mine_energy = their_energy = 0.0
    for _, (a, b) in blocks(name, mine, theirs):
        dot += float(np.vdot(a, b))
        mine_energy += float(np.vdot(a, a))
        their_energy += float(np.vdot(b, b))
        a -= b
        largest = max(largest, float(np.abs(a).max(initial=0.0)))
        squared += float(np.vdot(a, a))
    norms = math.sqrt(mine_energy * their_energy)
    return {
        "max_abs": largest,
        "relative_error": math.sqrt(squared / their_energy) if their_energy else math.inf if squared else 0.0,
        "cosine": min(1.0, dot / norms) if norms else float(squared == 0),
        "nmse_db": _decibels(squared, their_energy),
    }


def _decibels(squared: float, total: float) -> float:
    if squared == 0:
        return -math.inf
    return 10 * math.log10(squared / total) if total else math.inf


def _ratios(errors: Rows, floor: Rows) -> Rows:
    """Errors in units of their floors; no error is no error, whatever the floor."""
    with np.errstate(divide="ignore"):
        return np.where(errors == 0, 0.0, errors / np.where(errors == 0, 1.0, floor))


def _conclusion(report: Report) -> dict[str, Any]:
    """Draw the verdict of a whole report from its rows."""
    found: dict[Verdict, list[TapRow]] = {"match": [], "differs": [], "cannot tell": []}
    for row in report.rows:
        found[row.verdict].append(row)
    part = f"{len(report.rows)} of {len(report.rows) + len(report.missing)} tensors of the reference were compared"
    if found["differs"]:
        # Once something is wrong, the first tensor beyond the noise is where it began, clear or not by itself.
        first = next(row for row in report.rows if row.verdict == "differs" or _is_doubtful(row))
        where = f"{first.name} of {'the prefill' if first.step == 0 else f'decode step {first.step}'}"
        what = first.finding or _excess(first)
        origin = {"local": ", by its own doing", "inherited": ", from inputs that already differ"}.get(
            first.origin or "", ""
        )
        return {
            "verdict": "differs",
            "first_divergence": first.name,
            "step": first.step,
            "reason": f"The first difference is at {where}: {what}{origin}.",
        }
    if not report.rows:
        return {"verdict": "cannot tell", "reason": "The traces have no tap in common."}
    if found["cannot tell"]:
        worst = max(found["cannot tell"], key=lambda row: row.ratio or 0.0)
        what = worst.finding or _excess(worst)
        return {
            "verdict": "cannot tell",
            "reason": f"Nothing is clearly wrong, but {worst.name} of step {worst.step} is not clearly right: {what}.",
        }
    return {"verdict": "match", "reason": f"Everything agrees to within rounding; {part}."}


def _is_doubtful(row: TapRow) -> bool:
    """Tell whether a tensor was measured and found above the noise, but not far enough to be called wrong."""
    return row.verdict == "cannot tell" and row.ratio is not None and not row.finding


def _excess(row: TapRow) -> str:
    """Say how far a tensor is above its noise floor."""
    middle = "" if row.typical is None else f" ({row.typical:.3g} times at a typical token)"
    return f"{row.ratio:.3g} times the noise floor at position {row.token}{middle}"
