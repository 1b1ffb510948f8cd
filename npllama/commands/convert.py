"""`npllama convert`: a checkpoint becomes a folder of memory maps."""

from __future__ import annotations

import argparse

from npllama.checkpoint.convert import convert
from npllama.commands.console import Progress
from npllama.commands.verify import record


def run(options: argparse.Namespace) -> int:
    """Convert, and print the folder."""
    with Progress() as progress:
        folder = convert(
            options.src,
            options.dst,
            dtype=options.dtype,
            layers=options.layers,
            force=options.force,
            rope_factor=options.rope_factor,
            verify_crc=not options.no_crc,
            allow_nan=options.allow_nan,
            progress=progress,
        )
    if options.golden:
        record(folder)
    print(folder)
    return 0
