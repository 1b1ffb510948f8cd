"""What a comparison found, as plain records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from npllama.check.noise import Limits, Verdict

#: What the command line returns for each verdict.
EXIT_CODES: Mapping[Verdict, int] = {"match": 0, "differs": 1, "cannot tell": 7}


@dataclass(frozen=True, slots=True)
class TapRow:
    """One tap at one step.

    Attributes
    ----------
    name, step : str, int
        Which.
    shape : tuple of int
        Of the candidate's tensor.
    verdict : str
        "match", "differs" or "cannot tell".
    finding : str
        What no ratio says: another shape, another dtype, NaN, a choice of experts that rounding decides; mostly empty.
    max_abs, relative_error, cosine, nmse_db : float or None
        Candidate against reference: largest difference, norm of the difference over the reference's norm, cosine of the
        angle between both, and the squared relative error in decibels (-inf: equal). None where nothing was computed.
    noise_db : float or None
        The noise floor in the same unit.
    ratio : float or None
        The candidate's squared error in units of the noise floor, at the worst token.
    typical : float or None
        The same at the median token; None where there are too few.
    token : int or None
        Position of that token.
    local_db : float or None
        Squared relative error, in decibels, of this operation alone on the reference's inputs, where a shadow run
        says so.
    origin : str or None
        Of an error: "local" (the operation is wrong by itself) or "inherited" (its inputs already differ).
    """

    name: str
    step: int
    shape: tuple[int, ...]
    verdict: Verdict
    finding: str = ""
    max_abs: float | None = None
    relative_error: float | None = None
    cosine: float | None = None
    nmse_db: float | None = None
    noise_db: float | None = None
    ratio: float | None = None
    typical: float | None = None
    token: int | None = None
    local_db: float | None = None
    origin: str | None = None


@dataclass(frozen=True, slots=True)
class LogitsSummary:
    """What the difference does to the next token; one distribution for each position of the run.

    Attributes
    ----------
    positions : int
        Distributions compared.
    same_top1 : int
        How many have the same most probable token.
    top_k, overlap : int, float
        Mean share of the k most probable tokens that both have.
    kl_mean, kl_max : float
        Kullback-Leibler divergence of the candidate's distribution from the reference's, in nats.
    least_margin : float
        Smallest distance between the reference's two highest logits.
    first_flip : int or None
        Position of the first other top token.
    flip_margin : float or None
        The reference's margin there: a small one flips without a mistake.
    """

    positions: int
    same_top1: int
    top_k: int
    overlap: float
    kl_mean: float
    kl_max: float
    least_margin: float
    first_flip: int | None
    flip_margin: float | None


@dataclass(frozen=True, slots=True)
class Side:
    """One of the traces of a comparison, as it describes itself."""

    producer: str
    dtype: str
    tokens: int
    prefill: int


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a comparison.

    Attributes
    ----------
    verdict : str
        "match", "differs" or "cannot tell".
    reason : str
        One sentence for a person.
    first_divergence : str or None
        First tap in the order of the forward pass that differs; "tokens" when the runs were fed other tokens.
    step : int or None
        Its step; 0 is the prefill.
    rows : tuple of TapRow
        Every tap that both traces have, step by step, in the order of the forward pass.
    missing, extra : tuple of str
        Taps that only the reference has, and only the candidate (``name@step`` behind the prefill).
    notes : tuple of str
        What else should be known: allowances, estimates, tensors that were renamed.
    logits : LogitsSummary or None
        None where a trace has no logits.
    candidate, reference, truth : Side or None
        Who was compared.
    limits : Limits or None
        The thresholds that were applied.
    measured : bool
        The noise floor was measured against a truth, not estimated.
    diagnosis : str or None
        Entry of the bug dictionary that reproduces the candidate.
    diagnosis_text : str
        What it is and how to fix it, or why there is none.
    margin : float or None
        How much better it fits than the next one.
    """

    verdict: Verdict
    reason: str
    first_divergence: str | None = None
    step: int | None = None
    rows: tuple[TapRow, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    logits: LogitsSummary | None = None
    candidate: Side | None = None
    reference: Side | None = None
    truth: Side | None = None
    limits: Limits | None = None
    measured: bool = False
    diagnosis: str | None = None
    diagnosis_text: str = ""
    margin: float | None = field(default=None)

    @property
    def exit_code(self) -> int:
        """What the command line returns: 0 match, 1 differs, 7 cannot tell."""
        return EXIT_CODES[self.verdict]

    @property
    def taps(self) -> tuple[TapRow, ...]:
        """The rows, under the name that they have in JSON."""
        return self.rows

    def diagnosed(self, name: str | None, text: str, margin: float | None) -> Report:
        """Return the report with a diagnosis."""
        return replace(self, diagnosis=name, diagnosis_text=text, margin=margin)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a number that JSON cannot hold is null."""
        values = asdict(self)
        values["taps"] = values.pop("rows")
        plain: dict[str, Any] = _finite(values)
        return plain


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
