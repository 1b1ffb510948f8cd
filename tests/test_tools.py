"""The environment of the two commands: when it is made, when it is kept, and what is said when it cannot be made."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest

from tools import environment
from tools.environment import SetupError, prepare


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Record the commands that making an environment would run; each only leaves an interpreter behind."""
    ran: list[list[str]] = []

    def run(command: list[str], remedy: str) -> None:
        ran.append(command)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "_run", run)
    return ran


def test_an_environment_is_made_once_and_then_costs_no_command(commands: list[list[str]]) -> None:
    python = prepare("demo", ["pytest==9.2.0"])
    assert ["venv" in command for command in commands] == [True, False]
    assert {"pytest==9.2.0", "-e", str(environment.ROOT)} <= set(commands[1])
    assert prepare("demo", ["pytest==9.2.0"]) == python
    assert len(commands) == 2


def test_other_requirements_are_another_environment(commands: list[list[str]]) -> None:
    assert prepare("demo", ["pytest==9.2.0"]) != prepare("demo", ["pytest==9.1.0"])
    assert len(commands) == 4


def test_another_checkout_is_linked_without_installing_all_again(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = prepare("demo")
    clone = tmp_path / "clone"
    clone.mkdir()
    clone.joinpath("pyproject.toml").write_bytes((environment.ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(environment, "ROOT", clone)
    assert prepare("demo") == python
    assert commands[-1][-3:] == ["--no-deps", "-e", str(clone)]
    assert len(commands) == 3


def test_an_interrupted_environment_is_made_anew_and_fresh_forces_it(commands: list[list[str]]) -> None:
    python = prepare("demo")
    (python.parent.parent / "checkout").unlink()
    assert prepare("demo") == python
    assert prepare("demo", fresh=True) == python
    assert len(commands) == 6


@pytest.mark.parametrize(
    ("given", "pytests"),
    [
        ([], ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]),
        (["-x", "tests/test_ops.py"], ["-x", "tests/test_ops.py"]),
        (["--no-torch"], ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]),
    ],
)
def test_all_tests_run_on_several_processors_and_others_as_they_are_told(
    given: list[str], pytests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(environment.ROOT / "tools"))
    monkeypatch.chdir(environment.ROOT)
    command = runpy.run_path(str(environment.ROOT / "tools" / "test.py"))
    became: list[list[str]] = []
    monkeypatch.setitem(command["main"].__globals__, "prepare", lambda name, wanted: Path("python"))
    monkeypatch.setitem(command["main"].__globals__, "become", lambda python, arguments: became.append(arguments))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["test.py", *given])
    command["main"]()
    assert became == [["-m", "pytest", *pytests]]


def test_a_failing_command_shows_the_end_of_its_output_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment.sys, "executable", "/bin/false")
    with pytest.raises(SetupError, match=r"(?s)exit code 1 of: /bin/false -m venv .*apt install python3-venv"):
        prepare("demo")
