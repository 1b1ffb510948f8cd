"""Programs that the fault tests run as processes of their own, because they die, or are measured, or hold a lock.

``python -m tests.checkpoint.drivers crash FOLDER`` kills a conversion at every step that touches the disk;
``... hold FOLDER`` converts, and stops in the middle until a line comes on stdin;
``... memory FOLDER BYTES`` converts a model of so many bytes and prints by how much its memory grew.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.names import expected
from npllama.checkpoint.store.folder import Store
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.dtypes import Array
from npllama.errors import FileAccessError, IncompleteConversionError
from tests.checkpoint.tiny import CONFIG, checkpoint, stored, tree

OLD, NEW = 1, 2
#: What touches the disk and is announced by the interpreter; fsync is not, and is announced by `announce_fsync`.
STEPS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "os.fsync")


def model(seed: int) -> Checkpoint:
    """Return one of two models that differ in every file."""
    config = replace(CONFIG, n_layers=1)
    return checkpoint(stored(config, seed=seed), config=config, notes=(f"seed {seed}",))


def run(target: Path, *, force: bool) -> None:
    convert_checkpoint(model(NEW), target, dtype="f32", force=force)


# --- crash ---------------------------------------------------------------------------------------------------------


def announce_fsync() -> None:
    """Let fsync announce itself and do nothing else: a killed process loses nothing that it wrote."""
    os.fsync = lambda descriptor: sys.audit("os.fsync", f"/proc/self/fd/{descriptor}")  # type: ignore[assignment]


def die_at(step: int, folder: Path) -> None:
    """Have the kernel kill this process just before its ``step``-th access to something in the folder."""
    left = step

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in STEPS and arguments and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            if path.startswith("/proc/self/fd/") or str(path).startswith(str(folder)):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

    sys.addaudithook(hook)


def killed_at(step: int, folder: Path, *, force: bool) -> bool:
    """Run a conversion that dies at a step; tell whether it came that far."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            die_at(step, folder)
            run(folder / "model", force=force)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the conversion failed at step {step}, force={force}")
    return os.WIFSIGNALED(status)


def state_of(target: Path, complete: dict[int, dict[str, bytes]]) -> str:
    """Say what a reader sees: one of the models, whole, or nothing; anything else is a failure."""
    try:
        Store.open(target)
    except (IncompleteConversionError, FileAccessError):
        return "nothing"
    found = tree(target)
    return next((str(seed) for seed, content in complete.items() if found == content), "a mixture")


def crash(folder: Path) -> None:
    announce_fsync()
    complete = {}
    for seed in (OLD, NEW):
        convert_checkpoint(model(seed), folder / f"complete-{seed}", dtype="f32")
        complete[seed] = tree(folder / f"complete-{seed}")
    report: dict[str, Any] = {"points": 0, "twice": 0, "failures": [], "seen": {}}
    for force in (False, True):
        for step in range(10_000):
            place = folder / "work"
            place.mkdir()
            if force:
                shutil.copytree(folder / f"complete-{OLD}", place / "model")
            if not killed_at(step, place, force=force):
                shutil.rmtree(place)
                break
            report["points"] += 1
            seen = state_of(place / "model", complete)
            key = f"{'replacing' if force else 'new'}: {seen}"
            report["seen"][key] = report["seen"].get(key, 0) + 1
            # Every third time, the second attempt dies as well, at some other step.
            if step % 3 == 0 and seen != str(NEW):
                report["twice"] += killed_at(step * 7 % 50, place, force=True)
            if state_of(place / "model", complete) != str(NEW) or force:
                run(place / "model", force=True)
            if tree(place / "model") != complete[NEW]:
                report["failures"].append(f"force={force} step={step}: other content")
            if sorted(entry.name for entry in place.iterdir()) not in (["model"], ["model", "model.lock"]):
                report["failures"].append(f"force={force} step={step}: {sorted(e.name for e in place.iterdir())}")
            shutil.rmtree(place)
    print(json.dumps(report))


# --- hold ----------------------------------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    def wait(what: str, done: int, total: int) -> None:
        if done > total // 2 and not waited:
            waited.append(True)
            print("holding", flush=True)
            sys.stdin.readline()

    waited: list[bool] = []
    convert_checkpoint(model(NEW), folder / "model", dtype="f32", progress=wait)
    print("done", flush=True)


# --- memory --------------------------------------------------------------------------------------------------------


def generated(total: int) -> Checkpoint:
    """Return a checkpoint of some 2 GB or less whose float32 rows are made when they are read."""
    config = replace(CONFIG, dim=4096, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, n_layers=1)
    config = replace(config, vocab_size=max(16, (total // 4 - 220_000_000) // (2 * 4096)))

    def made(name: str, shape: tuple[int, ...], seed: int) -> TensorRef:
        def read_rows(start: int, stop: int) -> Array:
            block = np.empty((stop - start, *shape[1:]), np.float32)
            block[...] = (np.arange(start, stop, dtype=np.float32) + seed).reshape(-1, *[1] * (len(shape) - 1))
            return block

        return TensorRef(name, shape, "float32", name, read_rows, 0)

    tensors = {name: made(name, entry.shape, i) for i, (name, entry) in enumerate(expected(config).items())}
    return Checkpoint("meta", "generated", config, tensors)


def memory(folder: Path, total: int) -> None:
    convert_checkpoint(model(NEW), folder / "warm-up")  # imports ml_dtypes, fills the allocator
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    target = convert_checkpoint(generated(total), folder / "model")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = Store.open(target)
    last = store.tensor("output.weight").numbers(-1)
    print(json.dumps({"kilobytes": after - before, "nbytes": store.nbytes, "last": float(last[0])}))


def arguments() -> Iterator[Any]:
    yield Path(sys.argv[2])
    yield from map(int, sys.argv[3:])


if __name__ == "__main__":
    {"crash": crash, "hold": hold, "memory": memory}[sys.argv[1]](*arguments())
