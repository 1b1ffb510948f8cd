"""What a forward pass multiplies by: the weights of a model, by their canonical names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.config import ModelConfig
from npllama.dtypes import Tensor

#: Field of `LayerWeights` -> canonical name, behind ``layers.i.``
_PLACES = {
    "attention_norm": "attention_norm.weight",
    "attention_norm_bias": "attention_norm.bias",
    **{name: f"attention.{name}.weight" for name in ("wq", "wk", "wv", "wo", "q_norm", "k_norm")},
    **{f"{name}_bias": f"attention.{name}.bias" for name in ("wq", "wk", "wv", "wo")},
    "ffn_norm": "ffn_norm.weight",
    "ffn_norm_bias": "ffn_norm.bias",
    **{name: f"feed_forward.{name}.weight" for name in ("w1", "w3", "w2", "router")},
    **{f"{name}_bias": f"feed_forward.{name}.bias" for name in ("w1", "w3", "w2")},
    **{f"shared_{name}": f"feed_forward.shared.{name}.weight" for name in ("w1", "w3", "w2", "router")},
}


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """Weights of one decoder layer, by their canonical names; None for what the family does not have."""

    attention_norm: Tensor  # (D,)
    wq: Tensor  # (H*Dh, D)
    wk: Tensor  # (K*Dh, D)
    wv: Tensor  # (K*Dh, D)
    wo: Tensor  # (D, H*Dh)
    ffn_norm: Tensor  # (D,)
    w3: Tensor  # (F, D)  up; in a mixture of experts (E*Fe, D), the experts' matrices under one another
    w2: Tensor  # (D, F)  down; (E*D, Fe)
    w1: Tensor | None = None  # (F, D)  gate; (E*Fe, D)
    attention_norm_bias: Tensor | None = None  # (D,)
    wq_bias: Tensor | None = None  # (H*Dh,)
    wk_bias: Tensor | None = None  # (K*Dh,)
    wv_bias: Tensor | None = None  # (K*Dh,)
    q_norm: Tensor | None = None  # (Dh,) or (H*Dh,)
    k_norm: Tensor | None = None  # (Dh,) or (K*Dh,)
    wo_bias: Tensor | None = None  # (D,)
    ffn_norm_bias: Tensor | None = None  # (D,)
    w1_bias: Tensor | None = None  # (F,)
    w3_bias: Tensor | None = None  # (F,)
    w2_bias: Tensor | None = None  # (D,)
    router: Tensor | None = None  # (E, D)
    shared_w1: Tensor | None = None  # (Fs, D)
    shared_w3: Tensor | None = None  # (Fs, D)
    shared_w2: Tensor | None = None  # (D, Fs)
    shared_router: Tensor | None = None  # (1, D)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Weights of a model; None for what the family does not have."""

    tok_embeddings: Tensor  # (V, D)
    layers: tuple[LayerWeights, ...]
    output: Tensor  # (V, D); the embedding itself in a tied model
    norm: Tensor | None = None  # (D,)
    norm_bias: Tensor | None = None  # (D,)
    output_bias: Tensor | None = None  # (V,)
    pos_embeddings: Tensor | None = None  # (positions, D)
    rope_freqs: NDArray[np.float32] | None = None  # (Dh/2,)
    rope_freqs_long: NDArray[np.float32] | None = None  # (Dh/2,); longrope's, beyond the original context


def gather_weights(
    config: ModelConfig,
    find: Callable[[str], Tensor | None],
    rope_freqs: NDArray[np.float32] | None,
    rope_freqs_long: NDArray[np.float32] | None = None,
) -> Weights:
    """Put a model's weights together from a function that finds a tensor by its canonical name, or None."""

    def layer(i: int) -> LayerWeights:
        found: dict[str, Any] = {field: find(f"layers.{i}.{place}") for field, place in _PLACES.items()}
        return LayerWeights(**found)

    ends: dict[str, Any] = {
        "tok_embeddings": find("tok_embeddings.weight"),
        "pos_embeddings": find("pos_embeddings.weight"),
        "norm": find("norm.weight"),
        "norm_bias": find("norm.bias"),
        "output": find("output.weight"),
        "output_bias": find("output.bias"),
    }
    layers = tuple(layer(i) for i in range(config.n_layers))
    return Weights(**ends, layers=layers, rope_freqs=rope_freqs, rope_freqs_long=rope_freqs_long)
