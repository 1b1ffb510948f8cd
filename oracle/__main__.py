"""The oracle's command line: ``python -m oracle trace`` and ``python -m oracle check``.

With `oracle.check` this is the one place of the package that knows the engine, and by its public names only: a prompt
becomes tokens with the model's own tokenizer, ``npllama.Tokenizer``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from npllama.checkpoint.store import Store
from npllama.errors import BackendError, NpllamaError, ParameterError, TokenizerError

_DTYPES = ("float32", "bfloat16", "float64")
_IO_ERROR = 5
_INTERRUPTED = 130

#: Some sixty tokens of more than one kind: enough for positions to matter.
_PROMPT = (
    "A lighthouse keeper counts the ships that pass: 17 on Monday, 23 on Tuesday, none on Wednesday because of fog. "
    "On Thursday a letter comes from Zürich. It asks for the week's total, and for the keeper's favourite ship so far. "
    "The keeper answers that"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done or match, 1 differs, 7 cannot tell, and those of `npllama.errors` for what cannot be run.
    """
    options = _parser().parse_args(arguments)
    try:
        if importlib.util.find_spec("torch") is None:
            raise BackendError("the oracle needs torch", remedy="Install it: `pip install -e .[oracle]`.")
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (NpllamaError, OSError) as problem:
        if options.debug:
            traceback.print_exc()
        print(f"oracle: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code if isinstance(problem, NpllamaError) else _IO_ERROR


def _trace(options: argparse.Namespace) -> int:
    from oracle.trace import write_trace

    store = Store.open(options.model)
    tokens = _token_ids(store, options.prompt, options.tokens)
    fed = options.decode if options.teacher_force else 0
    if options.teacher_force and not 0 < fed < len(tokens):
        raise ParameterError(
            f"{len(tokens)} tokens, of which the last {fed} are to be fed one by one",
            remedy="Give --decode at least 1 and fewer than there are tokens.",
        )
    path = write_trace(
        store,
        tokens,
        options.output,
        dtype=options.dtype,
        prefill=len(tokens) - fed,
        greedy=options.decode - fed,
        by=options.by,
    )
    print(path)
    return 0


def _check(options: argparse.Namespace) -> int:
    from npllama.check.reports import html_report, junit_report, text_report
    from oracle.check import check

    store = Store.open(options.model)
    tokens = _token_ids(store, _PROMPT if options.prompt is None else options.prompt, options.tokens)
    report = check(
        store,
        tokens,
        decode=options.decode,
        backend=options.backend,
        threads=options.threads,
        dtype=options.dtype,
        activations=options.activations,
        say=lambda text: print(f"oracle: {text}", file=sys.stderr, flush=True),
    )
    for file, spelled in ((options.html, html_report), (options.junit, junit_report)):
        if file is not None:
            Path(file).write_text(spelled(report), encoding="utf-8")
    print(json.dumps(report.to_json(), allow_nan=False) if options.json else text_report(report).rstrip("\n"))
    return report.exit_code


def _token_ids(store: Store, prompt: str | None, tokens: list[int] | None) -> list[int]:
    """Return the given ids, or the prompt's in the model's own tokenizer, with its BOS where it says so."""
    if tokens is not None:
        return tokens
    if prompt is None:
        raise ParameterError("nothing to run", remedy="Give a PROMPT or --tokens.")
    if store.tokenizer_folder is None:
        raise TokenizerError("the model has no tokenizer", file=store.path, remedy="Give token ids: --tokens 1,2,3.")
    import npllama

    return list(npllama.Tokenizer.from_path(store.tokenizer_folder).encode(prompt))


# --- the parser -------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m oracle", description="Check every tensor of npllama against torch.")
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    trace = commands.add_parser("trace", help="write a trace: every tensor of a run in torch")
    _add_model(trace)
    add = trace.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="text to run; may be left out with --tokens")
    add("-o", "--output", required=True, metavar="TRACE", help="folder to write")
    add("--dtype", choices=_DTYPES, default="float32", help="what to compute in (default: float32)")
    add("--decode", type=_count, default=0, metavar="N", help="greedy steps after the prompt (default: 0)")
    add("--teacher-force", action="store_true", help="feed the last N tokens one by one instead of greedy steps")
    add("--by", choices=("oracle", "transformers", "meta"), default="oracle",
        help="who runs: the oracle, transformers or Meta's llama-models (default: oracle)")  # fmt: skip
    trace.set_defaults(run=_trace)

    check = commands.add_parser("check", help="compare the engine's tensors with torch's")
    _add_model(check)
    add = check.add_argument
    add("--prompt", metavar="TEXT", help="text to run (default: one of some sixty tokens)")
    add("--decode", type=_count, default=4, metavar="N", help="greedy steps after the prompt (default: 4)")
    add("--backend", choices=("fast", "numpy"), default="fast", help="of the engine (default: fast)")
    add("--threads", type=_count, metavar="N", help="threads of the engine (default: one for each core)")
    add("--dtype", choices=("float32", "bfloat16"),
        help="what the reference computes in, and so how much noise is allowed (default: --activations)")  # fmt: skip
    add("--activations", choices=("float32", "bfloat16", "int8"), default="float32",
        help="what inputs of the engine's products are rounded to (default: float32, not at all)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object on stdout and nothing else there")
    add("--html", metavar="FILE", help="write the report as a page, too")
    add("--junit", metavar="FILE", help="write the report for a test server, too")
    check.set_defaults(run=_check)
    return root


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="folder of a converted model")
    command.add_argument("--tokens", type=_ids, metavar="1,2,3", help="token ids to run, instead of a text")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _ids(text: str) -> list[int]:
    """Parse token ids with commas between them."""
    return [int(part) for part in text.split(",")]


_ids.__name__ = "list of token ids"  # argparse's messages quote it


def _count(text: str) -> int:
    """Parse an integer of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


_count.__name__ = "integer"


if __name__ == "__main__":
    sys.exit(main())
