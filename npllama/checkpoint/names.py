"""One table: every tensor of a model, in each format's spelling, with its shape and how checkpoints cut it up.

A family whose checkpoints spell a tensor in another way has a column of its own in `npllama.checkpoint.spellings`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Literal

from npllama.checkpoint.tensor import TensorRef
from npllama.config import ModelConfig
from npllama.errors import ConfigMismatchError

Format = Literal["hf", "gguf"]


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that a model must have.

    Attributes
    ----------
    name, hf, gguf : str
        Canonical name (Meta's), Hugging Face's and GGUF's.
    shape : tuple of int
        Shape in the whole model.
    shard_axis : int or None
        Axis along which Meta's model-parallel shards are cut; None where every shard has the whole.
    heads : int
        Number of heads of Dh rows that RoPE turns; 0 for a tensor that it does not touch.
    stacked : int
        Number of experts whose matrices stand under one another in it; 0 for an ordinary tensor.
    """

    name: str
    hf: str
    gguf: str
    shape: tuple[int, ...]
    shard_axis: int | None
    heads: int
    stacked: int = 0


# ``{i}`` is the layer, ``{e}`` an expert, ``H*Dh`` a product of axes (P: positions in a table of learned ones). Shard
# axes: fairscale's column-parallel layers are cut along their output (0), row-parallel ones along their input (1); the
# embedding's is that of Llama 3 (Llama 1 and 2 cut axis 1). A tensor is there when a model has all the features of the
# last column, in the words of `ModelConfig.features`; "-" is for all models.
_TABLE = """
canonical name                             Hugging Face                                         GGUF                             shape    shard rotated when
tok_embeddings.weight                      model.embed_tokens.weight                            token_embd.weight                V,D      0     -       -
pos_embeddings.weight                      model.embed_positions.weight                         position_embd.weight             P,D      -     -       learned
layers.{i}.attention_norm.weight           model.layers.{i}.input_layernorm.weight              blk.{i}.attn_norm.weight         D        -     -       -
layers.{i}.attention_norm.bias             model.layers.{i}.input_layernorm.bias                blk.{i}.attn_norm.bias           D        -     -       norm-layer
layers.{i}.attention.wq.weight             model.layers.{i}.self_attn.q_proj.weight             blk.{i}.attn_q.weight            H*Dh,D   0     H       -
layers.{i}.attention.wk.weight             model.layers.{i}.self_attn.k_proj.weight             blk.{i}.attn_k.weight            K*Dh,D   0     K       -
layers.{i}.attention.wv.weight             model.layers.{i}.self_attn.v_proj.weight             blk.{i}.attn_v.weight            K*Dh,D   0     -       -
layers.{i}.attention.wq.bias               model.layers.{i}.self_attn.q_proj.bias               blk.{i}.attn_q.bias              H*Dh     0     H       qkv-bias
layers.{i}.attention.wk.bias               model.layers.{i}.self_attn.k_proj.bias               blk.{i}.attn_k.bias              K*Dh     0     K       qkv-bias
layers.{i}.attention.wv.bias               model.layers.{i}.self_attn.v_proj.bias               blk.{i}.attn_v.bias              K*Dh     0     -       qkv-bias
layers.{i}.attention.q_norm.weight         model.layers.{i}.self_attn.q_norm.weight             blk.{i}.attn_q_norm.weight       Dh       -     1       qk-norm-head
layers.{i}.attention.k_norm.weight         model.layers.{i}.self_attn.k_norm.weight             blk.{i}.attn_k_norm.weight       Dh       -     1       qk-norm-head
layers.{i}.attention.q_norm.weight         model.layers.{i}.self_attn.q_norm.weight             blk.{i}.attn_q_norm.weight       H*Dh     0     H       qk-norm-projection
layers.{i}.attention.k_norm.weight         model.layers.{i}.self_attn.k_norm.weight             blk.{i}.attn_k_norm.weight       K*Dh     0     K       qk-norm-projection
layers.{i}.attention.wo.weight             model.layers.{i}.self_attn.o_proj.weight             blk.{i}.attn_output.weight       D,H*Dh   1     -       -
layers.{i}.attention.wo.bias               model.layers.{i}.self_attn.o_proj.bias               blk.{i}.attn_output.bias         D        -     -       out-bias
layers.{i}.ffn_norm.weight                 model.layers.{i}.post_attention_layernorm.weight     blk.{i}.ffn_norm.weight          D        -     -       -
layers.{i}.ffn_norm.bias                   model.layers.{i}.post_attention_layernorm.bias       blk.{i}.ffn_norm.bias            D        -     -       norm-layer
layers.{i}.feed_forward.w1.weight          model.layers.{i}.mlp.gate_proj.weight                blk.{i}.ffn_gate.weight          F,D      0     -       dense+gated
layers.{i}.feed_forward.w1.bias            model.layers.{i}.mlp.gate_proj.bias                  blk.{i}.ffn_gate.bias            F        0     -       dense+gated+ffn-bias
layers.{i}.feed_forward.w3.weight          model.layers.{i}.mlp.up_proj.weight                  blk.{i}.ffn_up.weight            F,D      0     -       dense
layers.{i}.feed_forward.w3.bias            model.layers.{i}.mlp.up_proj.bias                    blk.{i}.ffn_up.bias              F        0     -       dense+ffn-bias
layers.{i}.feed_forward.w2.weight          model.layers.{i}.mlp.down_proj.weight                blk.{i}.ffn_down.weight          D,F      1     -       dense
layers.{i}.feed_forward.w2.bias            model.layers.{i}.mlp.down_proj.bias                  blk.{i}.ffn_down.bias            D        -     -       dense+ffn-bias
layers.{i}.feed_forward.router.weight      model.layers.{i}.mlp.gate.weight                     blk.{i}.ffn_gate_inp.weight      E,D      -     -       experts
layers.{i}.feed_forward.w1.weight          model.layers.{i}.mlp.experts.{e}.gate_proj.weight    blk.{i}.ffn_gate_exps.weight     E*Fe,D   -     -       experts
layers.{i}.feed_forward.w3.weight          model.layers.{i}.mlp.experts.{e}.up_proj.weight      blk.{i}.ffn_up_exps.weight       E*Fe,D   -     -       experts
layers.{i}.feed_forward.w2.weight          model.layers.{i}.mlp.experts.{e}.down_proj.weight    blk.{i}.ffn_down_exps.weight     E*D,Fe   -     -       experts
layers.{i}.feed_forward.shared.router.weight model.layers.{i}.mlp.shared_expert_gate.weight     blk.{i}.ffn_gate_inp_shexp.weight 1,D     -     -       shared
layers.{i}.feed_forward.shared.w1.weight   model.layers.{i}.mlp.shared_expert.gate_proj.weight  blk.{i}.ffn_gate_shexp.weight    Fs,D     -     -       shared
layers.{i}.feed_forward.shared.w3.weight   model.layers.{i}.mlp.shared_expert.up_proj.weight    blk.{i}.ffn_up_shexp.weight      Fs,D     -     -       shared
layers.{i}.feed_forward.shared.w2.weight   model.layers.{i}.mlp.shared_expert.down_proj.weight  blk.{i}.ffn_down_shexp.weight    D,Fs     -     -       shared
norm.weight                                model.norm.weight                                    output_norm.weight               D        -     -       final-norm
norm.bias                                  model.norm.bias                                      output_norm.bias                 D        -     -       final-norm+norm-layer
output.weight                              lm_head.weight                                       output.weight                    V,D      0     -       -
output.bias                                lm_head.bias                                         output.bias                      V        0     -       output-bias
"""  # noqa: E501 - a table is read by its columns

