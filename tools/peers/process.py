"""A process that an engine lives in, and the line to it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Unavailable(Exception):
    """An engine cannot be had here, or has died; the message says why."""


def last_words(log: Path) -> str:
    """Return the last line that names an error, or else the last that says anything."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return next((line for line in reversed(said) if "Error" in line), said[-1] if said else "")


class Worker:
    """A worker of `tools/peers/workers`, alive until it is closed.

    Parameters
    ----------
    command : list of str
        What starts it.
    settings : dict
        What it loads.
    log : Path
        Gets its stderr.
    environment : mapping of str to str
        Of the process.
    timeout : float
        Seconds that loading, or an order, may take.

    Attributes
    ----------
    greeting : dict
        What it said when it had loaded.

    Raises
    ------
    Unavailable
        It ended, or did not answer in time.
    """

    def __init__(
        self,
        command: list[str],
        settings: dict[str, Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        timeout: float = 600,
    ) -> None:
        self._log, self._timeout = log, timeout
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        try:
            self.greeting = self._answer()
        except Unavailable:
            self.close()
            raise

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order and return the answer to it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing, which says more
            print(json.dumps(order), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(self._timeout, give_up)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if late.is_set():
            raise Unavailable(f"no answer within {self._timeout:g} s")
        if not line:
            code = self._process.wait()
            raise Unavailable(last_words(self._log) or f"the process ended with code {code}")
        found: dict[str, Any] = json.loads(line)
        return found
