"""Small loud models of every family, and the tokens that they are run on."""

from __future__ import annotations

from npllama.config import Experts, ModelConfig, RopeScaling
from tests.fixtures.loud import LOUD_TOKENS, loud_config

_SMALL = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48, "vocab_size": 64}
_GPT = {
    **_SMALL,
    "dim": 64,
    "n_kv_heads": 4,
    "head_dim": 16,
    "norm": "layer",
    "positions": "learned",
    "gated": False,
    "qkv_bias": True,
    "attention_out_bias": True,
    "ffn_bias": True,
    "max_seq_len": 128,
}


def _longrope(original: int) -> RopeScaling:
    return RopeScaling(
        "longrope",
        original_max_seq_len=original,
        short_factors=(1.0, 1.1, 1.3, 1.6),
        long_factors=(1.4, 2.5, 4.0, 7.0),
        attention_factor=1.2,
    )


#: By what is particular in them. Prompts have `LOUD_TOKENS` tokens: one text outgrows its model's original context with
#: the first decode step.
MODELS: dict[str, ModelConfig] = {
    "qwen2": loud_config(**_SMALL, qkv_bias=True),
    "qwen3": loud_config(**_SMALL, qk_norm="head"),
    "phi3, long": loud_config(**_SMALL, rope_theta=10_000.0, rope_scaling=_longrope(LOUD_TOKENS // 2)),
    "phi3, crossing": loud_config(**_SMALL, rope_theta=10_000.0, rope_scaling=_longrope(LOUD_TOKENS)),
    "mistral": loud_config(**_SMALL, n_layers=3, windows=(7, 0, 12)),
    "mixtral": loud_config(**_SMALL, experts=Experts(count=4, active=2, hidden_dim=40)),
    "qwen2_moe": loud_config(
        **_SMALL,
        n_layers=3,
        qkv_bias=True,
        experts=Experts(4, 2, 40, renormalise=False, shared_dim=24, dense_layers=(1,)),
    ),
    "gpt2": loud_config(**_GPT, activation="gelu_tanh", tied=True),
    "gpt1": loud_config(**_GPT, norm_order="post", final_norm=False, activation="gelu_tanh", score_dim=64),
    "gpt1, biased output, relu": loud_config(
        **_GPT, norm_order="post", final_norm=False, activation="relu", output_bias=True
    ),
    "olmo2": loud_config(**{**_SMALL, "dim": 48}, norm_order="output", qk_norm="projection"),
}
