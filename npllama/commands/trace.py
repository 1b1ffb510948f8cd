"""`npllama trace`: record every intermediate tensor of a run."""

from __future__ import annotations

import argparse

from npllama import __version__
from npllama.check.run import dtype_of, run_trace
from npllama.check.trace import TraceWriter
from npllama.commands.console import notice
from npllama.commands.engine import load_model, prepared
from npllama.errors import ParameterError
from npllama.generation.prompt import prompt_ids
from npllama.taps import Recorder


def run(options: argparse.Namespace) -> int:
    """Run a prompt or token ids through the model, and write the trace."""
    if options.prompt is None and options.tokens is None:
        raise ParameterError("nothing to run", remedy="Give a PROMPT or --tokens 1,2,3.")
    if options.prompt is not None and options.tokens is not None:
        raise ParameterError("a PROMPT and --tokens were given", remedy="Give one of them.")
    model = load_model(options)
    Recorder(model.config, options.taps)  # refuses a pattern that no tensor's name matches
    tokens = prompt_ids(model, options.prompt if options.tokens is None else options.tokens)
    fed = options.decode if options.teacher_force else 0
    if fed >= len(tokens) or (options.teacher_force and not fed):
        raise ParameterError(
            f"{len(tokens)} tokens, of which the last {fed} are to be fed one by one",
            remedy="Give --decode at least 1, and fewer than there are tokens.",
        )
    prefill = len(tokens) - fed
    with TraceWriter(
        options.output,
        producer=f"npllama {__version__} ({options.backend})",
        dtype=dtype_of(model),
        tokens=tokens,
        prefill=prefill,
        config=model.config,
    ) as writer:
        prepared(model)
        run_trace(model, tokens, prefill=prefill, into=writer, greedy=options.decode - fed, pattern=options.taps)
        path = writer.finish()
    notice(f"{prefill} tokens and {options.decode} decode steps in {model.backend}")
    print(path)
    return 0
