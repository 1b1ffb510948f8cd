"""`npllama chat`: a dialog in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys

from npllama.commands.console import notice
from npllama.commands.engine import load_model, prepared, sampling_settings, tell_if_outgrown
from npllama.engine import Model
from npllama.errors import ContextOverflowError
from npllama.generation.conversation import Conversation
from npllama.generation.generate import generate

_DEFAULT_CONTEXT = 8192
_HELP = "Ctrl-C stops an answer, Ctrl-D leaves, /clear starts anew"


def run(options: argparse.Namespace) -> int:
    """Read messages from stdin and stream the answers to stdout until the input ends."""
    model = load_model(options)
    settings = {**sampling_settings(options), "lookup": options.lookup}
    conversation = _begin(model, options)
    generate(model, [0], cache=conversation.cache, **settings).close()  # refuses what no answer could be written with
    prepared(model)
    if _is_interactive():
        with contextlib.suppress(ImportError):  # absent on some systems; input() then has no history
            import readline  # noqa: F401 - importing it gives input() editing and history
        notice(_HELP)
    while True:
        try:
            message = _read()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if message == "/clear":
            conversation = _begin(model, options)
        elif message:
            _answer(model, conversation, message, settings)


def _begin(model: Model, options: argparse.Namespace) -> Conversation:
    capacity = options.context or min(_DEFAULT_CONTEXT, model.config.max_seq_len)
    return Conversation(model, system=options.system, capacity=capacity)


def _is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _read() -> str:
    """Return the next message without its newline; EOFError at the end of the input."""
    if _is_interactive():
        try:
            return input("> ").strip()
        except EOFError:
            print()
            raise
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _answer(model: Model, conversation: Conversation, message: str, settings: dict[str, object]) -> None:
    """Stream one answer; Ctrl-C ends it, and what is said stays in the dialog."""
    cache = conversation.cache
    before = cache.length
    try:
        with contextlib.closing(conversation.reply(message, **settings)) as steps:
            for step in steps:
                before = before or cache.length  # a first message was fed with its length known
                print(step.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    except ContextOverflowError as problem:
        notice(f"{type(problem).__name__}: {problem} Or type /clear to start anew.")
        return
    print(flush=True)
    tell_if_outgrown(model, before or cache.length, cache.length)
