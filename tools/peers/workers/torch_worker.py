"""torch and transformers, as a user would call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from serving import Engine, serve_engine


class Torch:
    """A Hugging Face folder in one dtype."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        torch.set_grad_enabled(False)
        dtype = getattr(torch, settings["dtype"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        config = self._model.config
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.vocab_size = config.vocab_size
        held = {tensor.data_ptr(): tensor.nbytes for tensor in self._model.parameters()}  # a tied matrix once
        self.weight_bytes = round(sum(held.values()) * (1 - settings["unread"]))
        head_dim = config.hidden_size // config.num_attention_heads
        self.position_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * dtype.itemsize

    def start(self, capacity: int) -> None:
        """Begin a text; this cache grows as it is filled."""
        self._cache = transformers.DynamicCache(config=self._model.config)

    def feed(self, tokens: list[int]) -> None:
        """Run tokens; logits of the last only."""
        ids = torch.tensor([tokens])
        self._output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def logits(self) -> Sequence[float]:
        """Return the last logits."""
        found: Sequence[float] = self._output.logits[0, -1].float().tolist()
        return found


def load(settings: dict[str, Any]) -> Engine:
    """Load the model."""
    return Torch(settings)


if __name__ == "__main__":
    serve_engine(load)
