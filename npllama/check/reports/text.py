"""A report as plain text: one row for each tap, then what it comes to."""

from __future__ import annotations

import math

from npllama.check.report import Report, Side, TapRow

_COLUMNS = tuple("tap|step|shape|max abs|relative|cosine|NMSE dB|noise dB|ratio|typical|local dB|verdict".split("|"))


def headers() -> tuple[str, ...]:
    """Return the titles of the columns of `table_rows`."""
    return _COLUMNS


def table_rows(report: Report) -> list[tuple[str, ...]]:
    """Return one row of cells for each tap."""
    return [_cells(row) for row in report.rows]


def summary_lines(report: Report) -> list[str]:
    """Return what the comparison comes to, a line each; the verdict is the first word of the first."""
    lines = [f"{report.verdict.upper()}: {report.reason}"]
    for title, side in (("candidate", report.candidate), ("reference", report.reference), ("truth", report.truth)):
        if side is not None:
            lines.append(f"{title}: {_side(side)}")
    if report.limits is not None:
        token, typical = report.limits.token, report.limits.typical
        lines.append(
            f"noise floor {'measured' if report.measured else 'estimated'}: a match up to {token.match:g} times of it "
            f"at the worst token and {typical.match:g} at a typical one, a difference above {token.differs:g} and "
            f"{typical.differs:g}"
        )
    logits = report.logits
    if logits is not None:
        lines.append(
            f"next token: the same in {logits.same_top1} of {logits.positions} places; top-{logits.top_k} overlap "
            f"{logits.overlap:.4f}; KL mean {logits.kl_mean:.3g}, max {logits.kl_max:.3g} nats; "
            f"smallest top-1 margin {logits.least_margin:.3g}"
        )
        if logits.first_flip is not None:
            lines.append(
                f"first other token at position {logits.first_flip}, where the reference's margin is "
                f"{logits.flip_margin:.3g}"
            )
    if report.missing:
        lines.append(f"missing in the candidate: {_shortened(report.missing)}")
    if report.extra:
        lines.append(f"only in the candidate: {_shortened(report.extra)}")
    lines += [f"note: {note}" for note in report.notes]
    if report.diagnosis_text:
        margin = "" if report.margin is None else f" (margin {report.margin:.3g})"
        lines.append(f"diagnosis: {report.diagnosis_text}{margin}")
    return lines


def text_report(report: Report) -> str:
    """Return the whole report as text in columns, ending with a newline."""
    table = [headers(), *table_rows(report)]
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*(lines if report.rows else []), *summary_lines(report)]) + "\n"


def _side(side: Side) -> str:
    return f"{side.producer or 'unnamed'}, {side.dtype}, {side.prefill} tokens and {side.tokens - side.prefill} steps"


def _shortened(names: tuple[str, ...], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _cells(row: TapRow) -> tuple[str, ...]:
    verdict = f"{row.verdict}: {row.finding}" if row.finding else row.verdict
    return (
        row.name,
        str(row.step),
        "x".join(map(str, row.shape)),
        _number(row.max_abs, ".3g"),
        _number(row.relative_error, ".3g"),
        _number(row.cosine, ".8f"),
        _number(row.nmse_db, ".1f"),
        _number(row.noise_db, ".1f"),
        _number(row.ratio, ".3g"),
        _number(row.typical, ".3g"),
        _number(row.local_db, ".1f"),
        f"{verdict} ({row.origin})" if row.origin else verdict,
    )


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return "equal" if value == -math.inf else format(value, form)
