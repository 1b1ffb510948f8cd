"""A small real store, stand-ins for a loaded model, and a stdin to type into."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npllama.checkpoint.convert import convert
from npllama.cli import main
from npllama.text.bpe_json import byte_alphabet
from tests.fixtures.loud import loud_config, loud_tensors, write_hf
from tests.generation.fakes import VOCABULARY, FakeModel

SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")


def _tokenizer_json() -> dict[str, Any]:
    """Return a byte-level tokenizer of 256 bytes, as the tokenizers library would save it."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": dict(byte_alphabet()),
            "merges": [],
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a loud model of two layers as a Hugging Face checkpoint with a tokenizer of bytes."""
    config = loud_config(vocab_size=VOCABULARY)
    folder = write_hf(tmp_path_factory.mktemp("checkpoint") / "hf", loud_tensors(config), config)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer_json()))
    template = (
        "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": False, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def store(checkpoint: Path) -> Path:
    """Return the checkpoint converted to float32."""
    return convert(checkpoint, checkpoint.with_name("store"), dtype="f32")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeModel], None]:
    """Return what makes every command load the given stand-in."""

    def use(model: FakeModel) -> None:
        def load(path: str, *, cache_dtype: str | None, **options: Any) -> FakeModel:
            model.cache_dtype = cache_dtype or "float32"
            return model

        monkeypatch.setattr("npllama.commands.engine.load", load)

    return use


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], None]:
    """Return what puts text on stdin, which is no terminal."""

    def put(text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return put


class Run:
    """What a command returned and printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; anything else there fails."""
        return json.loads(self.out)


@pytest.fixture
def npllama(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Return the command line as a function."""

    def run(*arguments: object) -> Run:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run
