"""The command line: every command and option, and how a run ends.

Only the parser lives here. A command's work is in the module of the same name in `npllama.commands`, imported when
the command runs, so that `--help` costs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TextIO

from npllama import __version__
from npllama.errors import NpllamaError

_EXAMPLES = """\
examples:
  npllama pull smollm2                              fetch a small real model; prints its folder
  npllama convert Llama3.2-1B/ llama-1b             a checkpoint becomes a folder of .npy memory maps
  npllama generate llama-1b "The sky is blue because"
  npllama chat llama-1b --system "Answer in one sentence."
  npllama inspect consolidated.00.pth               look into a checkpoint without converting it

exit codes: 0 done, 1 a check found a difference, 2 usage, 3 bad input, 4 unsupported, 5 disk or I/O,
6 incomplete or locked, 7 a check cannot tell, 70 an error of npllama itself, 130 interrupted
"""

_INTERNAL_ERROR = 70
_INTERRUPTED = 130
_BROKEN_PIPE = 141
_IO_ERROR = 5

_STORE = "folder of a converted model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the program's name; by default what it was called with.

    Returns
    -------
    int
        Exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        _show_what_can_be_shown(stream)
    try:
        options = _parse(arguments)
    except SystemExit as end:  # argparse has printed help, the version, or what is wrong
        return int(end.code or 0)
    try:
        code = int(import_module(f"npllama.commands.{options.command}").run(options))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as problem:
        if options.debug:
            traceback.print_exc()
        return _explain(problem)
    return code


def _show_what_can_be_shown(stream: TextIO) -> None:
    """Replace characters that the stream's encoding lacks, where an error would end the run."""
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _explain(problem: Exception) -> int:
    """Print what went wrong in one line and return the exit code."""
    if isinstance(problem, NpllamaError):
        print(f"npllama: {type(problem).__name__}: {problem}", file=sys.stderr)
        return problem.exit_code
    if isinstance(problem, OSError):
        print(f"npllama: {type(problem).__name__}: {problem}", file=sys.stderr)
        return _IO_ERROR
    print(f"npllama: internal error: {type(problem).__name__}: {problem}", file=sys.stderr)
    print("npllama: this should not happen: run it again with --debug and report what it prints", file=sys.stderr)
    return _INTERNAL_ERROR


# --- the parser -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    root = argparse.ArgumentParser(
        prog="npllama",
        description="Run Llama-family language models with NumPy and Numba.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument(
        "--version", action="version", version=f"npllama {__version__}", help="print the version and leave"
    )
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (summary, add_options) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        # SUPPRESS: the default must not undo a --debug that stands before the command
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        add_options(command)
    return root


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line, options before, between or behind the positional arguments.

    argparse takes an optional positional argument as absent when an option stands before it (``generate MODEL -n 5
    PROMPT``) and leaves it over: it is put in its place here.
    """
    root = parser()
    options, rest = root.parse_known_args(arguments)
    late = _LATE.get(options.command)
    if len(rest) == 1 and late is not None and getattr(options, late) is None and not rest[0].startswith("-"):
        setattr(options, late, rest[0])
    elif rest:
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _positive(text: str) -> int:
    """Parse an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


_positive.__name__ = "integer"  # argparse's messages quote it