#: Tables and buffers that checkpoints carry and that npllama computes itself, in every spelling.
_IGNORED = re.compile(
    r"rope\.freqs|rope_freqs\.weight|rope_factors_(short|long)\.weight"
    r"|(model\.)?layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"  # GPT's causal mask, and what it puts in the place of scores
)

OUTPUT = "output.weight"
EMBEDDING = "tok_embeddings.weight"


def _rows(config: ModelConfig) -> Iterator[tuple[int, list[str]]]:
    """Yield (layer, cells) of a model's tensors, in the order of the forward pass."""
    rows = [line.split() for line in _TABLE.strip().splitlines()[1:]]
    for per_layer, group in groupby(rows, key=lambda cells: "{i}" in cells[0]):
        cells_of_group = list(group)
        for i in range(config.n_layers if per_layer else 1):
            features = config.features(i) | {"-"}
            yield from ((i, cells) for cells in cells_of_group if features.issuperset(cells[-1].split("+")))


def expected(config: ModelConfig) -> dict[str, Expected]:
    """List every tensor of a model, in the order of the forward pass.

    Returns
    -------
    dict of str to Expected
        By canonical name. A tied model has no ``output.weight``.
    """
    lengths = {**config.axes, "P": config.max_seq_len, "1": 1}
    table = {}
    for i, (name, hf, gguf, axes, shard, rotated, _) in _rows(config):
        shape = tuple(prod(lengths[letter] for letter in axis.split("*")) for axis in axes.split(","))
        entry = Expected(
            name=name.format(i=i),
            hf=hf.format(i=i, e="{e}"),
            gguf=gguf.format(i=i),
            shape=shape,
            shard_axis=None if shard == "-" else int(shard),
            heads=lengths.get(rotated, 0) if config.positions == "rope" else 0,
            stacked=lengths["E"] if axes.startswith("E*") else 0,
        )
        table[entry.name] = entry
    if config.tied:
        del table[OUTPUT]
    return table


