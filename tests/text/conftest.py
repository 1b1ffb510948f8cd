"""Real tokenizers, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from npllama.checkpoint.gguf import open_gguf, tokenizer_files
from npllama.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_files(smollm2_gguf: Path) -> dict[str, bytes]:
    """Return the tokenizer files of SmolLM2, as conversion writes them."""
    file = open_gguf(smollm2_gguf)
    file.source.close()
    return tokenizer_files(file.metadata, "smollm2.gguf")


@pytest.fixture(scope="session")
def smollm2(smollm2_files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_files(smollm2_files)


@pytest.fixture(scope="session")
def llama3(llama3_tokenizer_model: Path) -> Tokenizer:
    return Tokenizer.from_path(llama3_tokenizer_model)


@pytest.fixture(scope="session")
def llama3_json(llama3_tokenizer_model: Path) -> str:
    """Return Llama 3's ``tokenizer.json`` as transformers converts it from Meta's file."""
    pytest.importorskip("torch")
    slow = pytest.importorskip("transformers.convert_slow_tokenizer")
    return slow.TikTokenConverter(str(llama3_tokenizer_model)).converted().to_str()
