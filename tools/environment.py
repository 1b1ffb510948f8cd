"""A private virtual environment for a command of this project: made once, kept until what goes into it changes.

Only the standard library is used, because this runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def cache_folder() -> Path:
    """Folder for everything that is fetched or built once: ``$XDG_CACHE_HOME/npllama`` or ``~/.cache/npllama``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npllama"


def say(text: str) -> None:
    """Print one line of progress to stderr."""
    print(f"npllama: {text}", file=sys.stderr, flush=True)


def prepare(name: str, requirements: Sequence[str] = (), *, fresh: bool = False) -> Path:
    """Return the interpreter of an environment that holds the requirements and this checkout.

    The environment lies in the cache folder under a key made of the requirements, the project's own dependencies and
    the running Python. An existing one costs no call of pip.

    Parameters
    ----------
    name : str
        First part of the environment's folder name.
    requirements : sequence of str
        What to install beside the project, as pip spells it.
    fresh : bool
        Make the environment anew even if it exists.

    Raises
    ------
    SetupError
        This Python is too old, has no ``venv``, or pip failed.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever starts this may have an older one
        raise SetupError(f"Python 3.10 or newer is needed; {sys.executable} is {platform.python_version()}")
    folder = cache_folder() / "environments" / f"{name}-py{platform.python_version()}-{_key(requirements)}"
    python = folder / "bin" / "python"
    checkout = folder / "checkout"  # written last: its presence says complete, its text says whose sources are linked
    if not fresh and _linked_to(checkout) == str(ROOT):
        return python
    with _locked(folder.with_name(folder.name + ".lock")):
        linked = None if fresh else _linked_to(checkout)
        if linked is None:
            say(f"making the environment {folder} (once; fetches what it needs)")
            shutil.rmtree(folder, ignore_errors=True)
            _run([sys.executable, "-m", "venv", str(folder)], "Debian and Ubuntu need: apt install python3-venv")
            _install(python, *requirements, "-e", str(ROOT))
        elif linked != str(ROOT):
            say(f"linking {folder.name} to this checkout")
            _install(python, "--no-deps", "-e", str(ROOT))
        checkout.write_text(str(ROOT), encoding="utf-8")
    return python


def become(python: Path, arguments: Sequence[str]) -> None:
    """Replace this process by the interpreter: signals and the exit code are then the command's own.

    This checkout comes first on the path, so that it is what runs even while another one shares the environment.
    """
    sys.stdout.flush()
    os.execve(python, [str(python), *arguments], environment_variables())


def environment_variables() -> dict[str, str]:
    """Environment for a process that runs this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _key(requirements: Sequence[str]) -> str:
    """Digest of all that the content of an environment depends on."""
    packaging = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]  # not the linters' settings
    parts = (packaging, *requirements, sys.version, sys.base_prefix, platform.machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _linked_to(checkout: Path) -> str | None:
    """Path of the checkout that a complete environment runs, or None."""
    usable = checkout.exists() and (checkout.parent / "bin" / "python").exists()
    return checkout.read_text(encoding="utf-8") if usable else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time make an environment; the lock ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making this environment; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _install(python: Path, *what: str) -> None:
    # -I and --no-user: a PYTHONPATH or a `user = true` of the caller would put packages elsewhere
    _run(
        [str(python), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-user", *what],
        "Check the network and pip's settings (python3 -m pip config list), then run the command again",
    )


def _run(command: list[str], remedy: str) -> None:
    """Run a command, its last line of output standing in for a progress bar; show the output's end if it fails."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            _status(lines[-1])
    _status("")
    if process.returncode:
        tail = "\n".join(f"    {textwrap.shorten(line, 200)}" for line in lines[-10:])
        raise SetupError(f"exit code {process.returncode} of: {' '.join(command)}\n{tail}\n{remedy}.")


def _status(text: str) -> None:
    """Show the current line of output on a terminal, in place."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
