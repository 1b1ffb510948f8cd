"""Following one guess: how far a run with a mistake agrees with a candidate, and how well."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from npllama.check import noise
from npllama.check.adapters import adapted
from npllama.check.mistakes import Mistake, Way
from npllama.check.mistakes.entry import rounded
from npllama.check.rerun import Rerun, kind_of
from npllama.check.rows import Rows, energy, row_count, squared_error
from npllama.check.trace import MemoryTrace, TraceLike
from npllama.check.trace_format import forward_rank
from npllama.errors import TapError
from npllama.taps import tap_names

Array: TypeAlias = NDArray[Any]
Key: TypeAlias = tuple[str, int]  # tap and step, as everywhere in this folder

#: A run explains a candidate whose squared error, in every row of every tensor, is at most this many times the noise
#: of such a run. Sound engines with other orders of summation were seen to reach 13 times.
EXPLAINS = 100.0
#: Where the model as it is does not explain a tensor, a mistake must come this many times closer to be followed on.
CLOSER = 4.0


@dataclass(frozen=True, slots=True)
class Guess:
    """How well one way of one mistake explains a candidate.

    Attributes
    ----------
    mistake : Mistake or None
        None: the model as it is.
    way : Way or None
        The way in which it was made.
    ratio : float
        Largest squared error of a row, in units of the noise; infinite for a guess that was given up.
    reach : int
        How many tensors, in the order of the run, agree before one does not.
    until : tuple of (str, int) or None
        Tap and step of that one; None if all agree.
    errors : dict
        (tap, step) -> squared error of a row relative to the size of rows there, on average, as far as it was compared.
    noise : dict
        (tap, step) -> what rounding may cost there, in the same measure; empty for a guess that was given up.
    """

    mistake: Mistake | None
    way: Way | None
    ratio: float
    reach: int
    until: Key | None
    errors: dict[Key, float] = field(repr=False)
    noise: dict[Key, float] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the mistake; ``none`` for the model as it is."""
        return "none" if self.mistake is None else self.mistake.name

    @property
    def label(self) -> str:
        """Name and way."""
        return f"{self.name} ({self.way.label})" if self.way is not None and self.way.label else self.name

    @property
    def explains(self) -> bool:
        """Whether the candidate is this, up to noise."""
        return self.ratio <= EXPLAINS

    def lead_over(self, other: Guess) -> float:
        """How many times further off another guess is where it is worst; what is below the noise is no distance."""
        least = math.ulp(0.0)
        return max(
            (
                error / max(self.errors.get(key, 0.0), self.noise.get(key, 0.0), least)
                for key, error in other.errors.items()
            ),
            default=1.0,
        )