def is_ignored(name: str) -> bool:
    """Tell whether a checkpoint's tensor holds nothing that the model needs."""
    return _IGNORED.fullmatch(name) is not None


def select(found: Mapping[str, TensorRef], config: ModelConfig, file: str) -> dict[str, TensorRef]:
    """Match tensors under canonical names with those that a configuration asks for, strictly both ways.

    Parameters
    ----------
    found : mapping of str to TensorRef
        By canonical name.
    config : ModelConfig
        What the checkpoint says it is.
    file : str
        Place for messages.

    Returns
    -------
    dict of str to TensorRef
        Canonical name -> tensor, in the order of the forward pass.

    Raises
    ------
    ConfigMismatchError
        Tensors are missing, unknown, or of another shape.
    """
    wanted = {name: entry.shape for name, entry in expected(config).items()}
    if config.tied:
        found = {name: ref for name, ref in found.items() if name != OUTPUT}
    check_names(found, wanted, file)
    return {name: found[name] for name in wanted}


def check_names(found: Mapping[str, TensorRef], wanted: Mapping[str, tuple[int, ...]], file: str) -> None:
    """Raise ConfigMismatchError unless a file has the wanted tensors, with the wanted shapes, and no others."""
    missing = [name for name in wanted if name not in found]
    if missing:
        raise mismatch("tensors are missing", missing, file)
    unknown = [name for name in found if name not in wanted and not is_ignored(name)]
    if unknown:
        raise mismatch("tensors are unknown", unknown, file)
    wrong = [
        f"{name} is {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if found[name].shape != shape
    ]
    if wrong:
        raise mismatch("tensors have shapes that the configuration contradicts", wrong, file)


def mismatch(what: str, names: Iterable[str], file: str) -> ConfigMismatchError:
    """Make the error that lists the first few of the tensors at fault."""
    names = list(names)
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ConfigMismatchError(
        f"{len(names)} {what}: {listed}", file=file, remedy="The configuration and the weights belong to other models."
    )
