"""llama.cpp through the low-level calls of llama-cpp-python, fed as its own llama-bench does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
from serving import Engine, serve_engine

_BATCH = 2048  # llama-bench's default; a batch is computed in parts of 512
_FLOAT16_BYTES = 2


class LlamaCpp:
    """A GGUF file, mapped, with the library's default settings."""

    def __init__(self, settings: dict[str, Any]) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(settings["model"].encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        self._threads = settings["threads"]
        self._context: Any = None
        self._capacity = 0
        system = llama.llama_print_system_info().decode()
        features = [part.split("=")[0].split(":")[-1].strip() for part in system.split("|") if "= 1" in part]
        self.version = f"llama-cpp-python {llama.__version__} ({' '.join(features)})"
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self.weight_bytes = round(llama.llama_model_size(self._model) * (1 - settings["unread"]))
        layers, heads = llama.llama_model_n_layer(self._model), llama.llama_model_n_head(self._model)
        kv_width = llama.llama_model_n_embd(self._model) // heads * llama.llama_model_n_head_kv(self._model)
        self.position_bytes = 2 * layers * kv_width * _FLOAT16_BYTES

    def start(self, capacity: int) -> None:
        """Clear the cache, in a larger context where this one is too small."""
        if capacity > self._capacity:
            if self._context:
                llama.llama_free(self._context)
            settings = llama.llama_context_default_params()
            settings.n_ctx = self._capacity = capacity
            settings.n_batch = _BATCH
            settings.n_threads = settings.n_threads_batch = self._threads
            self._context = llama.llama_init_from_model(self._model, settings)
            llama.llama_set_warmup(self._context, True)
            self.feed([0])
            llama.llama_set_warmup(self._context, False)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def feed(self, tokens: list[int]) -> None:
        """Decode batches; the last token's logits are asked for, and waited for."""
        for start in range(0, len(tokens), _BATCH):
            part = tokens[start : start + _BATCH]
            ids = (llama.llama_token * len(part))(*part)
            if llama.llama_decode(self._context, llama.llama_batch_get_one(ids, len(part))):
                raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(self._context)

    def logits(self) -> Sequence[float]:
        """Return the last logits."""
        pointer = llama.llama_get_logits_ith(self._context, -1)
        return ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self.vocab_size)).contents[:]


def load(settings: dict[str, Any]) -> Engine:
    """Load the model."""
    return LlamaCpp(settings)


if __name__ == "__main__":
    serve_engine(load)
