"""How each family's checkpoints spell and pack their tensors, where that differs from `npllama.checkpoint.names`.

A line is a canonical name and where its numbers are. In the second column

- tensors with one spelling are its consecutive blocks of rows, in the order of the lines (fused projections);
- ``^T`` says that the file has the transposed matrix;
- ``{e}`` stands for each expert in turn: their matrices come to stand under one another;
- ``a|b`` are two spellings, of which a file has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the checkpoints of one family, in one format, differ from the table of names.

    Attributes
    ----------
    names : mapping of str to str
        Canonical name, with ``{i}`` for the layer -> spelling; what is not here is spelled as in the table.
    experts : mapping of str to str
        The same for the matrices of experts, in families that also have models without them.
    half_split : bool
        The rotated rows of a head are ordered by halves.
    prefix : str
        What some files put before every name, and others do not.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    half_split: bool = False
    prefix: str = ""


def _names(table: str) -> dict[str, str]:
    return dict(line.split() for line in table.strip().splitlines())


_HF_PHI3 = _names("""
layers.{i}.attention.wq.weight     model.layers.{i}.self_attn.qkv_proj.weight
layers.{i}.attention.wk.weight     model.layers.{i}.self_attn.qkv_proj.weight
layers.{i}.attention.wv.weight     model.layers.{i}.self_attn.qkv_proj.weight
layers.{i}.feed_forward.w1.weight  model.layers.{i}.mlp.gate_up_proj.weight
layers.{i}.feed_forward.w3.weight  model.layers.{i}.mlp.gate_up_proj.weight
""")

_HF_MIXTRAL = _names("""
layers.{i}.feed_forward.router.weight  model.layers.{i}.block_sparse_moe.gate.weight
layers.{i}.feed_forward.w1.weight      model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight
layers.{i}.feed_forward.w3.weight      model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight
layers.{i}.feed_forward.w2.weight      model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight
""")

_HF_OLMO2 = _names("""
layers.{i}.attention_norm.weight  model.layers.{i}.post_attention_layernorm.weight
layers.{i}.ffn_norm.weight        model.layers.{i}.post_feedforward_layernorm.weight
""")

_GPT_BLOCK = """
layers.{i}.attention_norm.weight   transformer.h.{i}.ln_1.weight
layers.{i}.attention_norm.bias     transformer.h.{i}.ln_1.bias
layers.{i}.attention.wq.weight     transformer.h.{i}.attn.c_attn.weight^T
layers.{i}.attention.wk.weight     transformer.h.{i}.attn.c_attn.weight^T
layers.{i}.attention.wv.weight     transformer.h.{i}.attn.c_attn.weight^T
layers.{i}.attention.wq.bias       transformer.h.{i}.attn.c_attn.bias
layers.{i}.attention.wk.bias       transformer.h.{i}.attn.c_attn.bias
layers.{i}.attention.wv.bias       transformer.h.{i}.attn.c_attn.bias
layers.{i}.attention.wo.weight     transformer.h.{i}.attn.c_proj.weight^T
layers.{i}.attention.wo.bias       transformer.h.{i}.attn.c_proj.bias
layers.{i}.ffn_norm.weight         transformer.h.{i}.ln_2.weight
layers.{i}.ffn_norm.bias           transformer.h.{i}.ln_2.bias
layers.{i}.feed_forward.w3.weight  transformer.h.{i}.mlp.c_fc.weight^T
layers.{i}.feed_forward.w3.bias    transformer.h.{i}.mlp.c_fc.bias
layers.{i}.feed_forward.w2.weight  transformer.h.{i}.mlp.c_proj.weight^T
layers.{i}.feed_forward.w2.bias    transformer.h.{i}.mlp.c_proj.bias
"""

_HF_GPT2 = _names(f"""
tok_embeddings.weight  transformer.wte.weight
pos_embeddings.weight  transformer.wpe.weight
{_GPT_BLOCK.strip()}
norm.weight            transformer.ln_f.weight
norm.bias              transformer.ln_f.bias
""")

_HF_GPT1 = _names(f"""
tok_embeddings.weight  transformer.tokens_embed.weight
pos_embeddings.weight  transformer.positions_embed.weight
{_GPT_BLOCK.strip()}
""")

#: `model_type` -> spelling, for Hugging Face's checkpoints. Their rotated rows are in halves, whatever the family.
HF = {
    "llama": Spelling(half_split=True),
    "mistral": Spelling(half_split=True),
    "qwen2": Spelling(half_split=True),
    "qwen3": Spelling(half_split=True),
    "qwen2_moe": Spelling(half_split=True),
    "qwen3_moe": Spelling(half_split=True),
    "phi3": Spelling(_HF_PHI3, half_split=True),
    "mixtral": Spelling(_HF_MIXTRAL, half_split=True),
    "olmo2": Spelling(_HF_OLMO2, half_split=True),
    "gpt2": Spelling(_HF_GPT2, prefix="transformer."),
    "openai-gpt": Spelling(_HF_GPT1, prefix="transformer."),
}

#: The decoder of a tutorial on GPT-1, as its class names its parameters; see `npllama.checkpoint.pth.state_dict`.
GPT1_DECODER = Spelling(
    _names("""
