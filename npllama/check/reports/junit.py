"""A report as JUnit XML, which continuous-integration servers show: one test case for each tap and step."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from npllama.check.report import Report, TapRow

# What XML 1.0 cannot hold, not even escaped; a stranger's trace could bring it in a name.
_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_report(report: Report) -> str:
    """Return the report as an XML document.

    A tap that differs is a failure, one that nobody can judge an error, a missing one is skipped. The first case is the
    comparison as a whole, so that even one without a common tap has a result.
    """
    suite = ET.Element("testsuite", name="npllama compare")
    whole = _case(suite, "comparison", "verdict")
    _outcome(whole, report.verdict, report.reason)
    for row in report.rows:
        name, group = _named(row.name, row.step)
        _outcome(_case(suite, group, name), row.verdict, _explained(row))
    for label in report.missing:
        name, _, step = label.partition("@")
        ET.SubElement(_case(suite, *reversed(_named(name, int(step or 0)))), "skipped", message="not in the candidate")
    counts = {kind: len(suite.findall(f"testcase/{kind}")) for kind in ("failure", "error", "skipped")}
    suite.attrib.update(
        tests=str(len(suite)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
    )
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _named(name: str, step: int) -> tuple[str, str]:
    return name, "prefill" if step == 0 else f"decode step {step}"


def _case(suite: ET.Element, group: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=_clean(group), name=_clean(name))


def _outcome(case: ET.Element, verdict: str, message: str) -> None:
    kind = {"differs": "failure", "cannot tell": "error"}.get(verdict)
    if kind is not None:
        ET.SubElement(case, kind, message=_clean(message), type=verdict)


def _explained(row: TapRow) -> str:
    if row.finding or row.ratio is None:
        return row.finding
    origin = f", {row.origin}" if row.origin else ""
    return f"{row.ratio:.3g} times the noise floor at position {row.token}{origin}"


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
