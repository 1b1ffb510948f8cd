"""How the commands talk."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest

from npllama.commands import console


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_600, "1 MB"),
        (16_060_522_496, "16.1 GB"),
        (1.5e15, "1500 TB"),
    ],
)
def test_quantities_have_three_digits(count: float, text: str) -> None:
    assert console.human(count) == text


def test_a_number_has_no_unit() -> None:
    assert console.human(134_515_008, unit="") == "135 M"
    assert console.human(12, unit="") == "12"


def test_speeds_have_three_digits() -> None:
    assert [console.per_second(rate) for rate in (0.5, 12.345, 1234.5)] == [
        "0.5 tokens/s", "12.3 tokens/s", "1234 tokens/s",
    ]  # fmt: skip


def test_numbers_that_json_lacks_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": math.inf, "b": math.nan, "c": 1.5, "d": "é"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": None, "c": 1.5, "d": "é"}


def test_a_table_that_is_piped_has_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("name", "size"), [("a", "1 B"), ("longer", "2 B")])
    assert capsys.readouterr().out == "name    size\na       1 B\nlonger  2 B\n"


def test_a_table_on_a_terminal_shows_every_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    console.print_table(("name", "size"), [("[bold]a", "1 B")])
    assert "[bold]a" in terminal.getvalue()


def test_progress_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Progress() as progress:
        progress("Converting [a]", 1, 4)
        progress("Converting [a]", 4, 4)
    assert "Converting [a]" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_progress_elsewhere_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with console.Progress() as progress:
        for second in range(25):
            now = float(second)
            progress("Converting", second, 40)
    captured = capsys.readouterr()
    assert captured.err == "npllama: Converting: 25 %\nnpllama: Converting: 50 %\n"
    assert captured.out == ""


def test_progress_of_nothing_divides_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", iter([0.0, 20.0, 20.0]).__next__)
    with console.Progress() as progress:
        progress("Converting", 0, 0)


@pytest.mark.parametrize(
    ("piece", "shown"),
    [("a b", "'a b'"), ("\n\t", r"'\n\t'"), (r"\xf0", r"'\xf0'"), ("漢🦙", "'漢🦙'"), ("\x1b", r"'\x1b'")],
)
def test_what_cannot_be_seen_in_a_piece_is_escaped(piece: str, shown: str) -> None:
    assert console.visible(piece) == shown
