"""The house has walls: who may import whom, what importing costs, and where compiled code lives."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

from tests.fixtures.imports import Import, imports_of, modules_of
from tools.environment import ROOT

MAX_LINES = 450

ANYTHING = "*"

#: Room -> what it may import from the project: rooms, or single modules of one. Every room may import itself.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "dtypes": {"errors"},
    "strict_json": {"errors"},
    "ops": {"dtypes", "errors", "rounding"},
    "rounding": {"dtypes"},
    "pages": {"dtypes"},
    "kernels": {"dtypes", "errors"},
    "config": {"errors", "strict_json"},
    "taps": {"config", "errors"},
    "cache": {"config", "errors", "dtypes", "pages"},
    "weights": {"config", "dtypes"},
    "model": {"config", "cache", "taps", "weights", "dtypes", "errors"},
    "engine": {"model", "config", "cache", "taps", "weights", "dtypes", "errors"},
    "importance": {"model", "ops", "config", "cache", "weights", "dtypes"},
    "checkpoint": {"importance", "kernels.fits", "config", "dtypes", "errors", "strict_json", "version"},
    "text": {"errors"},
    "generation": {"engine", "cache", "text", "errors"},
    "check": {
        "taps",
        "config",
        "engine",
        "model",
        "weights",
        "ops",
        "rounding",
        "checkpoint.rope",
        "checkpoint.store",
        "dtypes",
        "errors",
        "strict_json",
    },
    "loading": {ANYTHING},
    "explain": {ANYTHING},
    "cli": {ANYTHING},
    "commands": {ANYTHING},
    "__main__": {"cli"},
    "__init__": {ANYTHING},
    "oracle": {
        "errors",
        "config",
        "dtypes",
        "taps",
        "checkpoint.names",
        "checkpoint.spellings",
        "checkpoint.store",
        "check.trace",
        "check.compare",
        "check.reports",
    },
}
#: The oracle's command line: it runs the engine, by its public names, and judges it.
ORACLE_COMMANDS = {"oracle.__main__", "oracle.check"}
MAY_IMPORT["oracle's commands"] = {"oracle", "__init__", "check", *MAY_IMPORT["oracle"]}
#: What only these may import, whatever the table says: the ends of the flow, where everything meets.
IMPORTED_ONLY_BY = {"cli": {"__main__"}, "commands": {"cli"}, "explain": {"cli", "commands", "__init__"}}

FOREIGN_TO_THE_ENGINE = {"torch", "transformers", "oracle", "tests", "tools"}
NOT_ON_IMPORT = ("numba", "llvmlite", "tiktoken", "torch", "transformers", "jinja2", "rich")
COMPILERS = {"njit", "jit", "guvectorize", "stencil", "cfunc", "prange"}

ENGINE = modules_of(ROOT / "npllama")
ORACLE = modules_of(ROOT / "oracle")
KNOWN = frozenset({*ENGINE, *ORACLE})


def room_of(module: str) -> str:
    """Return the room of a module: ``npllama.text.chat`` is in ``text``, ``npllama`` itself is ``__init__``."""
    parts = module.split(".")
    if parts[0] == "oracle":
        return "oracle's commands" if module in ORACLE_COMMANDS else "oracle"
    return parts[1] if len(parts) > 1 else "__init__"


def all_imports() -> list[Import]:
    """Return every import of the engine and of the oracle."""
    return [found for name, file in {**ENGINE, **ORACLE}.items() for found in imports_of(name, file, KNOWN)]


def is_allowed(found: Import) -> bool:
    """Tell whether the tables allow an import of one project module by another."""
    importer, imported = room_of(found.importer), room_of(found.imported)
    if importer == imported:
        return True
    if importer not in IMPORTED_ONLY_BY.get(imported, {importer}):
        return False
    allowed = MAY_IMPORT.get(importer, set())
    return ANYTHING in allowed or imported in allowed or found.imported.removeprefix("npllama.") in allowed


def describe(found: Import) -> str:
    """Spell an import for a message."""
    return f"{found.importer}:{found.line} imports {found.imported}"


def test_every_module_stands_in_a_room_of_the_table() -> None:
    strangers = sorted(name for name in KNOWN if room_of(name) not in MAY_IMPORT)
    assert not strangers, f"give these a room, or the table a row: {strangers}"


def test_rooms_import_only_what_the_table_allows() -> None:
    inside = [found for found in all_imports() if found.imported.split(".")[0] in {"npllama", "oracle"}]
    assert len(inside) > 10, "the scan found hardly any import: it looks in the wrong place"
    broken = [describe(found) for found in inside if not is_allowed(found)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("npllama.ops", "npllama.kernels", False),
        ("npllama.kernels.attention", "npllama.ops", False),
        ("npllama.text.chat", "npllama.text.tokenizer", True),
        ("npllama.text.chat", "npllama.checkpoint.gguf", False),
        ("npllama.check.compare", "npllama.checkpoint.store", True),
        ("npllama.check.compare", "npllama.checkpoint.convert", False),
        ("npllama.loading", "npllama.generation.generate", True),
        ("npllama.loading", "npllama.cli", False),
        ("npllama.cli", "npllama.commands.pull", True),
        ("npllama.explain.walk", "npllama.commands.pull", False),
        ("npllama.check.compare", "npllama.loading", False),
        ("npllama.errors", "npllama", False),
        ("oracle.decoder", "npllama.taps", True),
        ("oracle.decoder", "npllama.ops", False),
        ("oracle.decoder", "npllama", False),
        ("oracle.check", "npllama", True),
        ("oracle.check", "npllama.check.diagnose", True),
        ("oracle.check", "npllama.ops", False),
        ("oracle.decoder", "oracle.check", False),
        ("npllama.cli", "oracle.decoder", False),
        ("npllama.nowhere", "npllama.errors", False),
    ],
)
def test_the_table_says_what_it_should(importer: str, imported: str, allowed: bool) -> None:
    foreign = importer.startswith("npllama") and imported.split(".")[0] in FOREIGN_TO_THE_ENGINE
    assert (is_allowed(Import(importer, imported, 1, False)) and not foreign) is allowed


def test_the_scan_sees_imports_of_every_form(tmp_path: Path) -> None:
    package = tmp_path / "npllama" / "text"
    package.mkdir(parents=True)
    source = package / "chat.py"
    source.write_text(
        "import npllama.ops as o\n"
        "from npllama import errors, __version__\n"
        "from . import tokenizer\n"
        "from ..model import forward\n"
        "if TYPE_CHECKING:\n    import npllama.cache\n"
        "def f():\n    import torch.nn\n    import_module('numba')\n"
    )
    known = frozenset({"npllama", "npllama.errors", "npllama.text.tokenizer", "npllama.model"})
    found = {(entry.imported, entry.deferred) for entry in imports_of("npllama.text.chat", source, known)}
    assert found == {
        ("npllama.ops", False),
        ("npllama.errors", False),
        ("npllama", False),
        ("npllama.text.tokenizer", False),
        ("npllama.model", False),
        ("npllama.cache", True),
        ("torch.nn", True),
        ("numba", True),
    }


def test_the_engine_never_imports_torch_or_what_stands_outside() -> None:
    broken = [
        describe(found)
        for found in all_imports()
        if found.importer.startswith("npllama") and found.imported.split(".")[0] in FOREIGN_TO_THE_ENGINE
    ]
    assert not broken, "\n".join(broken)


def test_the_package_itself_imports_its_parts_only_inside_functions() -> None:
    eager = [
        describe(found)
        for found in all_imports()
        if found.importer == "npllama" and found.imported.startswith("npllama.") and not found.deferred
        if found.imported != "npllama.version"
    ]
    assert not eager, "\n".join(eager)


def test_no_two_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {name: set() for name in KNOWN}
    for found in all_imports():
        if found.importer != "npllama" and found.imported in KNOWN:
            graph[found.importer].add(found.imported)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as problem:
        pytest.fail(" -> ".join(problem.args[1]))
    assert len(order) == len(KNOWN)


def test_in_the_checkpoint_wing_nothing_stands_on_conversion_but_the_download() -> None:
    above = {
        found.importer
        for found in all_imports()
        if found.imported == "npllama.checkpoint.convert" and room_of(found.importer) == "checkpoint"
    }
    assert above <= {"npllama.checkpoint.pull"}


def compiled(file: Path) -> Iterator[str]:
    """Yield the places where a file compiles a function or uses the compiler's loops."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in COMPILERS:
            yield f"{file.relative_to(ROOT)}:{node.lineno} uses {name}"


