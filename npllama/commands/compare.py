"""`npllama compare`: two traces, a verdict for each tensor, and the mistake behind the first difference."""

from __future__ import annotations

import argparse
from dataclasses import replace

from npllama.check.compare import compare
from npllama.check.report import Report
from npllama.check.reports import headers, html_report, junit_report, summary_lines, table_rows
from npllama.check.run import run_trace
from npllama.check.trace import Trace, TraceLike
from npllama.commands.console import Progress, notice, print_json, print_table, write_text
from npllama.engine import Model
from npllama.loading import load


def run(options: argparse.Namespace) -> int:
    """Compare, and leave with 0 for a match, 1 for a difference and 7 where nobody can tell."""
    candidate, reference = Trace.open(options.candidate), Trace.open(options.reference)
    truth: TraceLike | None = None if options.truth is None else Trace.open(options.truth)
    model = None if options.diagnose is None else load(options.diagnose, backend="float64")
    added = ""
    if model is not None and truth is None:
        notice("computing the float64 truth with the model to diagnose against")
        truth = run_trace(model, reference.tokens, prefill=reference.prefill)
        added = "the truth is a float64 run of the model given to --diagnose"
    report = compare(candidate, reference, truth)
    if added:
        report = replace(report, notes=(*report.notes, added))
    if model is not None and report.verdict != "match":
        report = _diagnosed(report, model, candidate, reference)
    if options.html is not None:
        write_text(options.html, html_report(report))
    if options.junit is not None:
        write_text(options.junit, junit_report(report))
    if options.json:
        print_json(report.to_json())
    else:
        if report.rows:
            print_table(headers(), table_rows(report))
        print("\n".join(summary_lines(report)))
    return report.exit_code


def _diagnosed(report: Report, model: Model, candidate: TraceLike, reference: TraceLike) -> Report:
    from npllama.check.diagnose import diagnose

    with Progress() as progress:
        found = diagnose(model, candidate, reference, progress=progress)
    return report.diagnosed(found.name, found.sentence, found.margin)
