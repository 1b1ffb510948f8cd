"""`npllama perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from npllama.commands.console import Progress, print_json
from npllama.commands.engine import load_model, read_text
from npllama.generation.perplexity import perplexity


def run(options: argparse.Namespace) -> int:
    """Measure, and print the perplexity with its standard error."""
    text = read_text(None if options.file == "-" else options.file)
    model = load_model(options)
    with Progress() as progress:
        found = perplexity(model, text, context=options.context, progress=progress)
    if options.json:
        print_json(asdict(found))
    else:
        print(
            f"perplexity {found.perplexity:.4f} +/- {found.standard_error:.4f} "
            f"({found.tokens} tokens in {found.windows} windows of {found.context})"
        )
    return 0