def test_compiled_code_lives_in_the_kernels() -> None:
    outside = [place for name, file in ENGINE.items() if room_of(name) != "kernels" for place in compiled(file)]
    assert not outside, "\n".join(outside)
    inside = [place for name, file in ENGINE.items() if room_of(name) == "kernels" for place in compiled(file)]
    assert inside, "the scan finds no compiled code at all"


def public_functions(module: ModuleType) -> dict[str, inspect.Signature]:
    """Return the public functions that a module or package offers, compiled ones included, without annotations."""
    found = {}
    for name, value in vars(module).items():
        home = getattr(value, "__module__", None) or ""
        if name.startswith("_") or not home.startswith(module.__name__) or isinstance(value, type):
            continue
        if callable(value):
            signature = inspect.signature(value)
            bare = [entry.replace(annotation=entry.empty) for entry in signature.parameters.values()]
            found[name] = signature.replace(parameters=bare, return_annotation=signature.empty)
    return found


def test_every_kernel_has_a_twin_in_the_textbook_with_the_same_signature() -> None:
    pytest.importorskip("numba")
    ops = public_functions(importlib.import_module("npllama.ops"))
    kernels = public_functions(importlib.import_module("npllama.kernels"))
    assert kernels
    different = [
        f"kernels.{name}{signature} but ops.{name}{ops.get(name, ' is missing')}"
        for name, signature in kernels.items()
        if ops.get(name) != signature
    ]
    assert not different, "\n".join(different)


def run_fresh(code: str) -> str:
    """Run code in a new interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = run_fresh(f"import sys, npllama; print([name for name in {NOT_ON_IMPORT!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_every_module_imports_where_torch_cannot() -> None:
    modules = sorted(name for name in ENGINE if not name.endswith("__main__"))
    code = f"""
import importlib, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, NoTorch())
for name in {modules!r}:
    importlib.import_module(name)
print(len({modules!r}))
"""
    assert int(run_fresh(code)) == len(modules) > 0


@pytest.mark.parametrize("folder", ["npllama", "oracle", "tests", "tools"])
def test_no_file_is_longer_than_two_people_can_hold_in_mind(folder: str) -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / folder).rglob("*.py")}
    too_long = {str(file.relative_to(ROOT)): length for file, length in lengths.items() if length > MAX_LINES}
    assert not too_long
