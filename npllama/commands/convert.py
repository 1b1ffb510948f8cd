"""`npllama convert`: a checkpoint becomes a folder of memory maps."""

from __future__ import annotations

import argparse
import json

from npllama.checkpoint.audit import Audit, audit
from npllama.checkpoint.convert import convert
from npllama.commands.console import Progress, human, notice, write_text


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
        found = options.audit and audit(options.src, folder, rope_factor=options.rope_factor, progress=progress)
    if found:
        write_text(options.audit, json.dumps(found.to_json(), indent=1) + "\n")
        notice(_summary(found))
    if options.golden:
        from npllama.commands.verify import record

        record(folder)
    print(folder)
    return 0


def _summary(found: Audit) -> str:
    total = found.total
    line = f"{human(total.count, '')} weights at {total.bits:.4g} bits each"
    if total.sqnr is None:
        return f"{line}, all exact"
    worst = min((error.sqnr, name) for name, error in found.errors.items() if error.sqnr is not None)
    return f"{line}, {total.sqnr:.1f} dB above their error; least, {worst[0]:.1f} dB, in {worst[1]}"
