"""Runs in int8: what is asked of them beside the noise, because so much of that is theirs.

A run in "int8" computes in float32, but rounds what goes into each product with weights to int8, in the declared way of
`npllama.rounding`. Float32's own noise decides here and there which of two integers a number becomes, and a layer or
two later one honest run is as far from another as both are from the truth: on SmolLM2 by some percent, up to a third
of a tensor's length at its worst token. Beneath that a mistake can hide. So

- the noise is neither estimated nor scaled from another dtype's. It is measured, against the truth, by a reference that
  rounds alike; other comparisons are refused;
- a token whose tensor is off by half of its length is no match, however much noise there is;
- where each operation was also run alone, on the reference's inputs (`npllama.check.run.shadow_run`), the verdict is
  what that shows. Both runs round the same inputs to the same integers, so what is left is float32's noise, 100 dB
  below: in a hundred random models and in SmolLM2 honest operations reached -113 dB. Of 138 planted mistakes the noise
  hides 11 and blurs 4; the least of these made -71 dB.
"""

from __future__ import annotations

import numpy as np

from npllama.check import noise
from npllama.check.noise import Thresholds, Verdict
from npllama.check.rows import Rows
from npllama.check.trace import TraceLike
from npllama.errors import TraceError

#: What a run of this kind says that it computes in.
DTYPE = "int8"

#: Squared error of a token's tensor that is no match, relative to its square.
_HALF = 0.25
#: Error of an operation alone, in units of `npllama.check.noise.typical` at depth 0.
_ALONE = Thresholds(noise.LOCAL, 100 * noise.LOCAL)
_UNCLEAR = "off by half of its length, which the noise of int8 does not excuse"
_BY_ITSELF = "on the reference's inputs, which round to the same integers, this operation gives something else"


def check_sides(candidate: TraceLike, reference: TraceLike, truth: TraceLike | None) -> None:
    """Refuse a comparison with a run in int8 whose noise nobody measured.

    Raises
    ------
    TraceError
        Only one of candidate and reference is in int8, or there is no truth in float64.
    """
    dtypes = candidate.dtype, reference.dtype
    if DTYPE not in dtypes:
        return
    if dtypes != (DTYPE, DTYPE):
        raise TraceError(
            f"the candidate computed in {dtypes[0]}, the reference in {dtypes[1]}: the noise of int8 is measured by a "
            "run that rounds alike, or not known",
            remedy="Record both with the same --activations.",
        )
    if truth is None or truth.dtype != "float64":
        raise TraceError(
            "runs in int8 differ by some percent, and there is no truth in float64 to measure that by",
            remedy="Record one with `npllama trace --backend float64`, and name it with --truth.",
        )


def judge(verdict: Verdict, errors: Rows, sizes: Rows, local: float | None) -> tuple[Verdict, str]:
    """Return the verdict on a tensor of a run in int8, and what the noise does not say of it.

    Parameters
    ----------
    verdict : Verdict
        On the errors in units of the noise.
    errors, sizes : ndarray of shape (T,)
        Squared error of each token, and the square of its tensor.
    local : float, optional
        Squared relative error of the operation alone.
    """
    if local is None:
        unclear = verdict == "match" and bool((errors > _HALF * np.maximum(sizes, np.median(sizes))).any())
        return ("cannot tell", _UNCLEAR) if unclear else (verdict, "")
    alone = _ALONE.judge(local / noise.typical("tok_embeddings", noise.alone(DTYPE), 0))
    return (verdict, "") if alone == "match" or verdict == "differs" else (alone, _BY_ITSELF)
