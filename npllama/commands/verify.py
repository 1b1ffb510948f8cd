"""`npllama verify`: whether a model is, to the byte, what was written, and computes what was recorded of it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from npllama.check.golden import open_golden, record_golden, replay
from npllama.check.report import Report
from npllama.checkpoint.store import Store, Verification, verify_store
from npllama.commands.console import Progress, human, notice, print_json
from npllama.commands.engine import load_model, prepared
from npllama.errors import CorruptDataError, NpllamaError, ParameterError
from npllama.loading import load


def run(options: argparse.Namespace) -> int:
    """Check sizes, headers and SHA-256 of every file, then replay the recorded run; name all that is wrong."""
    if options.activations == "int8":
        raise ParameterError(
            "a recorded run cannot be replayed with activations in int8: their rounding hides what it is to show",
            remedy="Leave --activations away.",
        )
    with Progress() as progress:
        found = verify_store(options.model, progress)
    problems = list(found.problems)
    report: Report | None = None
    if not problems:
        try:
            if options.record:
                record(options.model)
            golden = open_golden(Store.open(options.model))
            report = None if golden is None else replay(prepared(load_model(options)), golden)
        except NpllamaError as problem:
            problems.append(problem)
    if options.json:
        print_json(_summary(found, problems, report))
    elif not problems:
        print(f"{found.files} files ({found.tensors} tensors), {human(found.nbytes)}: as they were written")
        print(_replayed(report))
    for found_problem in problems:
        notice(f"{type(found_problem).__name__}: {found_problem}")
    if problems:
        return CorruptDataError.exit_code
    return 0 if report is None else report.exit_code


def record(model: str | os.PathLike[str]) -> None:
    """Record a small run of a model beside its weights, and say where."""
    reference, truth = (load(model, backend=backend) for backend in ("numpy", "float64"))
    notice(f"recorded a run in {record_golden(Store.open(model), reference, truth)}")


def _summary(found: Verification, problems: list[NpllamaError], report: Report | None) -> dict[str, Any]:
    fine = not problems and (report is None or report.verdict == "match")
    return {
        "ok": fine,
        "files": found.files,
        "bytes": found.nbytes,
        "problems": [{"error": type(problem).__name__, "message": str(problem)} for problem in problems],
        "replay": None
        if report is None
        else {
            "verdict": report.verdict,
            "reason": report.reason,
            "first_divergence": report.first_divergence,
            "step": report.step,
            "taps": len(report.rows),
        },
    }


def _replayed(report: Report | None) -> str:
    if report is None:
        return "no recorded run to replay; --record makes one"
    return f"recorded run replayed, {len(report.rows)} tensors: {report.verdict}. {report.reason}"
