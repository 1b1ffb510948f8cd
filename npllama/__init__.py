"""Llama-family language models with NumPy and Numba, no PyTorch.

Convert a checkpoint once into ``.npy`` memory maps, run it, look at every tensor on the way::

    import npllama

    npllama.convert("Llama-3.2-1B", "llama-1b", dtype="bf16")
    model = npllama.load("llama-1b")
    for step in npllama.generate(model, "The capital of France is", max_new_tokens=32):
        print(step.text, end="")

Importing the package imports nothing else: each name is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from npllama.version import VERSION as __version__

if TYPE_CHECKING:
    from npllama.cache import KVCache as KVCache
    from npllama.checkpoint.convert import convert as convert
    from npllama.checkpoint.pull import pull as pull
    from npllama.config import ModelConfig as ModelConfig
    from npllama.engine import Model as Model
    from npllama.errors import NpllamaError as NpllamaError
    from npllama.generation.batch import generate_batch as generate_batch
    from npllama.generation.generate import generate as generate
    from npllama.generation.writer import Step as Step
    from npllama.loading import Tokenizer as Tokenizer
    from npllama.loading import load as load
    from npllama.taps import record as record
    from npllama.text.chat import dialog_prompt as dialog_prompt

_HOME = {
    "KVCache": "npllama.cache",
    "Model": "npllama.engine",
    "ModelConfig": "npllama.config",
    "NpllamaError": "npllama.errors",
    "Step": "npllama.generation.writer",
    "Tokenizer": "npllama.loading",
    "convert": "npllama.checkpoint.convert",
    "dialog_prompt": "npllama.text.chat",
    "generate": "npllama.generation.generate",
    "generate_batch": "npllama.generation.batch",
    "load": "npllama.loading",
    "pull": "npllama.checkpoint.pull",
    "record": "npllama.taps",
}

__all__ = [*sorted(_HOME), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'npllama' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
