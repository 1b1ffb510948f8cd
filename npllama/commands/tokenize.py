"""`npllama tokenize`: show a text as tokens."""

from __future__ import annotations

import argparse

from npllama.commands.console import print_json, print_table, visible
from npllama.loading import Tokenizer


def run(options: argparse.Namespace) -> int:
    """Print ids and pieces; BOS is there where the tokenizer says so."""
    tokenizer = Tokenizer.from_path(options.model)
    tokens = tokenizer.encode(options.text)
    pieces = [tokenizer.token_piece(token) for token in tokens]
    if options.json:
        print_json({"tokens": tokens, "pieces": pieces})
    else:
        print_table(
            ("id", "piece"), [(str(token), visible(piece)) for token, piece in zip(tokens, pieces, strict=True)]
        )
    return 0
