"""OpenVINO's runtime on a model that optimum-intel exported, its logits cut to the last token as in the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from serving import Engine, serve_engine


class OpenVino:
    """An exported folder; keys and values are the state of the compiled model."""

    def __init__(self, settings: dict[str, Any]) -> None:
        folder = Path(settings["model"])
        model = ov.Core().read_model(folder / "openvino_model.xml")
        _keep_last_logits(model)
        performance = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": settings["threads"]}
        compiled = ov.Core().compile_model(model, "CPU", performance)
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._length = 0
        config = json.loads((folder / "config.json").read_text())
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        cache = compiled.get_property("KV_CACHE_PRECISION")
        self.version = (
            f"OpenVINO {ov.__version__.split('-')[0]} (computes in {precision}, cache in {cache.to_string()})"
        )
        self.vocab_size = config["vocab_size"]
        self.weight_bytes = round((folder / "openvino_model.bin").stat().st_size * (1 - settings["unread"]))
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        kv_width = config["num_key_value_heads"] * head_dim
        self.position_bytes = 2 * config["num_hidden_layers"] * kv_width * cache.bitwidth // 8

    def start(self, capacity: int) -> None:
        """Forget keys and values."""
        self._request.reset_state()
        self._length = 0

    def feed(self, tokens: list[int]) -> None:
        """Run tokens and wait."""
        first, self._length = self._length, self._length + len(tokens)
        values = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, self._length), np.int64),
            "position_ids": np.arange(first, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self._request.infer({name: value for name, value in values.items() if name in self._inputs})

    def logits(self) -> Sequence[float]:
        """Return the last logits."""
        found: Sequence[float] = self._request.get_tensor("logits").data[0, -1].tolist()
        return found


def _keep_last_logits(model: Any) -> None:
    """Put a slice before the output matrix, which otherwise computes the logits of every token of a prompt."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = ops.slice(node.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    node.input(0).replace_source_output(last.output(0))


def load(settings: dict[str, Any]) -> Engine:
    """Load the model."""
    return OpenVino(settings)


if __name__ == "__main__":
    serve_engine(load)