class Case:
    """One candidate, and the run that it should have been.

    Every operation of a run is given the candidate's own tensors, as far as there are any: the taps show what it makes
    of them and hand the candidate's on. So an error is that of one operation: it does not grow from layer to layer, not
    even in a model that a mistake has made chaotic, and what one mistake did does not hide what another does.

    Parameters
    ----------
    candidate : TraceLike
        Any names and layouts that `npllama.check.adapters` knows.
    clean : Rerun
        The model as it is, on the right tokens.
    """

    def __init__(self, candidate: TraceLike, clean: Rerun) -> None:
        shapes = MemoryTrace(tokens=candidate.tokens, prefill=candidate.prefill, config=clean.config)
        self._clean = clean
        self._candidate, _ = adapted(candidate, like=shapes)
        self._dtype = noise.alone(candidate.dtype)
        self._foreign = noise.is_foreign(candidate)
        names, steps = frozenset(tap_names(clean.config)), len(clean.tokens) - clean.prefill
        # Tensors to compare, in the order of the run.
        self._keys = [(tap.name, tap.step) for tap in self._candidate.taps if tap.name in names and tap.step <= steps]
        self._wanted = frozenset(self._keys)
        if not self._keys:
            raise TapError(
                "the candidate has no tensor that the model has",
                remedy="Give its tensors the names of npllama.taps.TAPS, or of a framework that is known.",
            )
        self._wrong: dict[Key, float] = {}  # what the model as it is does not explain: its errors there
        truth, errors = self._follow(clean, lambda key, error: False)
        ratios, allowed = self._measure(clean, truth, None)
        #: The guess that there is no mistake.
        self.clean = self._judged(None, None, ratios, errors, allowed)
        self._wrong = {key: errors[key] for key in self._keys if ratios[key] > EXPLAINS}

    def pursue(self, mistake: Mistake, way: Way) -> Guess | None:
        """Follow a mistake as far as the candidate does, and judge it if that is to the end.

        None where it would be no mistake.
        """
        run = way.plant(self._clean)
        if run is None:
            return None
        wrong = self.clean.until
        if wrong is not None and _place(wrong) < _place((way.first, way.step)):
            # It touches nothing so early: there it is the model as it is.
            return Guess(mistake, way, math.inf, self.clean.reach, wrong, {wrong: self.clean.errors[wrong]}, {})
        truth, errors = self._follow(run, lambda key, error: error > self._limit(key, way))
        for reach, key in enumerate(self._keys):
            # A tensor that the candidate has and this run never makes is nowhere near.
            if errors.get(key, math.inf) > self._limit(key, way):
                compared = {k: errors.get(k, math.inf) for k in self._keys[: reach + 1]}
                return Guess(mistake, way, math.inf, reach, key, compared, {})
        ratios, allowed = self._measure(run, truth, way)
        return self._judged(mistake, way, ratios, errors, allowed)

    def _judged(
        self,
        mistake: Mistake | None,
        way: Way | None,
        ratios: dict[Key, float],
        errors: dict[Key, float],
        allowed: dict[Key, float],
    ) -> Guess:
        reach = next((i for i, key in enumerate(self._keys) if ratios[key] > EXPLAINS), len(self._keys))
        until = self._keys[reach] if reach < len(self._keys) else None
        return Guess(mistake, way, max(ratios.values()), reach, until, errors, allowed)

    def _follow(self, run: Rerun, enough: Callable[[Key, float], bool]) -> tuple[MemoryTrace, dict[Key, float]]:
        """Run in float64 until an error is enough; return what was computed, and its distances from the candidate."""
        truth, errors = _empty(run, "float64"), {}

        def watch(key: Key, x: Array) -> None:
            truth.add(key[1], key[0], x)
            errors[key] = _mean(self._errors(key, x), _sizes(key[0], x))
            if enough(key, errors[key]):
                raise _GivenUp

        with contextlib.suppress(_GivenUp):
            self._play(run, "float64", watch)
        return truth, errors

    def _measure(self, run: Rerun, truth: MemoryTrace, way: Way | None) -> tuple[dict[Key, float], dict[Key, float]]:
        """Return the candidate's largest error at each tensor in units of a run's own noise, and that noise."""
        dtype = self._dtype
        rough = _empty(run, "float32" if dtype == "float64" else dtype)
        self._play(run, rough.dtype, lambda key, x: rough.add(key[1], key[0], x))
        floors = noise.floors(rough, truth, dtype=dtype, foreign=self._foreign, n_layers=run.config.n_layers)
        ratios, allowed = {}, {}
        for key in self._keys:
            x, floor = truth.read(*key), floors.rows[key]
            sizes = _sizes(key[0], x)
            allowed[key] = _mean(floor, sizes)
            if self._rounds_at(way, key):
                assert way is not None
                floor = np.maximum(floor, sizes * noise.UNIT_ROUNDOFF[way.rounds] ** 2)
            ratios[key] = _largest(self._errors(key, x), floor)
        return ratios, allowed

    def _play(self, run: Rerun, dtype: str, watch: Callable[[Key, Array], None]) -> None:
        """Run in a dtype on the candidate's tensors, and show those that it has. 16-bit runs round at every tap."""

        def tap(step: int, name: str, x: Array) -> Array:
            if dtype in ("float16", "bfloat16"):
                x = rounded(x, dtype)
            key = (name, step)
            if key not in self._wanted:
                return x
            watch(key, x)
            mine = self._candidate.read(*key)
            return mine.astype(x.dtype) if mine.shape == x.shape else x

        with np.errstate(all="ignore"):  # a mistake may well overflow
            run.play(np.dtype(np.float64 if dtype == "float64" else np.float32), tap)

    def _limit(self, key: Key, way: Way) -> float:
        """Error at which a mistake is given up.

        Half-way, in decibels, between what rounding costs and a complete miss; and where the model as it is fails to
        explain a tensor, the mistake must come much closer.
        """
        dtype = way.rounds if self._rounds_at(way, key) else self._dtype
        corridor = math.sqrt(noise.typical(key[0], dtype, self._clean.config.n_layers))
        return min(corridor, self._wrong.get(key, math.inf) / CLOSER)

    def _rounds_at(self, way: Way | None, key: Key) -> bool:
        """Tell whether a tensor is the first that shows a mistake which rounds."""
        if way is None or not way.rounds:
            return False
        first, ahead = way.first, forward_rank(way.first)
        if kind_of(first) not in {kind_of(name) for name, _ in self._keys}:
            first = next((name for name, _ in self._keys if forward_rank(name) >= ahead), first)
        return kind_of(key[0]) == kind_of(first)

    def _errors(self, key: Key, x: Array) -> Rows:
        """Squared distance of each row of a tensor from the candidate's; infinite where that is of another kind."""
        mine = self._candidate.read(*key)
        if mine.shape != x.shape or not np.array_equal(np.isfinite(mine), np.isfinite(x)):
            return np.full(row_count(key[0], x.shape), np.inf)
        return squared_error(key[0], mine, x)


class _GivenUp(Exception):
    """A guess has departed from the candidate."""


def _place(key: Key) -> tuple[int, tuple[int, int, int]]:
    """Place of a tensor in the order of a run."""
    return key[1], forward_rank(key[0])


def _empty(run: Rerun, dtype: str) -> MemoryTrace:
    return MemoryTrace(tokens=run.tokens, prefill=run.prefill, dtype=dtype, config=run.config)


def _sizes(name: str, x: Array) -> Rows:
    """Sum of squares of each row, and at least that of the typical row: a small row is a sum of large numbers."""
    rows = energy(name, x)
    return np.maximum(rows, np.median(rows))


def _in_units(errors: Rows, units: Rows) -> Rows:
    """Divide; no error is none in any unit."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(errors == 0, 0.0, errors / units)


def _largest(errors: Rows, units: Rows) -> float:
    return float(_in_units(errors, units).max())


def _mean(errors: Rows, units: Rows) -> float:
    return float(_in_units(errors, units).mean())
