"""Every error says where, what and what to do, has its exit code, is raised somewhere, and is shown by a test."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from npllama import errors
from npllama.errors import NpllamaError
from tools.environment import ROOT

#: The exit codes of the command line: 2 usage, 3 bad input, 4 unsupported, 5 disk or I/O, 6 incomplete or locked.
EXIT_CODES = {
    "NpllamaError": 3,
    "NotACheckpointError": 3,
    "EmptyFileError": 3,
    "TruncatedFileError": 3,
    "CorruptDataError": 3,
    "UnsafeFileError": 3,
    "ResourceLimitError": 3,
    "SourceChangedError": 3,
    "ShardError": 3,
    "ConfigError": 3,
    "ConfigMismatchError": 3,
    "TokenizerError": 3,
    "ChatTemplateError": 3,
    "ContextOverflowError": 3,
    "TapError": 3,
    "TraceError": 3,
    "ParameterError": 2,
    "DestinationExistsError": 2,
    "UnsupportedError": 4,
    "VersionError": 4,
    "BackendError": 4,
    "FileAccessError": 5,
    "DiskSpaceError": 5,
    "DownloadError": 5,
    "IncompleteConversionError": 6,
    "LockedError": 6,
}

CLASSES = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, NpllamaError)
}


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    assert {name: value.exit_code for name, value in CLASSES.items()} == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_a_message_is_place_then_fact_then_remedy(name: str) -> None:
    error = CLASSES[name]("12 bytes, expected 16", remedy="Fetch it again.", file=Path("a.pth"), record="k", offset=7)
    assert str(error) == "a.pth:k@7: 12 bytes, expected 16. Fetch it again."
    assert isinstance(error, NpllamaError)
    assert (error.message, error.remedy) == ("12 bytes, expected 16", "Fetch it again.")
    assert (error.file, error.record, error.offset) == ("a.pth", "k", 7)


@pytest.mark.parametrize(
    ("place", "start"),
    [
        ({}, ""),
        ({"file": "a.pth"}, "a.pth: "),
        ({"record": "data.pkl"}, "data.pkl: "),
        ({"file": "a.pth", "offset": 0}, "a.pth@0: "),
        ({"file": "a.pth", "record": "data.pkl"}, "a.pth:data.pkl: "),
    ],
    ids=str,
)
def test_the_place_names_what_is_known_of_it(place: dict[str, object], start: str) -> None:
    assert str(NpllamaError("too short", **place)) == f"{start}too short"  # type: ignore[arg-type]


def test_a_full_stop_before_the_remedy_is_not_doubled() -> None:
    assert str(NpllamaError("Too short.", remedy="Fetch it again.")) == "Too short. Fetch it again."


def test_every_class_has_a_docstring_that_is_a_sentence() -> None:
    for name, value in CLASSES.items():
        first = (value.__doc__ or "").strip().splitlines()[:1]
        assert first, name
        assert first[0].endswith("."), name


def names_used(folder: Path, but: Path) -> set[str]:
    """Return the names that the code of a folder uses, imports aside: loaded names and attributes."""
    used: set[str] = set()
    for file in folder.rglob("*.py"):
        if file == but:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
            if isinstance(node, ast.Name):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
    return used


def test_every_class_is_raised_by_the_engine_and_shown_by_a_test() -> None:
    leaves = set(CLASSES) - {"NpllamaError"}
    raised = names_used(ROOT / "npllama", but=Path(errors.__file__))
    shown = names_used(ROOT / "tests", but=Path(__file__))
    lacking = {"never raised": sorted(leaves - raised), "shown by no test": sorted(leaves - shown)}
    assert lacking == {"never raised": [], "shown by no test": []}
