"""OLMo 2: a Llama whose norms stand behind attention and feed-forward, and behind the projections to q and k."""

from __future__ import annotations

from typing import Any

from npllama.config.hf import Family
from npllama.config.hf.decoder import DECODER_DEFAULTS, read_decoder
from npllama.config.keys import Keys


def _olmo2(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias")
    return {
        **read_decoder(keys),
        "norm_order": "output",
        "qk_norm": "projection",
        "qkv_bias": bias,
        "attention_out_bias": bias,
    }


FAMILIES = {
    "olmo2": Family(_olmo2, {**DECODER_DEFAULTS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}),
}
