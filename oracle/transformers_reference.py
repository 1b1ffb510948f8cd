"""A third opinion: the Llama of Hugging Face's transformers, with a store's weights, watched by hooks.

It exposes every tap but ``scores`` (its eager attention keeps them to itself; the float64 variant shows them).
Its heads are half-split: queries and keys are turned into interleaved pairs on the way out, so that they compare with
everybody else's. transformers lowers norms and softmax to float32 whatever the dtype; in float64, where it serves as a
truth, both are computed in float64 here instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from npllama.checkpoint.names import expected
from npllama.config import ModelConfig
from oracle.hooks import attach, hook
from oracle.llama import Tap, untapped
from oracle.weights import Source, to_torch, torch_dtype

_ATTENTION = "npllama_tapped_eager"

_TAPS = """
input_layernorm           out  attention_norm
self_attn.q_proj          out  q
self_attn.k_proj          out  k
self_attn.v_proj          out  v
self_attn.o_proj          in   context
self_attn.o_proj          out  attention_out
post_attention_layernorm  in   resid_mid
post_attention_layernorm  out  ffn_norm
mlp.gate_proj             out  gate
mlp.up_proj               out  up
mlp.down_proj             in   ffn_act
mlp.down_proj             out  ffn_out
.                         out  resid_post
"""
_ROTATED = frozenset({"q", "k", "q_rope", "k_rope"})


class TransformersLlama:
    """transformers' ``LlamaForCausalLM`` as a reference; the whole model is in memory.

    Parameters
    ----------
    source : Source
        A `Store`, or anything that has its ``config``, ``tensor`` and ``rope_freqs``. The RoPE frequencies are the
        stored ones.
    dtype : {"float32", "bfloat16", "float64"}
        Of weights and activations.
    """

    producer = "transformers"

    def __init__(self, source: Source, dtype: str = "float32") -> None:
        self.config = source.config
        self.dtype = dtype
        self._tap: Tap = untapped
        self._model = _build(source, torch_dtype(dtype))
        self._cache = DynamicCache(config=self._model.config)
        inner, head_dim = self._model.model, self.config.head_dim
        hook(inner.embed_tokens, "out", "tok_embeddings", self._see, head_dim)
        attach(inner.layers, _TAPS, self._see, head_dim)
        hook(inner.norm, "out", "norm", self._see, head_dim)
        hook(self._model.lm_head, "out", "logits", self._see, head_dim)
        for layer in inner.layers:
            layer.self_attn.npllama_see = self._see

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], tap: Tap = untapped) -> torch.Tensor:
        """Run new tokens; return logits (T, V). What the tap returns is not used."""
        self._tap = tap
        logits: torch.Tensor = self._model(torch.tensor([list(tokens)]), past_key_values=self._cache).logits
        return logits[0]

    def _see(self, name: str, x: torch.Tensor) -> None:
        rotated = name.rpartition(".")[2] in _ROTATED
        self._tap(name, x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if rotated else x)


def _build(source: Source, dtype: torch.dtype) -> Any:
    """Return the model with the source's weights, in evaluation mode."""
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    with torch.device("meta"):  # no memory, and no time, for random weights
        model = LlamaForCausalLM(_settings(source.config))
    table = expected(replace(source.config, tied=False)).values()
    state = {}
    for entry in table:
        weight = to_torch(source.tensor(entry.name), dtype)
        if entry.heads:
            weight = weight.unflatten(0, (entry.heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        state[entry.hf] = weight
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb.inv_freq = torch.tensor(source.rope_freqs())
    if dtype == torch.float64:
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.forward = _norm(module)
    return model.eval()


def _settings(config: ModelConfig) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=False,  # a tied weight is loaded under both names
        attn_implementation=_ATTENTION,
        pad_token_id=None,
    )


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run transformers' eager attention and show what goes in and out of it. Arrays are (1, H, T, Dh)."""

    def see(tap: str, x: torch.Tensor) -> None:
        module.npllama_see(f"layers.{module.layer_idx}.{tap}", x)

    n_new = query.shape[2]
    see("q_rope", query[0].transpose(0, 1))
    see("k_rope", key[0, :, -n_new:].transpose(0, 1))
    if query.dtype == torch.float64:
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, dim=1).mT * scaling
        if attention_mask is not None:
            # What is added for a masked key is the lowest finite number; a score is -inf there.
            scores = scores.masked_fill(attention_mask < -1, -torch.inf)
        see("scores", scores[0])
        probs = scores.softmax(-1)
        context = (probs @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous()
    else:
        context, probs = eager_attention_forward(module, query, key, value, attention_mask, scaling, **settings)
    see("probs", probs[0])
    return context, probs


def _norm(module: LlamaRMSNorm) -> Any:
    """Return a forward function of a norm that stays in the dtype of its input."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    return forward
