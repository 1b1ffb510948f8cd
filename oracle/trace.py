"""`python -m oracle trace`: a reference's run as a folder that a machine without torch can compare itself with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from npllama.check.trace import TraceWriter
from oracle.references import REFERENCES
from oracle.run import check_run, record
from oracle.weights import Source


def write_trace(
    source: Source,
    tokens: Sequence[int],
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    prefill: int | None = None,
    greedy: int = 0,
    by: str = "oracle",
) -> Path:
    """Run a reference and write every tensor that it shows.

    Parameters
    ----------
    source : Source
        The model, usually a `Store`.
    tokens : sequence of int
        Ids to feed, the prompt's first.
    path : path-like
        Folder to make.
    dtype : {"float32", "bfloat16", "float64"}
        What to compute in.
    prefill : int, optional
        How many tokens go in at once, the others one by one; by default all.
    greedy : int
        Steps to decode behind them, each with the most probable token.
    by : {"oracle", "transformers", "meta"}
        Who runs.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    NpllamaError
        The tokens do not fit the model, the reference cannot run here, or the folder cannot be written.
    """
    first = len(tokens) if prefill is None else prefill
    check_run(source.config, tokens, first, greedy)
    with (
        REFERENCES[by](source, dtype, len(tokens) + greedy) as reference,
        TraceWriter(
            path,
            producer=reference.producer,
            dtype=dtype,
            tokens=tokens,
            prefill=first,
            steps=len(tokens) - first + greedy,
            config=source.config,
        ) as writer,
    ):
        record(reference, tokens, writer, prefill=first, greedy=greedy)
        return writer.finish()
