"""What the tests of the oracle share: loud models as sources of weights, recorded runs, and a measure of difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npllama.check.trace import MemoryTrace, TraceLike
from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.rope import frequencies
from npllama.checkpoint.tensor import Checkpoint, TensorRef
from npllama.config import Experts, ModelConfig, RopeScaling
from npllama.dtypes import Array, Tensor, narrow
from tests.fixtures.loud import LOUD_TOKENS, loud_config, loud_tensors

#: Shapes that differ in what an implementation of Llama can get wrong.
SHAPES = {
    "grouped": loud_config(),
    "one key head for each query head": loud_config(n_kv_heads=4),
    "tied": loud_config(tied=True),
    "scaled frequencies": loud_config(rope_scaling=RopeScaling("llama3", 8.0)),
    "heads not D / H wide": loud_config(head_dim=24),
}

#: For texts of up to 40 tokens, and beyond.
_LONGROPE = RopeScaling(
    "longrope",
    original_max_seq_len=40,
    short_factors=(1.0, 1.1, 1.0, 1.3, 1.0, 1.6, 2.0, 1.2),
    long_factors=(1.5, 2.0, 3.0, 4.5, 7.0, 9.0, 20.0, 31.0),
    attention_factor=1.19,
)
_GPT = {"n_kv_heads": 4, "norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh"}
_BIASES = {"qkv_bias": True, "attention_out_bias": True, "ffn_bias": True}

#: One loud model of every family, or two, as transformers can express it. Windows are shorter than the prompt.
FAMILIES = {
    "llama": loud_config(),
    "llama with biases": loud_config(**_BIASES),
    "mistral with a window": loud_config(family="mistral", windows=(24, 24)),
    "qwen2": loud_config(family="qwen2", qkv_bias=True, norm_eps=1e-6, tied=True),
    "qwen2 with a window in one layer": loud_config(family="qwen2", qkv_bias=True, windows=(0, 17)),
    "qwen3": loud_config(family="qwen3", qk_norm="head", head_dim=24),
    "phi3": loud_config(family="phi3", n_kv_heads=4, windows=(33, 33)),
    "phi3 with longrope": loud_config(family="phi3", rope_scaling=_LONGROPE),
    "mixtral": loud_config(family="mixtral", experts=Experts(count=4, active=2, hidden_dim=80)),
    "mixtral of one expert": loud_config(family="mixtral", experts=Experts(count=3, active=1, hidden_dim=32)),
    "qwen2_moe": loud_config(
        family="qwen2_moe", qkv_bias=True, experts=Experts(6, 3, 48, False, shared_dim=56, dense_layers=(1,))
    ),
    "qwen3_moe": loud_config(family="qwen3_moe", qk_norm="head", n_layers=3, experts=Experts(8, 2, 40)),
    "olmo2": loud_config(family="olmo2", norm_order="output", qk_norm="projection"),
    "gpt2": loud_config(family="gpt2", tied=True, max_seq_len=96, **_GPT, **_BIASES),
    "openai-gpt": loud_config(
        family="openai-gpt", hidden_dim=256, max_seq_len=96, norm_order="post", final_norm=False, **_GPT, **_BIASES
    ),
}

#: What no model of transformers has, or none in this combination.
OPTIONS = {
    "scores divided by another width, relu, biases after, LayerNorm without a last one": loud_config(
        family="decoder",
        norm="layer",
        norm_order="post",
        final_norm=False,
        positions="learned",
        max_seq_len=96,
        gated=False,
        activation="relu",
        attention_out_bias=True,
        ffn_bias=True,
        output_bias=True,
        score_dim=64,
    ),
    "gated gelu with biases, odd widths": loud_config(
        family="decoder", activation="gelu", ffn_bias=True, dim=60, head_dim=14, hidden_dim=73, vocab_size=101
    ),
    "experts, a shared one, windows, norms behind": loud_config(
        family="decoder",
        norm_order="output",
        qk_norm="projection",
        windows=(5, 0),
        experts=Experts(5, 5, 24, renormalise=True, shared_dim=30),
    ),
    "learned positions in a Llama": loud_config(family="decoder", positions="learned", max_seq_len=96, tied=True),
}


#: Tokens of a prompt that a longrope model outgrows in its third decode step.
_SHORT = 38


def prefill_of(config: ModelConfig) -> int:
    """Return how long a prompt is to be: beyond the windows, and for longrope just within the original context."""
    scaling = config.rope_scaling
    return _SHORT if scaling is not None and scaling.kind == "longrope" else LOUD_TOKENS


class Loud:
    """A loud model's weights in memory, as the oracle takes them."""

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        self.config = config
        self._tensors = {name: Tensor(narrow(values, dtype), dtype) for name, values in loud_tensors(config).items()}
        if config.tied:
            self._tensors["output.weight"] = self._tensors["tok_embeddings.weight"]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def frequencies(self) -> tuple[Any, Any]:
        return frequencies(self.config)


def loud_store(folder: Path, config: ModelConfig, dtype: str = "f32") -> Path:
    """Write a loud model of any family as a store, without a tokenizer."""
    tensors = {name: _ref(name, values) for name, values in loud_tensors(config).items()}
    checkpoint = Checkpoint(kind="hf", path="loud", config=config, tensors=tensors, rope_layout="interleaved")
    return convert_checkpoint(checkpoint, folder / "store", dtype=dtype)


def _ref(name: str, values: Array) -> TensorRef:
    return TensorRef(name, values.shape, "float32", name, lambda start, stop: values[start:stop], values.nbytes)


def recorded(reference: Any, tokens: Sequence[int], prefill: int | None = None) -> MemoryTrace:
    """Run a reference over tokens and keep every tap."""
    from oracle.run import record

    first = len(tokens) if prefill is None else prefill
    trace = MemoryTrace(tokens=tokens, prefill=first, dtype=reference.dtype, config=reference.config)
    record(reference, tokens, trace, prefill=first)
    return trace


def nmse(found: Array, wanted: Array) -> float:
    """Squared error relative to the wanted tensor's square; infinities must be in the same places."""
    finite = np.isfinite(wanted)
    assert found.shape == wanted.shape
    assert (np.isfinite(found) == finite).all()
    found, wanted = found[finite].astype(np.float64), wanted[finite].astype(np.float64)
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def nmse_by_tap(found: TraceLike, wanted: TraceLike) -> dict[str, float]:
    """Largest `nmse` over steps and layers, by the tap's name without its layer; of the taps that ``found`` has."""
    worst: dict[str, float] = {}
    for entry in found.taps:
        name = entry.name.rpartition(".")[2]
        error = nmse(found.read(entry.name, entry.step), wanted.read(entry.name, entry.step))
        worst[name] = max(worst.get(name, 0.0), error)
    return worst
