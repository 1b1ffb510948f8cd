"""What the commands that run a model share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from npllama.commands.console import Progress, notice
from npllama.engine import Model
from npllama.errors import FileAccessError, TokenizerError
from npllama.generation.prefill import reach
from npllama.loading import load

#: Value of --cache-dtype, or None where it is not given -> dtype of the model's caches, or None for the default.
_CACHE_DTYPES = {None: None, "f32": "float32", "bf16": "bfloat16"}


def load_model(options: argparse.Namespace) -> Model:
    """Open ``options.model`` with the engine options, and say on stderr what should be known of it.

    What can be wrong with the rest of a command is found before `prepared` makes anybody wait.
    """
    model = load(
        options.model,
        backend=options.backend,
        threads=options.threads,
        kernels=options.kernels,
        activations=options.activations,
        cache_dtype=_CACHE_DTYPES[getattr(options, "cache_dtype", None)],
        prepare=False,
    )
    if model.notice:
        notice(model.notice)
    return model


def prepared(model: Model) -> Model:
    """Return a model whose kernels are compiled; show how far that is."""
    with Progress() as progress:
        model.prepare(progress)
    return model


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options as `generate` takes them."""
    return {
        "max_new_tokens": options.n,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "stop": options.stop,
    }


def tell_if_outgrown(model: Model, before: int, after: int) -> None:
    """Say that a longrope model changed its frequencies, where its text grew from ``before`` to ``after`` positions."""
    limit = reach(model, before)
    if after > limit:
        notice(
            f"the text outgrew the {limit} tokens of the model's original context: there it was read anew, with the "
            "RoPE frequencies of long texts"
        )


def read_text(file: str | None) -> str:
    """Read a text file, or stdin for None.

    Raises
    ------
    FileAccessError
        The file cannot be read.
    TokenizerError
        It is not UTF-8.
    """
    try:
        content = sys.stdin.buffer.read() if file is None else Path(file).read_bytes()
    except OSError as problem:
        raise FileAccessError(f"cannot read: {problem.strerror or problem}", file=file or "stdin") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise TokenizerError(
            f"byte 0x{content[problem.start]:02x} is not UTF-8 text",
            file=file or "stdin",
            offset=problem.start,
            remedy="Convert the text to UTF-8.",
        ) from None
