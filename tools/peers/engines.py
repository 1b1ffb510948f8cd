"""Which engines there are, and what makes the files that each of them runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools.environment import ROOT
from tools.peers.models import SHAPES, write_gguf, write_hf
from tools.peers.process import Unavailable, last_words

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Engine:
    """An engine with one format of weights.

    Attributes
    ----------
    name, format : str
        As the table spells them.
    bits : int
        Of a weight, nominally; npllama in as many bits is what it is compared with.
    worker : str
        Name of the script that runs it, and of the interpreter that the script needs.
    file : str
        What it runs, a key of the files that `prepare` makes.
    dtype : str
        For an engine that decides at load what it computes in: what the weights become in torch, and what the inputs
        of products are rounded to in npllama.
    """

    name: str
    format: str
    bits: int
    worker: str
    file: str
    dtype: str = ""

    @property
    def key(self) -> str:
        """The engine as the command line names it."""
        return f"{self.name}-{self.format}".lower().replace(" ", "-")

    @property
    def rounds(self) -> bool:
        """Whether it is npllama with rounded activations."""
        return self.name == OWN and self.dtype != "float32"


OWN = "npllama"

ENGINES = {
    engine.key: engine
    for engine in (
        Engine(OWN, "bf16", 16, OWN, "npllama-bf16", "float32"),
        Engine(OWN, "bf16 rounded", 16, OWN, "npllama-bf16", "bfloat16"),
        Engine("llama.cpp", "BF16", 16, "llamacpp", "BF16.gguf"),
        Engine("torch", "bf16", 16, "torch", "hf", "bfloat16"),
        Engine(OWN, "int8", 8, OWN, "npllama-int8", "float32"),
        Engine(OWN, "int8 rounded", 8, OWN, "npllama-int8", "bfloat16"),
        Engine(OWN, "int8 in int8", 8, OWN, "npllama-int8", "int8"),
        Engine("llama.cpp", "Q8_0", 8, "llamacpp", "Q8_0.gguf"),
        Engine("OpenVINO", "int8", 8, "openvino", "openvino-8"),
        Engine(OWN, "int4", 4, OWN, "npllama-int4", "float32"),
        Engine(OWN, "int4 rounded", 4, OWN, "npllama-int4", "bfloat16"),
        Engine(OWN, "int4 in int8", 4, OWN, "npllama-int4", "int8"),
        Engine("llama.cpp", "Q4_0", 4, "llamacpp", "Q4_0.gguf"),
        Engine("llama.cpp", "Q4_K_M", 4, "llamacpp", "Q4_K_M.gguf"),
        Engine("OpenVINO", "int4", 4, "openvino", "openvino-4"),
        Engine(OWN, "f32", 32, OWN, "npllama-f32", "float32"),
        Engine("torch", "f32", 32, "torch", "hf", "float32"),
    )
}

Interpreters = Mapping[str, str]


def prepare(file: str, shape: str, folder: Path, interpreters: Interpreters, threads: int) -> Path:
    """Return the path of a file or folder that an engine runs, made now unless it is there.

    Raises
    ------
    Unavailable
        It cannot be made; the message is the maker's.
    """
    path = folder / file
    if path.exists():
        return path

    def source(name: str) -> str:
        return str(prepare(name, shape, folder, interpreters, threads))

    def script(interpreter: str, name: str, *arguments: str) -> None:
        run([interpreters[interpreter], str(WORKERS / name), *arguments], folder / f"{file}.log")

    def convert(target: Path) -> None:
        command = [interpreters[OWN], "-m", "npllama", "convert", source("hf"), str(target), "--dtype"]
        run([*command, file.removeprefix("npllama-")], folder / f"{file}.log")

    def quantise(target: Path) -> None:
        script("llamacpp", "llamacpp_quantize.py", source("BF16.gguf"), str(target), target.stem, str(threads))

    def export(target: Path) -> None:
        script("openvino", "openvino_export.py", source("hf"), str(target), file.removeprefix("openvino-"))

    makers: dict[str, Callable[[Path], None]] = {
        "hf": lambda target: write_hf(shape, SHAPES[shape], target),
        "BF16.gguf": lambda target: write_gguf(shape, SHAPES[shape], target),
        ".gguf": quantise,
        "npllama-": convert,
        "openvino-": export,
    }
    maker = next(make for part, make in makers.items() if part in file)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "unfinished" / file
    shutil.rmtree(unfinished.parent, ignore_errors=True)
    unfinished.parent.mkdir()
    maker(unfinished)
    unfinished.rename(path)
    return path


def run(command: list[str], log: Path) -> None:
    """Run a maker, its output in a log file; if it fails, its last words are why the engine is not available."""
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, env=environment(), check=False)
    if done.returncode:
        raise Unavailable(last_words(log) or f"exit code {done.returncode}")


def environment() -> dict[str, str]:
    """Environment of every process: this checkout can be imported, and no library asks a server for files."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
