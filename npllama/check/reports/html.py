"""A report as one HTML file that needs nothing else: no script, no font, no address.

The picture at its top is the model from bottom to top, one row of squares for each layer and one column for each tap of
a layer, so that the eye finds where an error starts and how it spreads. A square's colour is its ratio to the noise
floor; the scale goes from light to dark, and each verdict has a sign of its own, so that nothing hangs on telling
colours apart. Every square is a link to its row in the table: the page is read with the keyboard alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from npllama.check.report import Report, TapRow
from npllama.check.reports.text import headers, summary_lines, table_rows
from npllama.taps import TAPS

_CELL, _GAP, _LEFT, _TOP = 26, 4, 64, 96
#: Dark blue to yellow of equal steps in lightness (viridis, read backwards): told apart in grey, too.
_SCALE = ("#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154")
_SIGNS = {"match": "", "differs": "×", "cannot tell": "?"}
_IN_LAYERS = tuple(
    dict.fromkeys(spec.name.removeprefix("layers.{i}.") for spec in TAPS if spec.name.startswith("layers."))
)
_BEFORE = ("tok_embeddings", "pos_embeddings", "embeddings")
_BEHIND = ("norm", "logits")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .6rem; border-bottom: 1px solid #8884; white-space: nowrap; }
.scroll { overflow-x: auto; }
tr.differs td:first-child, tr.cannot-tell td:first-child { font-weight: 700; }
tr:target { outline: 3px solid #d55e00; }
svg { background: #fff; border: 1px solid #8884; }
svg text { font: 12px system-ui, sans-serif; fill: #222; }
svg a:focus rect, svg a:hover rect { stroke: #d55e00; stroke-width: 3; }
.verdict { font-size: 1.25rem; font-weight: 700; }
"""


def html_report(report: Report) -> str:
    """Return the report as an HTML document."""
    steps = sorted({row.step for row in report.rows})
    first, *others = summary_lines(report)
    # The steps that a person wants to see: the prefill, where it first differs, and the last.
    shown = [step for step in steps if step in {0, report.step, steps[-1]}]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>npllama compare: {escape(report.verdict)}</title><style>{_STYLE}</style></head><body><main>",
        "<h1>Two traces compared</h1>",
        f'<p class="verdict">{escape(first)}</p>',
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in others) + "</ul>",
        *(_picture(report, step) for step in shown),
        _legend() if shown else "",
        _growth(report),
        _table(report),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _anchor(name: str, step: int) -> str:
    return f"step-{step}-{name}".replace(" ", "_")


def _step_title(step: int) -> str:
    return "Prefill" if step == 0 else f"Decode step {step}"


def _shade(ratio: float | None) -> str:
    """Colour of a ratio: one step of the scale for every two powers of ten above a tenth of the floor."""
    if ratio is None:
        return "#dddddd"
    level = 0 if ratio <= 0.1 else len(_SCALE) - 1 if math.isinf(ratio) else math.ceil((math.log10(ratio) + 1) / 2)
    return _SCALE[min(max(level, 0), len(_SCALE) - 1)]


def _picture(report: Report, step: int) -> str:
    rows = {row.name: row for row in report.rows if row.step == step}
    layers = sorted({int(name.split(".")[1]) for name in rows if name.startswith("layers.")})
    kinds = {name.rpartition(".")[2] for name in rows if name.startswith("layers.")}
    columns = [name for name in _IN_LAYERS if name in kinds]
    n_lines = len(layers) + 2
    width = _LEFT + len(columns) * (_CELL + _GAP) + 16
    height = _TOP + n_lines * (_CELL + _GAP) + 8
    label = f"{_step_title(step)}: ratio to the noise floor, layers from bottom to top, taps from left to right"
    cells = [
        f'<text transform="translate({_LEFT + i * (_CELL + _GAP) + 16},{_TOP - 8}) rotate(-60)">{escape(name)}</text>'
        for i, name in enumerate(columns)
    ]

    def line(place: int, title: str, names: Sequence[str], caption: str = "") -> None:
        y = _TOP + (n_lines - 1 - place) * (_CELL + _GAP)
        cells.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{escape(title)}</text>')
        for column, name in enumerate(names):
            if name in rows:
                x = _LEFT + column * (_CELL + _GAP)
                cells.append(_square(rows[name], x, y, first=name == report.first_divergence))
        if caption:
            x = _LEFT + len(names) * (_CELL + _GAP) + 4
            cells.append(f'<text x="{x}" y="{y + 17}">{escape(caption)}</text>')

    before, behind = ([name for name in names if name in rows] for names in (_BEFORE, _BEHIND))
    line(0, "input", before, ", ".join(before))
    for place, layer in enumerate(layers, 1):
        line(place, f"layer {layer}", [f"layers.{layer}.{tap}" for tap in columns])
    line(n_lines - 1, "output", behind, ", ".join(behind))
    return (
        f"<h2>{_step_title(step)}</h2>"
        '<div class="scroll">'
        f'<svg role="group" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">{"".join(cells)}</svg></div>'
    )