tok_embeddings.weight              word_embedding.weight
pos_embeddings.weight              position_embedding.weight
layers.{i}.attention_norm.weight   layers.{i}.norm1.weight
layers.{i}.attention_norm.bias     layers.{i}.norm1.bias
layers.{i}.attention.wq.weight     layers.{i}.attention.queries.weight
layers.{i}.attention.wk.weight     layers.{i}.attention.keys.weight
layers.{i}.attention.wv.weight     layers.{i}.attention.values.weight
layers.{i}.attention.wo.weight     layers.{i}.attention.fc_out.weight
layers.{i}.attention.wo.bias       layers.{i}.attention.fc_out.bias
layers.{i}.ffn_norm.weight         layers.{i}.norm2.weight
layers.{i}.ffn_norm.bias           layers.{i}.norm2.bias
layers.{i}.feed_forward.w3.weight  layers.{i}.feed_forward.0.weight
layers.{i}.feed_forward.w3.bias    layers.{i}.feed_forward.0.bias
layers.{i}.feed_forward.w2.weight  layers.{i}.feed_forward.2.weight
layers.{i}.feed_forward.w2.bias    layers.{i}.feed_forward.2.bias
output.weight                      fc_out.weight
output.bias                        fc_out.bias
""")
)

_OLD_EXPERTS = _names("""
layers.{i}.feed_forward.w1.weight  blk.{i}.ffn_gate_exps.weight|blk.{i}.ffn_gate.{e}.weight
layers.{i}.feed_forward.w3.weight  blk.{i}.ffn_up_exps.weight|blk.{i}.ffn_up.{e}.weight
layers.{i}.feed_forward.w2.weight  blk.{i}.ffn_down_exps.weight|blk.{i}.ffn_down.{e}.weight
""")

_GGUF_PHI3 = _names("""
layers.{i}.attention.wq.weight     blk.{i}.attn_qkv.weight
layers.{i}.attention.wk.weight     blk.{i}.attn_qkv.weight
layers.{i}.attention.wv.weight     blk.{i}.attn_qkv.weight
layers.{i}.feed_forward.w1.weight  blk.{i}.ffn_up.weight
layers.{i}.feed_forward.w3.weight  blk.{i}.ffn_up.weight
""")

_GGUF_GPT2 = _names("""
layers.{i}.attention.wq.weight  blk.{i}.attn_qkv.weight
layers.{i}.attention.wk.weight  blk.{i}.attn_qkv.weight
layers.{i}.attention.wv.weight  blk.{i}.attn_qkv.weight
layers.{i}.attention.wq.bias    blk.{i}.attn_qkv.bias
layers.{i}.attention.wk.bias    blk.{i}.attn_qkv.bias
layers.{i}.attention.wv.bias    blk.{i}.attn_qkv.bias
""")

_GGUF_OLMO2 = _names("""
layers.{i}.attention_norm.weight  blk.{i}.post_attention_norm.weight
layers.{i}.ffn_norm.weight        blk.{i}.post_ffw_norm.weight
""")

#: `general.architecture` -> spelling, for GGUF files. llama.cpp's converter puts the rows of "llama" into pairs.
GGUF = {
    "llama": Spelling(experts=_OLD_EXPERTS),
    "qwen2": Spelling(half_split=True),
    "qwen3": Spelling(half_split=True),
    "qwen2moe": Spelling(half_split=True),
    "qwen3moe": Spelling(half_split=True),
    "phi3": Spelling(_GGUF_PHI3, half_split=True),
    "olmo2": Spelling(_GGUF_OLMO2, half_split=True),
    "gpt2": Spelling(_GGUF_GPT2),
}
