"""The command line as a whole: what it costs to ask it, and how a run ends."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npllama import __version__, cli, errors
from npllama.errors import NpllamaError
from npllama.rounding import ACTIVATIONS
from tools.environment import ROOT

COMMANDS = (
    "convert", "pull", "generate", "chat", "tokenize", "inspect", "verify", "trace", "compare", "perplexity", "bench",
)  # fmt: skip
CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, NpllamaError)]
HEAVY = ("numpy", "numba", "tiktoken", "rich", "jinja2", "torch", "blobfile")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the commands."""
    groups: Any = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    found: dict[str, argparse.ArgumentParser] = groups[0].choices
    return found


def test_the_commands_are_those_that_work() -> None:
    assert tuple(subcommands()) == COMMANDS
    for name in COMMANDS:
        assert callable(importlib.import_module(f"npllama.commands.{name}").run)


def test_activations_are_those_that_a_model_can_be_loaded_with() -> None:
    options = [action for command in subcommands().values() for action in command._actions]
    found = [tuple(action.choices or ()) for action in options if action.dest == "activations"]
    assert set(found) == {ACTIVATIONS}


def test_every_option_has_a_help_text() -> None:
    silent = [
        f"{name} {action.option_strings or action.dest}"
        for name, command in subcommands().items()
        for action in command._actions
        if not action.help
    ]
    assert silent == []


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_asking_for_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from npllama.cli import main; code = main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"npllama {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["bogus"], ["generate"], ["generate", "m", "x", "-n", "0"], ["generate", "m", "x", "--backend", "torch"],
     ["convert", "a"], ["bench", "m", "--threads", "many"], ["trace", "m", "x"],
     ["trace", "m", "-o", "t", "--tokens", "1,-2"], ["compare", "a"]],
)  # fmt: skip
def test_a_wrong_call_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: npllama" in captured.err


def fail_with(problem: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `npllama verify` fail."""

    def run(options: argparse.Namespace) -> int:
        raise problem

    monkeypatch.setattr("npllama.commands.verify.run", run)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_is_one_line_and_its_exit_code(
    kind: type[NpllamaError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(kind("what is wrong", file="f", remedy="What to do."), monkeypatch)
    assert cli.main(["verify", "m"]) == kind.exit_code
    assert capsys.readouterr() == ("", f"npllama: {kind.__name__}: f: what is wrong. What to do.\n")


def test_an_error_of_the_system_is_an_io_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(OSError(28, "No space left on device"), monkeypatch)
    assert cli.main(["verify", "m"]) == 5
    assert capsys.readouterr().err == "npllama: OSError: [Errno 28] No space left on device\n"


def test_an_error_in_npllama_is_neither_a_verdict_nor_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(ZeroDivisionError("oops"), monkeypatch)
    assert cli.main(["verify", "m"]) == 70
    captured = capsys.readouterr()
    assert "npllama: internal error: ZeroDivisionError: oops" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("arguments", [["--debug", "verify", "m"], ["verify", "m", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(errors.CorruptDataError("bad"), monkeypatch)
    assert cli.main(arguments) == 3
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert captured.err.endswith("npllama: CorruptDataError: bad\n")


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["verify", "m"]) == 130
    assert capsys.readouterr() == ("", "")


#: A program that writes letters without end through `npllama generate`. It takes signals as one in the foreground does,
#: also where the tests run in the background: shells have what runs there, and its children, ignore ctrl-C.
ENDLESS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from npllama.cli import main
from tests.generation.fakes import one_hot, FakeModel, byte_tokenizer
import npllama.commands.engine as engine

def letters(tokens):
    time.sleep(0.01)
    return one_hot(97)

engine.load = lambda path, **options: FakeModel(letters, tokenizer=byte_tokenizer(), max_seq_len=100_000)
sys.exit(main(["generate", "m", "x", "-n", "100000"]))
"""


@pytest.fixture
def endless() -> Any:
    """Yield the endless program once it writes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"a"
        yield process
        process.kill()


def test_ctrl_c_ends_a_generation_with_130_and_no_traceback(endless: Any) -> None:
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=60)
    assert (endless.returncode, err) == (130, b"")
    assert out.strip(b"a") == b"\n"


def test_a_reader_that_leaves_ends_a_generation_quietly(endless: Any) -> None:
    endless.stdout.close()
    assert endless.wait(timeout=60) == 141
    assert endless.stderr.read() == b""


def test_text_that_the_terminal_cannot_show_does_not_end_the_run(tmp_path: Path) -> None:
    code = "import sys; from npllama.cli import main; main(['--version']); print('漢')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, [b"?"])


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "npllama", "inspect", "/nonexistent"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 5
    assert done.stderr.startswith("npllama: FileAccessError: /nonexistent: ")


@pytest.mark.parametrize(
    "line",
    [
        ["generate", "MODEL", "PROMPT", "-n", "5"],
        ["generate", "MODEL", "-n", "5", "PROMPT"],
        ["generate", "-n", "5", "MODEL", "PROMPT"],
        ["generate", "-n", "5", "--", "MODEL", "PROMPT"],
    ],
)
def test_options_may_stand_before_between_or_behind_the_arguments(line: list[str]) -> None:
    options = cli._parse(line)
    assert (options.model, options.prompt, options.n) == ("MODEL", "PROMPT", 5)


def test_one_argument_too_many_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for line in (["generate", "M", "-n", "5", "P", "Q"], ["generate", "M", "P", "-n", "5", "Q"], ["verify", "M", "N"]):
        assert cli.main(line) == 2
        assert "unrecognized arguments" in capsys.readouterr().err
