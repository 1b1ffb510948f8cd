"""`npllama bench`: how fast a model runs."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from npllama.commands.console import Progress, human, per_second, print_json, print_table
from npllama.commands.engine import load_model
from npllama.generation.bench import bench


def run(options: argparse.Namespace) -> int:
    """Measure, and print the speeds of prefill and decode."""
    model = load_model(options)
    with Progress() as progress:
        speed = bench(model, prompt=options.prompt, decode=options.decode, progress=progress)
    if options.json:
        print_json({**asdict(speed), "threads": model.threads, "backend": model.backend})
        return 0
    weights = human(speed.bytes_per_token)
    bandwidth = human(speed.bytes_per_token * speed.decode_tokens_per_s)
    rows = [
        ("prefill", str(speed.prefill_tokens), per_second(speed.prefill_tokens_per_s), ""),
        ("decode", str(speed.decode_tokens), per_second(speed.decode_tokens_per_s), f"{weights} each, {bandwidth}/s"),
    ]
    print_table(("phase", "tokens", "speed", "weights read"), rows)
    print(f"backend {model.backend}, {model.threads} threads")
    return 0
