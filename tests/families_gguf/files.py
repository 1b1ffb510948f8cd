"""From a model of transformers to a GGUF file, as llama.cpp's converter goes, with the gguf package.

Names come from the package's own table, keys from its writer. What the converter does to the numbers, it does for each
architecture in another way (https://github.com/ggml-org/llama.cpp/tree/master/conversion): rows of rotated heads are
put into pairs for "llama" and no other, Conv1D's matrices are transposed, experts are stacked along a third axis.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Floats = NDArray[np.float32]
Tensors = dict[str, Floats]
Settings = dict[str, Any]

#: ``model_type`` -> architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "gpt2": "gpt2",
}

#: Method of the writer -> setting of a ``config.json``.
_KEYS = {
    "add_vocab_size": "vocab_size",
    "add_block_count": "num_hidden_layers|n_layer",
    "add_context_length": "max_position_embeddings|n_positions",
    "add_embedding_length": "hidden_size|n_embd",
    "add_feed_forward_length": "intermediate_size",
    "add_head_count": "num_attention_heads|n_head",
    "add_head_count_kv": "num_key_value_heads",
    "add_key_length": "head_dim",
    "add_value_length": "head_dim",
    "add_layer_norm_rms_eps": "rms_norm_eps",
    "add_layer_norm_eps": "layer_norm_epsilon",
    "add_rope_freq_base": "rope_theta",
    "add_expert_count": "num_local_experts|num_experts",
    "add_expert_used_count": "num_experts_per_tok",
    "add_expert_feed_forward_length": "moe_intermediate_size",
    "add_expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(\w+)\.weight")
#: Name of an expert's matrix in a checkpoint -> in GGUF files.
_PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    encoding: str = "F32",
    split_experts: bool = False,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """Write the GGUF file of a checkpoint that ``save_pretrained`` left in a folder.

    Parameters
    ----------
    folder : Path
        Has ``config.json`` and ``model.safetensors``.
    path : Path
        The file to write.
    encoding : str
        Name of the type of the matrices; vectors stay F32.
    split_experts : bool
        A tensor for each expert, as in the first files of Mixtral.
    more : callable
        Adds keys of its own.

    Returns
    -------
    Path
        ``path``.
    """
    settings = json.loads((folder / "config.json").read_text())
    settings = {**(settings.get("rope_parameters") or {}), **settings}
    architecture = ARCHITECTURES[settings["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    for method, names in _KEYS.items():
        found = [settings[name] for name in names.split("|") if settings.get(name) is not None]
        if found:
            getattr(writer, method)(found[0])
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * settings["n_embd"])
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(_head_dim(settings))
    if settings.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(settings["factor"])
    tensors = _named(load_file(folder / "model.safetensors"), settings, architecture, split_experts)
    if architecture == "phi3":
        writer.add_sliding_window(settings["sliding_window"] or 0)
        tensors |= _longrope(writer, settings)
    more(writer)
    kind = gguf.GGMLQuantizationType[encoding]
    for name, values in tensors.items():
        if values.ndim == 1 or encoding == "F32":
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _head_dim(settings: Settings) -> int:
    width: int = settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"]
    return width


def _named(tensors: Tensors, settings: Settings, architecture: str, split_experts: bool) -> Tensors:
    """Rename a checkpoint's tensors, and change the numbers of those that GGUF files keep in another way."""
    n_layers = settings.get("num_hidden_layers") or settings["n_layer"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], n_layers)
    named: Tensors = {}
    experts: dict[str, list[Floats]] = {}
    for name in sorted(tensors, key=_natural):
        values = tensors[name]
        if match := _EXPERT.fullmatch(name):
            layer, expert, matrix = match[1], match[2], _PROJECTIONS[match[3]]
            if split_experts:
                named[f"blk.{layer}.ffn_{matrix}.{expert}.weight"] = values
            else:
                experts.setdefault(f"blk.{layer}.ffn_{matrix}_exps.weight", []).append(values)
            continue
        if architecture == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = settings["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            values = in_pairs(values, heads)
        if architecture == "gpt2" and name.endswith(_CONV1D):
            values = values.T
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        named[theirs] = np.atleast_1d(values.squeeze())
    return named | {name: np.stack(matrices) for name, matrices in experts.items()}


def _natural(name: str) -> list[str | int]:
    """Sort experts by their number."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def in_pairs(rows: Floats, n_heads: int) -> Floats:
    """Bring half-split rows of heads into pairs."""
    return rows.reshape(n_heads, 2, rows.shape[0] // n_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _longrope(writer: gguf.GGUFWriter, settings: Settings) -> Tensors:
    """Write how Phi-3 stretches its frequencies."""
    original = settings["original_max_position_embeddings"]
    writer.add_rope_scaling_orig_ctx_len(original)
    if settings.get("rope_type") != "longrope":
        return {}
    scale = settings["max_position_embeddings"] / original
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    return {
        f"rope_factors_{which}.weight": np.array(settings[f"{which}_factor"], np.float32) for which in ("long", "short")
    }
