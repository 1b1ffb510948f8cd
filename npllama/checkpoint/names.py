"""One table: every tensor of a model, in each format's spelling, with its shape and how checkpoints cut it up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Literal

from npllama.checkpoint.tensor import TensorRef
from npllama.config import ModelConfig
from npllama.errors import ConfigMismatchError

Spelling = Literal["name", "hf", "gguf"]


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
    """

    name: str
    hf: str
    gguf: str
    shape: tuple[int, ...]
    shard_axis: int | None
    heads: int


# ``{i}`` is the layer, ``H*Dh`` a product of axes. Shard axes: fairscale's column-parallel layers are cut along their
# output (0), row-parallel ones along their input (1); the embedding's is that of Llama 3 (Llama 1 and 2 cut axis 1).
_TABLE = """
canonical name                         Hugging Face                                      GGUF                      shape    shard rotated
tok_embeddings.weight                  model.embed_tokens.weight                         token_embd.weight         V,D      0     -
layers.{i}.attention_norm.weight       model.layers.{i}.input_layernorm.weight           blk.{i}.attn_norm.weight  D        -     -
layers.{i}.attention.wq.weight         model.layers.{i}.self_attn.q_proj.weight          blk.{i}.attn_q.weight     H*Dh,D   0     H
layers.{i}.attention.wk.weight         model.layers.{i}.self_attn.k_proj.weight          blk.{i}.attn_k.weight     K*Dh,D   0     K
layers.{i}.attention.wv.weight         model.layers.{i}.self_attn.v_proj.weight          blk.{i}.attn_v.weight     K*Dh,D   0     -
layers.{i}.attention.wo.weight         model.layers.{i}.self_attn.o_proj.weight          blk.{i}.attn_output.weight D,H*Dh  1     -
layers.{i}.ffn_norm.weight             model.layers.{i}.post_attention_layernorm.weight  blk.{i}.ffn_norm.weight   D        -     -
layers.{i}.feed_forward.w1.weight      model.layers.{i}.mlp.gate_proj.weight             blk.{i}.ffn_gate.weight   F,D      0     -
layers.{i}.feed_forward.w3.weight      model.layers.{i}.mlp.up_proj.weight               blk.{i}.ffn_up.weight     F,D      0     -
layers.{i}.feed_forward.w2.weight      model.layers.{i}.mlp.down_proj.weight             blk.{i}.ffn_down.weight   D,F      1     -
norm.weight                            model.norm.weight                                 output_norm.weight        D        -     -
output.weight                          lm_head.weight                                    output.weight             V,D      0     -
"""  # noqa: E501 - a table is read by its columns

#: Tables and buffers that checkpoints carry and that npllama computes itself, in every spelling.
_IGNORED = re.compile(
    r"rope\.freqs|rope_freqs\.weight|(model\.)?layers\.\d+\.(self_attn|attention)\.rotary_emb\.inv_freq"
)

OUTPUT = "output.weight"
EMBEDDING = "tok_embeddings.weight"


def _rows(n_layers: int) -> Iterator[tuple[int, list[str]]]:
    """Yield (layer, cells) in the order of the forward pass; the layers' rows once for each layer."""
    rows = [line.split() for line in _TABLE.strip().splitlines()[1:]]
    for per_layer, group in groupby(rows, key=lambda cells: "{i}" in cells[0]):
        cells_of_group = list(group)
        for i in range(n_layers if per_layer else 1):
            for cells in cells_of_group:
                yield i, cells


def expected(config: ModelConfig) -> dict[str, Expected]:
    """List every tensor of a model, in the order of the forward pass.

    Returns
    -------
    dict of str to Expected
        By canonical name. A tied model has no ``output.weight``.
    """
    lengths = config.axes
    table = {}
    for i, (name, hf, gguf, axes, shard, rotated) in _rows(config.n_layers):
        shape = tuple(prod(lengths[letter] for letter in axis.split("*")) for axis in axes.split(","))
        entry = Expected(
            name=name.format(i=i),
            hf=hf.format(i=i),
            gguf=gguf.format(i=i),
            shape=shape,
            shard_axis=None if shard == "-" else int(shard),
            heads=lengths.get(rotated, 0),
        )
        table[entry.name] = entry
    if config.tied:
        del table[OUTPUT]
    return table


def is_ignored(name: str) -> bool:
    """Tell whether a checkpoint's tensor holds nothing that the model needs."""
    return _IGNORED.fullmatch(name) is not None


def select(found: Mapping[str, TensorRef], config: ModelConfig, spelling: Spelling, file: str) -> dict[str, TensorRef]:
    """Match a checkpoint's tensors with those that its configuration asks for, strictly both ways.

    Parameters
    ----------
    found : mapping of str to TensorRef
        As the checkpoint spells them.
    config : ModelConfig
        What the checkpoint says it is.
    spelling : {"name", "hf", "gguf"}
        Column of the table.
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
    wanted = {getattr(entry, spelling): entry for entry in expected(config).values()}
    if config.tied:
        output = getattr(expected(replace(config, tied=False))[OUTPUT], spelling)
        found = {name: ref for name, ref in found.items() if name != output}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise _mismatch("tensors are missing", missing, file)
    unknown = [name for name in found if name not in wanted and not is_ignored(name)]
    if unknown:
        raise _mismatch("tensors are unknown", unknown, file)
    wrong = [
        f"{name} is {found[name].shape}, expected {entry.shape}"
        for name, entry in wanted.items()
        if found[name].shape != entry.shape
    ]
    if wrong:
        raise _mismatch("tensors have shapes that the configuration contradicts", wrong, file)
    return {entry.name: found[name] for name, entry in wanted.items()}


def _mismatch(what: str, names: Iterable[str], file: str) -> ConfigMismatchError:
    names = list(names)
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return ConfigMismatchError(
        f"{len(names)} {what}: {listed}", file=file, remedy="The configuration and the weights belong to other models."
    )
