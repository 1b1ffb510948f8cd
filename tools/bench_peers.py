"""Measure npllama beside llama.cpp, torch and OpenVINO: the same model, the same machine, round by round.

    python tools/bench_peers.py --shape 1b --work FOLDER --llamacpp PYTHON --openvino PYTHON

Every engine runs in a process of its own, and in its own interpreter where it is not installed in this one: npllama's,
torch's and transformers' is by default this one. The model is made once, in FOLDER. Engines take turns in every round,
and the memory's bandwidth is read before each, since a machine that is shared changes by the minute; compare the
ratios. Rounds are added to those of earlier calls, so that engines can be measured in several sittings.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from npllama.loading import physical_cores
from tools.environment import say
from tools.peers.engines import ENGINES, OWN, WORKERS, Engine, Interpreters, environment, prepare
from tools.peers.machine import processor
from tools.peers.models import SHAPES, unread_share
from tools.peers.process import Unavailable, Worker
from tools.peers.results import Results, as_json, as_text, merged


def main() -> int:
    """Prepare, measure, print."""
    options = _options()
    folder = options.work / options.shape
    interpreters = {OWN: sys.executable, "torch": options.torch, "llamacpp": options.llamacpp,
                    "openvino": options.openvino}  # fmt: skip
    chosen = [engine for key, engine in ENGINES.items() if any(fnmatch(key, glob) for glob in options.engines)]
    results: Results = {
        "machine": {"cpu": processor(), "threads": options.threads},
        "shape": options.shape,
        "prompt": options.prompt,
        "decode": options.decode,
        "engines": {},
        "rounds": [],
    }
    files: dict[Engine, Path] = {}
    for engine in chosen:
        try:
            files[engine] = prepare(engine.file, options.shape, folder, interpreters, options.threads)
        except Unavailable as problem:
            results["engines"][engine.key] = {"unavailable": str(problem)}
            say(f"{engine.key} is not available: {problem}")
    if options.prepare:
        return 0
    measure(results, files, folder, interpreters, options)
    kept = folder / "results.json"
    if kept.exists() and not options.fresh:
        results = merged(json.loads(kept.read_text()), results)
    kept.write_text(json.dumps(results))
    print(json.dumps(as_json(results)) if options.json else as_text(results))
    return 0


def measure(
    results: Results,
    files: dict[Engine, Path],
    folder: Path,
    interpreters: Interpreters,
    options: argparse.Namespace,
) -> None:
    """Run the rounds, and put what they gave into the results."""
    order = {"prompt": options.prompt, "decode": options.decode, "seconds": options.seconds}
    unread = unread_share(SHAPES[options.shape])
    with ExitStack() as stack:

        def start(worker: str, name: str, settings: dict[str, Any]) -> Worker:
            command = [interpreters[worker if worker in interpreters else OWN], str(WORKERS / f"{worker}_worker.py")]
            settings = {"threads": options.threads, **settings}
            return Worker(command, settings, folder / f"{name}.log", environment(), options.timeout)

        memory = start("memory", "memory", {})
        stack.callback(memory.close)
        alive: dict[Engine, Worker] = {}
        for number in range(options.rounds):
            found: dict[str, dict[str, float]] = {}
            for engine in turn(list(files), number):
                known = results["engines"].get(engine.key, {})
                if "unavailable" in known:
                    continue
                say(f"round {number + 1} of {options.rounds}: {engine.key}")
                try:
                    settings = {"model": str(files[engine]), "dtype": engine.dtype, "unread": unread}
                    worker = alive.get(engine) or start(engine.worker, engine.key, settings)
                    results["engines"][engine.key] = worker.greeting
                    read = memory.ask({})
                    found[engine.key] = {**read, **worker.ask(order)}
                except Unavailable as problem:
                    results["engines"][engine.key] = {**known, "unavailable": str(problem)}
                    say(f"{engine.key} is not available: {problem}")
                    continue
                if options.respawn:
                    worker.close()
                elif engine not in alive:
                    alive[engine] = worker
                    stack.callback(worker.close)
            results["rounds"].append(found)


def turn(engines: list[Engine], number: int) -> list[Engine]:
    """Return the engines in the order of a round: another one begins each time."""
    first = number % max(len(engines), 1)
    return engines[first:] + engines[:first]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="smollm2", help="the model (default: smollm2)")
    add("--work", type=Path, required=True, metavar="FOLDER", help="where models and results are kept")
    add("--engines", type=lambda text: text.split(","), default=["*"], metavar="GLOB,GLOB",
        help=f"which (default: all): {', '.join(ENGINES)}")  # fmt: skip
    add("--rounds", type=int, default=3, help="how often (default: 3)")
    add("--prompt", type=int, default=512, help="tokens to prefill (default: 512)")
    add("--decode", type=int, default=128, help="tokens to decode behind them (default: 128)")
    add("--seconds", type=float, default=20.0, help="end decoding after so long (default: 20)")
    add("--threads", type=int, default=physical_cores(), help="for every engine (default: the physical cores)")
    for name in ("llamacpp", "openvino", "torch"):
        add(f"--{name}", metavar="PYTHON", default=sys.executable, help=f"interpreter that has {name} (default: this)")
    add("--respawn", action="store_true", help="one engine in memory at a time: each is started anew in every round")
    add("--timeout", type=float, default=600.0, help="seconds that an engine may take to answer (default: 600)")
    add("--prepare", action="store_true", help="only make the models")
    add("--fresh", action="store_true", help="forget the rounds of earlier calls")
    add("--json", action="store_true", help="print the results as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