def _count(text: str) -> int:
    """Parse an integer of 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


_count.__name__ = "integer"


def _token_ids(text: str) -> list[int]:
    """Parse token ids with commas between them."""
    ids = [int(part) for part in text.split(",")]
    if min(ids) < 0:
        raise argparse.ArgumentTypeError(f"{min(ids)} is no token id")
    return ids


_token_ids.__name__ = "list of token ids"


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else there")


def _add_engine(command: argparse.ArgumentParser, *, exact: bool = False) -> None:
    float64 = "; float64: the textbook in float64, the truth" if exact else ""
    command.add_argument(
        "--backend",
        choices=("fast", "numpy", "float64") if exact else ("fast", "numpy"),
        default="fast",
        help=f"fast: compiled kernels (the default); numpy: the textbook, nothing to compile{float64}",
    )
    command.add_argument(
        "--kernels",
        choices=("amx", "avx512bf16", "avx512", "avx2", "portable"),
        help="instructions that the fast backend may use (default: the best that the processor has)",
    )
    command.add_argument("--threads", type=_positive, metavar="N", help="how many threads (default: one for each core)")
    command.add_argument(
        "--activations",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="what the inputs of products are rounded to: float32 is exact; bfloat16, as other engines have it, makes "
        "long prompts about twice as fast where the processor has a unit for it; int8, in groups of 64, is what "
        "others multiply integer weights by (default: float32)",
    )


def _add_sampling(command: argparse.ArgumentParser, *, tokens: int, temperature: float, top_p: float) -> None:
    add = command.add_argument
    add("-n", type=_positive, default=tokens, metavar="N", help=f"most tokens to write (default: {tokens})")
    add("--temperature", type=float, default=temperature, metavar="T", help=f"0 is greedy (default: {temperature:g})")
    add("--top-k", type=int, default=0, metavar="K", help="choose among the K most probable tokens (default: all)")
    add("--top-p", type=float, default=top_p, metavar="P",
        help=f"choose among the most probable tokens that make up this share (default: {top_p:g})")  # fmt: skip
    add("--min-p", type=float, default=0.0, metavar="P",
        help="drop tokens less probable than this share of the most probable one (default: 0)")  # fmt: skip
    add("--seed", type=int, metavar="S", help="of the random numbers (default: another one every time)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; can be given repeatedly")


def _add_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache-dtype",
        choices=("f32", "bf16"),
        help="how keys and values are kept, and what attention multiplies in; bf16 takes half the memory, and a long "
        "text goes faster (default: bf16 if --activations rounds, otherwise f32)",
    )


def _add_lookup(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lookup",
        type=_count,
        default=0,
        metavar="N",
        help="guess up to N tokens at a time from earlier places of the text; the same text, sooner where it repeats "
        "itself or its prompt; 8 is a good number (default: 0, off)",
    )


def _add_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype",
        choices=("bf16", "f32", "int8", "int4"),
        default="bf16",
        help="how the weights are stored (default: bf16)",
    )


def _convert(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("src", metavar="SRC", help="checkpoint: a folder, or a .pth, .safetensors or .gguf file; gs:// and az:// too")
    add("dst", metavar="DST", help="folder to make")
    _add_dtype(command)
    add("--layers", type=_positive, metavar="N", help="keep only the first N layers, for a look at the machinery")
    add("--force", action="store_true", help="replace DST if it is a converted model")
    add("--rope-factor", type=float, metavar="F", help="RoPE scaling factor of a Meta checkpoint that names none")
    add("--no-crc", action="store_true", help="do not check the checksums inside a .pth file")
    add("--allow-nan", action="store_true", help="convert weights that hold NaN or infinity")
    add("--audit", metavar="FILE", help="measure the error of every stored tensor, and write it as JSON")
    add("--golden", action="store_true", help="record a small run beside the weights, which verify replays")


def _pull(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="which model: smollm2")
    command.add_argument("dst", metavar="DST", nargs="?", help="folder to make (default: in the user's cache folder)")
    _add_dtype(command)


def _generate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help=_STORE)
    add("prompt", metavar="PROMPT", nargs="?", help="from stdin when absent, without the newline at its end")
    _add_sampling(command, tokens=256, temperature=0.0, top_p=1.0)
    _add_lookup(command)
    _add_cache(command)
    add("--batch", metavar="FILE",
        help="continue every line of a file instead (- for stdin), side by side; one JSON object a line")  # fmt: skip
    add("--lanes", type=_positive, default=8, metavar="N", help="with --batch: texts in work at a time (default: 8)")
    _add_engine(command)
    add("--raw", action="store_true", help="complete the prompt as it is, without the model's chat template")
    add("--show-tokens", action="store_true", help="list the token ids and pieces on stderr")
    _add_json(command)


def _chat(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help=_STORE)
    add("--system", metavar="TEXT", help="the system message")
    add("--context", type=_positive, metavar="N",
        help="tokens that the whole dialog may take (default: 8192, or the model's context if shorter)")  # fmt: skip
    _add_sampling(command, tokens=1024, temperature=0.6, top_p=0.9)
    _add_lookup(command)
    _add_cache(command)
    _add_engine(command)


def _tokenize(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=f"{_STORE}, or a tokenizer.model, tokenizer.json or .gguf file")
    command.add_argument("text", metavar="TEXT", help="special tokens spelled in it are plain text")
    _add_json(command)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH", help="a converted model, or any checkpoint that can be converted")
    _add_json(command)


def _verify(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help=_STORE)
    add("--record", action="store_true", help="record a small run beside the weights, for later runs of verify")
    _add_engine(command)
    _add_json(command)


def _trace(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help=_STORE)
    add("prompt", metavar="PROMPT", nargs="?", help="text to run; may be left out with --tokens")
    add("-o", "--output", required=True, metavar="TRACE", help="folder to write")
    add("--tokens", type=_token_ids, metavar="1,2,3", help="token ids to run instead of a PROMPT")
    add("--decode", type=_count, default=0, metavar="N", help="greedy steps after the prompt (default: 0)")
    add("--teacher-force", action="store_true", help="feed the last N tokens one by one instead of greedy steps")
    add("--taps", default="*", metavar="GLOB", help='record only these, for example "layers.0.*" (default: all)')
    _add_engine(command, exact=True)


def _compare(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("candidate", metavar="CANDIDATE", help="trace to judge, of npllama or any other program")
    add("reference", metavar="REFERENCE", help="trace that is trusted")
    add("--truth", metavar="TRACE", help="float64 trace of the same model: the noise is measured, not estimated")
    add("--diagnose", metavar="MODEL", help="converted model to look for the mistake with; it also gives the truth")
    add("--html", metavar="FILE", help="write the report as a page, too")
    add("--junit", metavar="FILE", help="write the report as JUnit XML, too")
    _add_json(command)


def _perplexity(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help=_STORE)
    add("file", metavar="FILE", help="text file in UTF-8; - for stdin")
    add("--context", type=_positive, metavar="N",
        help="window in tokens (default: 512, or the model's context if shorter)")  # fmt: skip
    _add_cache(command)
    _add_engine(command)
    _add_json(command)


def _bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help=_STORE)
    add("--prompt", type=_positive, default=512, metavar="N", help="tokens to prefill (default: 512)")
    add("--decode", type=_positive, default=128, metavar="N", help="tokens to decode (default: 128)")
    add("--rounds", type=_positive, default=3, metavar="N", help="how often; medians are printed (default: 3)")
    add("--batch", type=_positive, default=1, metavar="N",
        help="sequences to decode together, beside one alone (default: 1)")  # fmt: skip
    _add_cache(command)
    _add_engine(command)
    _add_json(command)


#: Command -> its positional argument that may be absent.
_LATE = {"generate": "prompt", "pull": "dst", "trace": "prompt"}

#: Command -> summary, and what adds its options. The module of its handler has its name.
_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "convert": ("convert a checkpoint to a folder of .npy memory maps", _convert),
    "pull": ("fetch and convert a small real model", _pull),
    "generate": ("write text from a prompt", _generate),
    "chat": ("talk with a model", _chat),
    "tokenize": ("show a text as tokens", _tokenize),
    "inspect": ("show what is in a model or a checkpoint", _inspect),
    "verify": ("check every byte of a converted model, and replay its recorded run", _verify),
    "trace": ("record every intermediate tensor of a run", _trace),
    "compare": ("compare two traces tensor by tensor", _compare),
    "perplexity": ("measure how well a model predicts a text", _perplexity),
    "bench": ("measure how fast a model runs", _bench),
}
