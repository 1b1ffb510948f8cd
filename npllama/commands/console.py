"""How the commands talk: text and JSON to stdout, notices and progress to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


def notice(text: str) -> None:
    """Print one line to stderr."""
    print(f"npllama: {text}", file=sys.stderr, flush=True)


def print_json(values: Mapping[str, Any]) -> None:
    """Print an object in one line on stdout. A number that JSON cannot hold becomes null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    print(json.dumps(finite, allow_nan=False))


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Write a text file; DiskSpaceError or FileAccessError if that cannot be."""
    from npllama.checkpoint.store.disk import disk_errors

    with disk_errors(Path(file)):
        Path(file).write_text(text, encoding="utf-8")


def visible(piece: str) -> str:
    """Quote a token's text for display; what cannot be seen is escaped, a byte that is part of a character stays so."""
    return "'" + "".join(c if c.isprintable() else repr(c)[1:-1] for c in piece) + "'"


def human(count: float, unit: str = "B") -> str:
    """Spell a quantity with three digits: 1,234,567 -> ``1.23 MB``."""
    for prefix in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}".rstrip()
        count /= 1000
    return f"{count:.4g} T{unit}"


def per_second(rate: float) -> str:
    """Spell a speed: ``123 tokens/s``."""
    return f"{rate:.3g} tokens/s" if rate < 100 else f"{rate:.0f} tokens/s"


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns on stdout: a table on a terminal, elsewhere lines whose columns are separated by two spaces."""
    rows = list(rows)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


class Progress:
    """Show how far something is, on stderr: a bar on a terminal, a line now and then elsewhere.

    A context manager that yields ``progress(what, done, total)``, the callable that the library's long-running
    functions take. Nothing is shown, and nothing imported, before the first call.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` parts of ``what`` are done."""
        if sys.stderr.isatty():
            self._draw(what, done, total)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            notice(f"{what}: {100 * done // max(total, 1)} %")

    def _draw(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, description=what, completed=done, total=total)
