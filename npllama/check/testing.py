"""Checks of somebody else's model, for their own test suite.

In five lines, with a trace that torch wrote elsewhere or with a converted model::

    from npllama.check.testing import assert_taps_close

    def test_my_llama():
        assert_taps_close(my_llama, "reference-trace")          # my_llama(tokens) -> {"logits": array, ...}

With the plugin, which pytest finds by itself where npllama is installed, ``assert_taps_close`` is also a fixture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from npllama.check.compare import compare
from npllama.check.report import Report
from npllama.check.reports import headers, summary_lines, table_rows
from npllama.check.run import Engine, run_trace
from npllama.check.trace import MemoryTrace, Trace, TraceLike
from npllama.errors import ParameterError

#: Tap name, or (tap name, decode step), -> tensor: an ndarray, a torch tensor, or anything NumPy can read.
Tensors: TypeAlias = Mapping[str | tuple[str, int], Any]
#: A trace's folder or a trace; tensors of the prefill; or a function that is given the token ids of the prefill.
Candidate: TypeAlias = str | os.PathLike[str] | TraceLike | Tensors | Callable[[list[int]], Tensors]
#: A trace's folder, a trace, or a model to run.
Reference: TypeAlias = str | os.PathLike[str] | TraceLike | Engine

_ROWS_SHOWN = 12


def assert_taps_close(
    candidate: Candidate,
    reference: Reference,
    *,
    truth: Reference | None = None,
    tokens: Sequence[int] | None = None,
    dtype: str = "float32",
    rope_layout: str = "interleaved",
    producer: str = "",
) -> Report:
    """Fail unless a model's tensors agree with the reference's to within rounding.

    Parameters
    ----------
    candidate : trace, folder, mapping or callable
        What to check. Tensors go by the names of `npllama.taps`, or those that Hugging Face, MLX, Meta or llama.cpp
        use; those that are not given are not checked, and the report says so.
    reference : trace, folder or model
        What it should be.
    truth : trace, folder or model, optional
        A float64 run. With one the noise floor is measured and the verdict sharp.
    tokens : sequence of int, optional
        What to run where the reference is a model; otherwise the reference's own.
    dtype : str
        What a candidate given as tensors computes in.
    rope_layout : {"interleaved", "half-split"}
        Order of its rotated heads, unless the names it uses imply it.
    producer : str
        Its name in the report.

    Returns
    -------
    Report
        When everything agrees.

    Raises
    ------
    AssertionError
        There is a difference, or nobody can tell; the message names the first tensor that differs.
    NpllamaError
        The question makes no sense: no tokens, a damaged trace.
    """
    expected = _trace_of(reference, tokens)
    exact = None if truth is None else _trace_of(truth, expected.tokens, expected.prefill)
    report = compare(_candidate(candidate, expected, dtype, rope_layout, producer), expected, exact)
    if report.verdict != "match":
        raise AssertionError(_message(report))
    return report


def _trace_of(source: Reference, tokens: Sequence[int] | None, prefill: int | None = None) -> TraceLike:
    if isinstance(source, str | os.PathLike):
        return Trace.open(source)
    if not hasattr(source, "forward"):
        return source
    if tokens is None:
        raise ParameterError("the reference is a model, and there are no tokens to run", remedy="Give tokens=[...].")
    return run_trace(cast(Engine, source), tokens, prefill=len(tokens) if prefill is None else prefill)


def _candidate(source: Candidate, expected: TraceLike, dtype: str, rope_layout: str, producer: str) -> TraceLike:
    if isinstance(source, str | os.PathLike):
        return Trace.open(source)
    if callable(source):
        source = source(list(expected.tokens[: expected.prefill]))
    if not isinstance(source, Mapping):
        return source
    arrays = {(key, 0) if isinstance(key, str) else key: _array(value) for key, value in source.items()}
    last = max((step for _, step in arrays), default=0)
    trace = MemoryTrace(
        tokens=expected.tokens[: expected.prefill + last],
        prefill=expected.prefill,
        dtype=dtype,
        producer=producer or "candidate",
        model={"rope_layout": rope_layout} if rope_layout != "interleaved" else {},
    )
    for (name, step), array in arrays.items():
        trace.add(step, name, array)
    return trace


def _array(value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Read a tensor of any framework; bfloat16 and float16 are widened, which changes no number."""
    if hasattr(value, "detach"):  # torch, which is not imported here
        value = value.detach().cpu()
        value = value if str(value.dtype) == "torch.float64" else value.float()
    array = np.asarray(value)
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _message(report: Report) -> str:
    """Spell a report for a failed test: what it comes to, then the first rows that do not match."""
    lines = summary_lines(report)
    odd = [cells for row, cells in zip(report.rows, table_rows(report), strict=True) if row.verdict != "match"]
    shown = [headers(), *odd[:_ROWS_SHOWN]]
    widths = [max(len(row[i]) for row in shown) for i in range(len(headers()))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    if len(odd) > _ROWS_SHOWN:
        lines.append(f"... and {len(odd) - _ROWS_SHOWN} more")
    return "\n".join(lines)