def _square(row: TapRow, x: int, y: int, *, first: bool) -> str:
    ratio = row.finding or ("not computed" if row.ratio is None else f"{row.ratio:.3g} times the noise floor")
    title = f"{row.name}: {row.verdict}, {ratio}" + (f", {row.origin}" if row.origin else "")
    fill = "#440154" if row.finding and row.verdict == "differs" else _shade(row.ratio)
    ink = "#fff" if fill in _SCALE[4:] else "#222"
    frame = ' stroke="#d55e00" stroke-width="3"' if first else ""
    return (
        f'<a href="#{escape(_anchor(row.name, row.step))}" aria-label="{escape(title)}"><title>{escape(title)}</title>'
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="4" fill="{fill}"{frame}/>'
        f'<text x="{x + _CELL // 2}" y="{y + 18}" text-anchor="middle" style="fill:{ink}" aria-hidden="true">'
        f"{_SIGNS[row.verdict]}</text></a>"
    )


def _legend() -> str:
    bounds = [f"up to {10 ** (2 * i - 1):g}" for i in range(len(_SCALE) - 1)] + ["more"]
    items = "".join(
        f'<tr><td><svg width="40" height="16" aria-hidden="true"><rect width="40" height="16" fill="{colour}"/></svg>'
        f"</td><td>{escape(bound)}</td></tr>"
        for colour, bound in zip(_SCALE, bounds, strict=True)
    )
    return (
        "<details open><summary>What the squares say</summary><p>Colour: the candidate's squared error in units of the "
        "noise floor, at the worst token. × differs, ? cannot tell, no sign: a match. Grey: nothing was computed. The "
        "framed square is the first difference. Each square leads to its row.</p>"
        f"<table><caption>Times the noise floor</caption><tbody>{items}</tbody></table></details>"
    )


def _growth(report: Report) -> str:
    """Draw how the error grows along the residual stream, beside the noise floor."""
    step = report.step or 0
    points = [
        (row.name, row.nmse_db, row.noise_db)
        for row in report.rows
        if row.step == step
        and (row.name in _BEFORE + _BEHIND or row.name.endswith(".resid_post"))
        and row.noise_db is not None
    ]
    levels = [x for _, error, noise in points for x in (error, noise) if x is not None and math.isfinite(x)]
    if len(points) < 2 or not levels:
        return ""
    low, high = 20 * math.floor(min(levels) / 20), 20 * math.ceil(max(levels) / 20)
    high = max(high, low + 20)
    width, height, left, top = 720, 260, 56, 16

    def place(i: int, level: float) -> tuple[float, float]:
        x = left + i * (width - left - 16) / (len(points) - 1)
        return round(x, 1), round(top + (high - max(level, low)) / (high - low) * height, 1)

    def curve(which: int, dash: str, title: str) -> str:
        levels = [(i, point[which]) for i, point in enumerate(points)]
        path = " ".join("{},{}".format(*place(i, float(x))) for i, x in levels if x is not None)
        pen = f'fill="none" stroke="#222" stroke-width="2"{dash}'
        return f'<polyline points="{path}" {pen}><title>{title}</title></polyline>'

    grid = "".join(
        f'<line x1="{left}" x2="{width - 16}" y1="{place(0, y)[1]}" y2="{place(0, y)[1]}" stroke="#ccc"/>'
        f'<text x="{left - 8}" y="{place(0, y)[1] + 4}" text-anchor="end">{y}</text>'
        for y in range(low, high + 1, 20)
    )
    ends = "".join(
        f'<text x="{place(i, low)[0]}" y="{height + top + 18}" text-anchor="{anchor}">{escape(points[i][0])}</text>'
        for i, anchor in ((0, "start"), (len(points) - 1, "end"))
    )
    label = f"{_step_title(step)}: error of the residual stream from the embedding to the logits, in decibels"
    return (
        f"<h2>How the error grows</h2><p>{_step_title(step)}, from the embedding through every layer to the logits: "
        "the candidate's squared error relative to the reference (solid) and the noise floor (dashed), in decibels.</p>"
        f'<div class="scroll"><svg role="img" aria-label="{escape(label)}" '
        f'width="{width}" height="{height + 2 * top + 8}">'
        + grid
        + ends
        + curve(1, "", "error")
        + curve(2, ' stroke-dasharray="6 4"', "noise floor")
        + "</svg></div>"
    )


def _table(report: Report) -> str:
    if not report.rows:
        return ""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in headers())
    body = "".join(
        f'<tr id="{escape(_anchor(row.name, row.step))}" class="{row.verdict.replace(" ", "-")}" tabindex="-1">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for row, cells in zip(report.rows, table_rows(report), strict=True)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f'<h2>Every tap</h2><div class="scroll">{table}</div>'
