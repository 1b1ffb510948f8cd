"""Run the tests: `python3 tools/test.py [--no-torch] [arguments of pytest]`.

Any Python 3.10+ will do and nothing needs to be installed: the first run makes a virtual environment in the user's
cache folder, later runs reuse it. Without arguments all tests run, on several processors.
"""

from __future__ import annotations

import argparse
import os
import sys

from environment import ROOT, SetupError, become, prepare

REQUIREMENTS = ROOT / "tools" / "requirements-test.txt"
TORCH_MARK = "# --- with torch ---"
#: Processes that run all tests, at most: each takes up to 4 GB.
PROCESSES = 4
#: What tells libraries beneath the tests (NumPy's BLAS, torch) to leave the other processors to the other processes.
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def requirements(torch: bool) -> list[str]:
    """Return the lines of the requirements file as pip takes them, those below the mark only with torch."""
    text = REQUIREMENTS.read_text(encoding="utf-8")
    lines = text if torch else text.split(TORCH_MARK)[0]
    return [stripped for line in lines.splitlines() if (stripped := line.split("#")[0].strip())]


def on_all_processors() -> list[str]:
    """Return what tells pytest to share all files among processes, in their order.

    So what the tests of a file share is made once, and files of few tests, which take longest, do not come last.
    """
    return ["-n", str(min(os.cpu_count() or 1, PROCESSES)), "--dist", "loadfile", "--no-loadscope-reorder"]


def main() -> None:
    """Make or reuse the environment, then become pytest in it."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--no-torch", action="store_true", help="leave torch out; the tests that need it are skipped")
    parser.add_argument("--python", action="store_true", help="print the environment's interpreter instead of testing")
    arguments, for_pytest = parser.parse_known_args()
    name = "test-no-torch" if arguments.no_torch else "test"
    wanted = requirements(torch=not arguments.no_torch)
    try:
        python = prepare(name, wanted)
    except SetupError as problem:
        pin = next((line for line in wanted if line.startswith("torch==")), None)
        if pin and f"No matching distribution found for {pin}" in str(problem):
            raise SystemExit(
                f"npllama: {problem}\nnpllama: {pin} has no build for this Python ({sys.version.split()[0]}). "
                "Use another Python, or test without it: python3 tools/test.py --no-torch"
            ) from None
        raise SystemExit(f"npllama: {problem}") from None
    if arguments.python:
        print(python)
        return
    os.chdir(ROOT)
    if not for_pytest:
        for_pytest = on_all_processors()
        os.environ.update(ALONE)
    become(python, ["-m", "pytest", *for_pytest])


if __name__ == "__main__":
    main()
