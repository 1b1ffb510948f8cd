"""Reports: the same facts as text, page and JUnit, and nothing that a stranger's name could smuggle in."""

from __future__ import annotations

import dataclasses
import itertools
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from npllama.check.compare import compare
from npllama.check.report import Report
from npllama.check.reports import html_report, junit_report, text_report
from npllama.check.run import shadow_run
from npllama.check.trace import MemoryTrace
from tests.check.runs import CONFIG, TOKENS, edited, engine_trace
from tests.fixtures.engine import loud_model


@pytest.fixture(scope="module")
def wrong() -> Report:
    reference = engine_trace()
    candidate = engine_trace(dataclasses.replace(CONFIG, rope_theta=1e4), backend="fast")
    local = shadow_run(loud_model(dataclasses.replace(CONFIG, rope_theta=1e4), backend="fast"), reference)
    return compare(candidate, reference, engine_trace(backend="float64"), local=local).diagnosed(
        "rope-theta", "rope-theta: the base of the frequencies is another one.", 1e6
    )


@pytest.fixture(scope="module")
def fine() -> Report:
    return compare(engine_trace(backend="fast"), engine_trace())


class Page(HTMLParser):
    """Collects what a page holds, and holds it to well-nestedness."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_text_has_a_row_for_each_tap_and_then_the_verdict(wrong: Report) -> None:
    text = text_report(wrong)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["tap", "step", "shape"]
    assert sum(line.startswith(("layers.", "tok_", "norm", "logits")) for line in lines) == len(wrong.rows)
    assert lines[1 + len(wrong.rows)].startswith("DIFFERS: The first difference is at layers.0.q_rope of the prefill")
    assert "differs (local)" in next(line for line in lines if line.startswith("layers.0.q_rope "))
    assert "differs (inherited)" in next(line for line in lines if line.startswith("logits"))
    assert lines[-1].startswith("diagnosis: rope-theta: the base")
    assert "measured" in text


def test_text_says_what_was_not_compared_and_what_was_not_measured(fine: Report) -> None:
    text = text_report(fine)
    assert "MATCH: Everything agrees" in text
    assert "missing in the candidate: layers.0.scores, layers.0.probs" in text
    assert "noise floor estimated" in text
    assert "next token: the same in 67 of 67 places" in text


def test_the_page_is_whole_and_needs_nothing_else(wrong: Report) -> None:
    text = html_report(wrong)
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url[(]|@import", text)
    assert {"lang": "en"} in [attributes for tag, attributes in page.tags if tag == "html"]


def test_every_square_of_the_picture_leads_to_a_row_and_says_in_words_what_it_shows(wrong: Report) -> None:
    page = Page(html_report(wrong))
    links = [attributes for tag, attributes in page.tags if tag == "a"]
    rows = {attributes["id"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes}
    assert len(rows) == len(wrong.rows)
    assert len(links) == len([row for row in wrong.rows if row.step in (0, 3)])
    assert {(link["href"] or "")[1:] for link in links} <= rows
    label = next(link["aria-label"] for link in links if link["href"] == "#step-0-layers.0.q_rope")
    assert label is not None
    assert label.startswith("layers.0.q_rope: differs, ")
    assert label.endswith("times the noise floor, local")


def test_verdicts_are_told_apart_without_colours(wrong: Report) -> None:
    text = html_report(wrong)
    differing = sum(row.verdict == "differs" for row in wrong.rows if row.step in (0, 3))
    assert text.count(">×</text>") == differing > 0


def test_the_scale_darkens_from_step_to_step() -> None:
    from npllama.check.reports.html import _SCALE

    grey = [sum(w * int(c[i : i + 2], 16) for w, i in ((0.3, 1), (0.59, 3), (0.11, 5))) for c in _SCALE]
    assert all(a - b > 8 for a, b in itertools.pairwise(grey))


def test_junit_has_a_case_for_each_tap_and_counts_right(wrong: Report, fine: Report) -> None:
    suite = ET.fromstring(junit_report(wrong))
    failures = suite.findall("testcase/failure")
    differing = [row for row in wrong.rows if row.verdict == "differs"]
    assert len(suite) == 1 + len(wrong.rows) + len(wrong.missing)
    assert int(suite.attrib["failures"]) == len(failures) == 1 + len(differing)
    first = suite[0]
    assert (first.attrib["name"], first[0].attrib["message"]) == ("verdict", wrong.reason)
    skipped = ET.fromstring(junit_report(fine))
    assert int(skipped.attrib["skipped"]) == len(fine.missing) > 0
    assert skipped.attrib["failures"] == skipped.attrib["errors"] == "0"


def test_a_strangers_names_are_text_everywhere() -> None:
    evil = '<script>alert("x")</script>&'
    traces = []
    for value in (0.0, 1.0):
        trace = MemoryTrace(tokens=[1], prefill=1, producer=evil + "\x00\ud800", model={})
        trace.add(0, evil, np.full((1, 2), value, np.float32))
        traces.append(trace)
    report = compare(*traces)
    page = html_report(report)
    assert "<script" not in page
    assert Page(page).open == []
    ET.fromstring(junit_report(report))


def test_reports_without_rows_work_too() -> None:
    report = compare(MemoryTrace(tokens=[1, 3], prefill=2), MemoryTrace(tokens=[1, 2], prefill=2))
    assert text_report(report).startswith("DIFFERS: The runs were fed other tokens")
    assert "other tokens" in html_report(report)
    assert ET.fromstring(junit_report(report)).attrib["failures"] == "1"


def test_numbers_out_of_bounds_are_drawn(fine: Report) -> None:
    reference = engine_trace()
    zero = edited(reference, {("norm", 0): lambda x: x * 0})
    report = compare(reference, zero)
    assert report.first_divergence == "norm"
    assert Page(html_report(report)).open == []
    assert len(TOKENS) == 67
    text_report(report)
