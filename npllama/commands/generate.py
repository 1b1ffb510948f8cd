"""`npllama generate`: write text from a prompt."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable

from npllama.commands.console import notice, per_second, print_json, visible
from npllama.commands.engine import load_model, prepared, read_text, sampling_settings, tell_if_outgrown
from npllama.engine import Model
from npllama.errors import ParameterError
from npllama.generation.batch import batch_ids, generate_batch
from npllama.generation.bench import Timed
from npllama.generation.generate import generate
from npllama.generation.prompt import Prompt, prompt_ids
from npllama.generation.writer import Step


def run(options: argparse.Namespace) -> int:
    """Generate: stream one text to stdout or print it as a JSON object, or print an object for each of many."""
    return _run_one(options) if options.batch is None else _run_batch(options)


def _run_one(options: argparse.Namespace) -> int:
    text = _prompt_from_stdin() if options.prompt is None else options.prompt
    model = load_model(options)
    ids = prompt_ids(model, _prompt(model, text, raw=options.raw))
    if options.show_tokens:
        _show(model, "prompt", ids)
    settings = sampling_settings(options)
    steps = Timed(generate(model, ids, lookup=options.lookup, **settings), len(ids))
    written: list[Step] = []
    prepared(model)
    try:
        for step in steps:
            written.append(step)
            if not options.json:
                print(step.text, end="", flush=True)
    finally:
        if not options.json and _needs_newline(_text(written)):
            print(flush=True)
    if options.show_tokens:
        _show(model, "generated", _tokens(written))
    if options.json:
        print_json(
            {
                **_found(ids, written),
                "prefill_tokens_per_s": steps.prefill_tokens_per_s,
                "decode_tokens_per_s": steps.decode_tokens_per_s,
            }
        )
    tell_if_outgrown(model, len(ids), len(ids) + len(written) - 1)
    drafted = f", {sum(step.drafted for step in written)} of them drafted" if options.lookup else ""
    notice(
        f"prompt: {len(ids)} tokens{_at(steps.prefill_tokens_per_s)}; "
        f"text: {len(written)} tokens{_at(steps.decode_tokens_per_s)}{drafted}"
    )
    return 0


def _run_batch(options: argparse.Namespace) -> int:
    """Continue every line of a file, and print each text as it ends."""
    if options.prompt is not None or options.lookup:
        raise ParameterError(
            "--batch goes with neither a PROMPT nor --lookup", remedy="The prompts are the lines of the file."
        )
    lines = io.StringIO(read_text(None if options.batch == "-" else options.batch))
    model = load_model(options)
    prompts = batch_ids(model, [_prompt(model, _without_newline(line), raw=options.raw) for line in lines])
    steps = generate_batch(
        model,
        prompts,
        lanes=options.lanes,
        **sampling_settings(options),
    )
    prepared(model)
    texts: list[tuple[list[int], list[Step]]] = [(prompt, []) for prompt in prompts]
    for index, step in steps:
        ids, written = texts[index]
        written.append(step)
        if step.finish_reason is not None:
            print_json({"index": index, **_found(ids, written)})
            tell_if_outgrown(model, len(ids), len(ids) + step.index)
    return 0


def _found(ids: list[int], written: list[Step]) -> dict[str, object]:
    """Return what JSON says of a text."""
    return {
        "prompt_tokens": ids,
        "tokens": _tokens(written),
        "text": _text(written),
        "finish_reason": written[-1].finish_reason,
    }


def _tokens(written: list[Step]) -> list[int]:
    return [step.token for step in written]


def _text(written: list[Step]) -> str:
    return "".join(step.text for step in written)


def _needs_newline(text: str) -> bool:
    return text != "" and not text.endswith("\n")


def _prompt_from_stdin() -> str:
    """Read the prompt from stdin. The last newline goes: it is the shell's, not the prompt's."""
    if sys.stdin.isatty():
        notice("type the prompt; Ctrl-D at the beginning of a line ends it")
    return _without_newline(read_text(None))


def _without_newline(text: str) -> str:
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _prompt(model: Model, text: str, *, raw: bool) -> Prompt:
    """Return a text as it is, or as a user's message where the model has a chat template."""
    has_template = model.tokenizer is not None and model.tokenizer.chat_template is not None
    return text if raw or not has_template else [{"role": "user", "content": text}]


def _at(rate: float | None) -> str:
    return "" if rate is None else f" at {per_second(rate)}"


def _show(model: Model, what: str, ids: Iterable[int]) -> None:
    """List ids and their pieces on stderr."""
    pieces = [
        str(token) if model.tokenizer is None else f"{token} {visible(model.tokenizer.token_piece(token))}"
        for token in ids
    ]
    notice(f"{what} tokens: {', '.join(pieces)}")
