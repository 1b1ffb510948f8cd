"""What the name of a GGUF architecture says about a model, beyond what the file's keys say.

The names are llama.cpp's, and so is what they imply: each has a class in its converter, which decides the keys that a
file has, and one in its engine, which decides what is computed
(https://github.com/ggml-org/llama.cpp/tree/master/conversion and ``src/models`` beside it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Mixture:
    """What an architecture implies about its experts.

    Attributes
    ----------
    renormalise : bool
        The weights of the experts that are asked are scaled to a sum of one, if the file does not say.
    own_width : bool
        ``expert_feed_forward_length`` is the width of an expert; otherwise it is that of the feed-forward layer.
    shared : bool
        There is an expert that is always asked, of width ``expert_shared_feed_forward_length``.
    """

    renormalise: bool
    own_width: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """What all models of an architecture have in common.

    Attributes
    ----------
    family : str
        The name that its makers gave it.
    fields : mapping of str to object
        Fields of `ModelConfig`, where they are not a Llama's.
    mixture : Mixture or None
        How experts are asked in those of its models that have any; None where there are none.
    epsilon : str
        Key of the norms' epsilon.
    """

    family: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    mixture: Mixture | None = None
    epsilon: str = "attention.layer_norm_rms_epsilon"


_GPT2 = {
    "norm": "layer",
    "positions": "learned",
    "activation": "gelu_tanh",
    "gated": False,
    "qkv_bias": True,
    "attention_out_bias": True,
    "ffn_bias": True,
}

#: `general.architecture` -> what it means. Mistral's and Mixtral's files call themselves "llama".
ARCHITECTURES = {
    "llama": Architecture("llama", mixture=Mixture(renormalise=True)),
    "qwen2": Architecture("qwen2", {"qkv_bias": True}),
    "qwen3": Architecture("qwen3", {"qk_norm": "head"}),
    "qwen2moe": Architecture("qwen2_moe", {"qkv_bias": True}, Mixture(renormalise=False, own_width=True, shared=True)),
    "qwen3moe": Architecture("qwen3_moe", {"qk_norm": "head"}, Mixture(renormalise=True, own_width=True)),
    "phi3": Architecture("phi3"),
    "olmo2": Architecture("olmo2", {"norm_order": "output", "qk_norm": "projection"}),
    "gpt2": Architecture("gpt2", _GPT2, epsilon="attention.layer_norm_epsilon"),
}
