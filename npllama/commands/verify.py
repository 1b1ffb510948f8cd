"""`npllama verify`: whether a converted model is, to the byte, what the conversion wrote."""

from __future__ import annotations

import argparse

from npllama.checkpoint.store import verify_store
from npllama.commands.console import Progress, human, notice, print_json
from npllama.errors import CorruptDataError


def run(options: argparse.Namespace) -> int:
    """Check sizes, headers and SHA-256 of every file; name all that are damaged."""
    with Progress() as progress:
        found = verify_store(options.model, progress)
    problems = [{"error": type(problem).__name__, "message": str(problem)} for problem in found.problems]
    if options.json:
        print_json({"ok": not problems, "files": found.files, "bytes": found.nbytes, "problems": problems})
    elif not problems:
        print(f"{found.files} files ({found.tensors} tensors), {human(found.nbytes)}: as they were written")
    for problem in problems:
        notice(f"{problem['error']}: {problem['message']}")
    return CorruptDataError.exit_code if problems else 0
