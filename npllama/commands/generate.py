"""`npllama generate`: write text from a prompt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from npllama.commands.console import notice, per_second, print_json, visible
from npllama.commands.engine import load_model, read_text, sampling_settings
from npllama.generation.bench import Timed
from npllama.generation.generate import generate, prompt_ids
from npllama.model import Model


def run(options: argparse.Namespace) -> int:
    """Generate, and stream the text to stdout or print one JSON object."""
    prompt = _prompt_from_stdin() if options.prompt is None else options.prompt
    model = load_model(options)
    ids = _prompt_ids(model, prompt, raw=options.raw)
    if options.show_tokens:
        _show(model, "prompt", ids)
    steps = Timed(generate(model, ids, **sampling_settings(options)), len(ids))
    tokens: list[int] = []
    text = ""
    finish_reason = None
    try:
        for step in steps:
            tokens.append(step.token)
            text += step.text
            finish_reason = step.finish_reason
            if not options.json:
                print(step.text, end="", flush=True)
    finally:
        if not options.json and text and not text.endswith("\n"):
            print(flush=True)
    if options.show_tokens:
        _show(model, "generated", tokens)
    if options.json:
        print_json(
            {
                "prompt_tokens": ids,
                "tokens": tokens,
                "text": text,
                "finish_reason": finish_reason,
                "prefill_tokens_per_s": steps.prefill_tokens_per_s,
                "decode_tokens_per_s": steps.decode_tokens_per_s,
            }
        )
    notice(
        f"prompt: {len(ids)} tokens{_at(steps.prefill_tokens_per_s)}; "
        f"text: {len(tokens)} tokens{_at(steps.decode_tokens_per_s)}"
    )
    return 0


def _prompt_from_stdin() -> str:
    """Read the prompt from stdin. The last newline goes: it is the shell's, not the prompt's."""
    if sys.stdin.isatty():
        notice("type the prompt; Ctrl-D at the beginning of a line ends it")
    return _without_newline(read_text(None))


def _without_newline(text: str) -> str:
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _prompt_ids(model: Model, prompt: str, *, raw: bool) -> list[int]:
    has_template = model.tokenizer is not None and model.tokenizer.chat_template is not None
    return prompt_ids(model, prompt if raw or not has_template else [{"role": "user", "content": prompt}])


def _at(rate: float | None) -> str:
    return "" if rate is None else f" at {per_second(rate)}"


def _show(model: Model, what: str, ids: Iterable[int]) -> None:
    """List ids and their pieces on stderr."""
    pieces = [
        str(token) if model.tokenizer is None else f"{token} {visible(model.tokenizer.token_piece(token))}"
        for token in ids
    ]
    notice(f"{what} tokens: {', '.join(pieces)}")
