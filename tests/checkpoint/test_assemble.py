"""A checkpoint's own tensors become the canonical ones: every number in its place, and nothing left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.assemble import assemble
from npllama.checkpoint.names import OUTPUT, Format, expected
from npllama.checkpoint.spellings import GGUF, HF, Spelling
from npllama.checkpoint.tensor import TensorRef
from npllama.config import Experts, ModelConfig
from npllama.dtypes import Array
from npllama.errors import ConfigMismatchError
from tests.checkpoint.tiny import CONFIG, ref
from tests.fixtures.loud import half_split

FUSED = Spelling(
    {
        "layers.{i}.attention.wq.weight": "block.{i}.qkv",
        "layers.{i}.attention.wk.weight": "block.{i}.qkv",
        "layers.{i}.attention.wv.weight": "block.{i}.qkv",
        "layers.{i}.feed_forward.w2.weight": "block.{i}.down^T|block.{i}.old_down^T",
    },
    prefix="",
)
MIXTURE = replace(CONFIG, experts=Experts(count=3, active=1, hidden_dim=5))


def numbers(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def refs(arrays: Mapping[str, Array]) -> dict[str, TensorRef]:
    return {name: ref(name, values) for name, values in arrays.items()}


def spelled(config: ModelConfig, form: Format = "hf") -> dict[str, Array]:
    """Return tensors in the spelling of the table, one for each expert."""
    arrays = {}
    for seed, entry in enumerate(expected(config).values()):
        name = entry.hf if form == "hf" else entry.gguf
        count = entry.stacked if "{e}" in name else 1
        for e in range(count):
            arrays[name.replace("{e}", str(e))] = numbers((entry.shape[0] // count, *entry.shape[1:]), 100 * seed + e)
    return arrays


def read(tensor: TensorRef, rows: int) -> Array:
    """Read a tensor in blocks of rows, as a conversion does."""
    return np.concatenate(
        [tensor.read_rows(start, min(start + rows, tensor.n_rows)) for start in range(0, tensor.n_rows, rows)]
    )


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, qkv_bias=True, qk_norm="head", norm="layer")])
def test_names_of_the_table_become_canonical_in_order(config: ModelConfig, form: Any) -> None:
    arrays = spelled(config, form)
    made = assemble(refs(dict(reversed(arrays.items()))), config, form, Spelling(), "file")
    assert list(made) == list(expected(config))
    for name, entry in expected(config).items():
        np.testing.assert_array_equal(made[name].read(), arrays[entry.hf if form == "hf" else entry.gguf])


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_consecutive_rows_of_a_fused_tensor_are_shared_out(rows: int) -> None:
    arrays = spelled(CONFIG)
    for i in (0, 1):
        parts = [arrays.pop(f"model.layers.{i}.self_attn.{name}_proj.weight") for name in "qkv"]
        arrays[f"block.{i}.qkv"] = np.concatenate(parts)
        arrays[f"block.{i}.down"] = np.ascontiguousarray(arrays.pop(f"model.layers.{i}.mlp.down_proj.weight").T)
    made = assemble(refs(arrays), CONFIG, "hf", FUSED, "file")
    plain = assemble(refs(spelled(CONFIG)), CONFIG, "hf", Spelling(), "file")
    for name, tensor in made.items():
        np.testing.assert_array_equal(read(tensor, rows), plain[name].read(), err_msg=name)
    assert sum(tensor.nbytes for tensor in made.values()) == sum(array.nbytes for array in arrays.values())


def test_the_other_of_two_spellings_is_found() -> None:
    arrays = spelled(CONFIG)
    for i in (0, 1):
        parts = [arrays.pop(f"model.layers.{i}.self_attn.{name}_proj.weight") for name in "qkv"]
        arrays[f"block.{i}.qkv"] = np.concatenate(parts)
        down = arrays.pop(f"model.layers.{i}.mlp.down_proj.weight")
        arrays[f"block.{i}.old_down"] = np.ascontiguousarray(down.T)
    made = assemble(refs(arrays), CONFIG, "hf", FUSED, "file")
    np.testing.assert_array_equal(made["layers.1.feed_forward.w2.weight"].read(), down)


@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_experts_come_to_stand_under_one_another(rows: int) -> None:
    arrays = spelled(MIXTURE)
    made = assemble(refs(arrays), MIXTURE, "hf", HF["qwen3_moe"], "file")
    for canonical, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        stack = [arrays[f"model.layers.1.mlp.experts.{e}.{theirs}.weight"] for e in range(3)]
        tensor = made[f"layers.1.feed_forward.{canonical}.weight"]
        np.testing.assert_array_equal(read(tensor, rows), np.concatenate(stack))
        assert tensor.shape == expected(MIXTURE)[tensor.name].shape


def test_every_expert_s_bytes_are_verified() -> None:
    arrays = spelled(MIXTURE)
    checked: list[str] = []
    found = {name: replace(tensor, verify=lambda n=name: checked.append(n)) for name, tensor in refs(arrays).items()}
    assemble(found, MIXTURE, "hf", HF["qwen3_moe"], "file")["layers.0.feed_forward.w1.weight"].read()
    assert checked == [f"model.layers.0.mlp.experts.{e}.gate_proj.weight" for e in range(3)]


def test_experts_of_different_dtypes_are_refused() -> None:
    found = refs(spelled(MIXTURE))
    odd = "model.layers.0.mlp.experts.2.up_proj.weight"
    found[odd] = ref(odd, numbers((5, 8)).astype(np.float16), "float16")
    with pytest.raises(ConfigMismatchError, match="dtypes differ between experts"):
        assemble(found, MIXTURE, "hf", HF["qwen3_moe"], "file")


def test_rotated_rows_with_their_biases_and_norms_become_pairs() -> None:
    config = replace(CONFIG, head_dim=6, qkv_bias=True, qk_norm="head")
    canonical = {name: numbers(entry.shape, seed) for seed, (name, entry) in enumerate(expected(config).items())}
    table = expected(config)
    arrays = {
        entry.hf: half_split(canonical[name], 6) if entry.heads else canonical[name] for name, entry in table.items()
    }
    made = assemble(refs(arrays), config, "hf", HF["qwen3"], "file")
    for name, values in canonical.items():
        np.testing.assert_array_equal(made[name].read(), values, err_msg=name)
    turned = {name.split(".", 2)[2] for name, entry in table.items() if entry.heads}
    assert turned == {f"attention.{name}" for name in ("wq.weight", "wk.weight", "wq.bias", "wk.bias",
                                                       "q_norm.weight", "k_norm.weight")}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_prefix_may_be_missing(prefix: str) -> None:
    config = replace(CONFIG, n_kv_heads=4, norm="layer", positions="learned", gated=False, qkv_bias=True,
                     attention_out_bias=True, ffn_bias=True, tied=True)  # fmt: skip
    dim, hidden = config.dim, config.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (16, dim), "wpe.weight": (64, dim)}
    for i in (0, 1):
        block = {
            "ln_1.weight": (dim,), "ln_1.bias": (dim,), "attn.c_attn.weight": (dim, 3 * dim),
            "attn.c_attn.bias": (3 * dim,), "attn.c_proj.weight": (dim, dim), "attn.c_proj.bias": (dim,),
            "ln_2.weight": (dim,), "ln_2.bias": (dim,), "mlp.c_fc.weight": (dim, hidden), "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (hidden, dim), "mlp.c_proj.bias": (dim,), "attn.bias": (1, 1, 4, 4),
        }  # fmt: skip
        shapes |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (dim,), "ln_f.bias": (dim,)}
    arrays = {prefix + name: numbers(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    made = assemble(refs(arrays), config, "hf", HF["gpt2"], "file")
    assert list(made) == list(expected(config))
    fused = arrays[f"{prefix}h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(made["layers.1.attention.wk.weight"].read(), fused[:, dim : 2 * dim].T)
    bias = arrays[f"{prefix}h.0.attn.c_attn.bias"]
    np.testing.assert_array_equal(made["layers.0.attention.wv.bias"].read(), bias[2 * dim :])


def test_an_output_beside_a_tied_embedding_is_dropped() -> None:
    tied = replace(CONFIG, tied=True)
    assert OUTPUT not in assemble(refs(spelled(CONFIG)), tied, "hf", HF["llama"], "file")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.1.self_attn.q_proj.weight", None, r"1 tensors are missing: model\.layers\.1\.self_attn\.q_proj"),
        ("model.layers.1.self_attn.q_proj.bias", (8,), r"1 tensors are unknown: model\.layers\.1\.self_attn\.q_proj.b"),
        ("model.layers.2.mlp.up_proj.weight", (12, 8), "1 tensors are unknown"),
        ("lm_head.weight", (15, 8), r"lm_head\.weight is \(15, 8\), expected \(16, 8\)"),
        ("model.norm.weight", (1, 8), r"norm\.weight is \(1, 8\), expected \(8,\)"),
    ],
)
def test_other_tensors_than_the_configuration_s_are_refused_by_the_file_s_own_names(
    name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    arrays = spelled(CONFIG)
    arrays.pop(name, None)
    if shape is not None:
        arrays[name] = numbers(shape)
    with pytest.raises(ConfigMismatchError, match=words):
        assemble(refs(arrays), CONFIG, "hf", HF["llama"], "file")


def test_a_shared_expert_s_gate_may_be_a_vector() -> None:
    config = replace(MIXTURE, experts=Experts(count=3, active=1, hidden_dim=5, shared_dim=4))
    arrays = spelled(config, "gguf")
    gates = [f"blk.{i}.ffn_gate_inp_shexp.weight" for i in (0, 1)]
    made = assemble(refs({**arrays, **{name: arrays[name][0] for name in gates}}), config, "gguf", Spelling(), "file")
    gate = made["layers.1.feed_forward.shared.router.weight"]
    assert gate.shape == (1, 8)
    np.testing.assert_array_equal(gate.read(), arrays[gates[1]])


@pytest.mark.parametrize("table", [HF, GGUF], ids=["hf", "gguf"])
def test_every_spelling_is_of_a_tensor_that_some_model_has(table: Mapping[str, Spelling]) -> None:
    every = replace(CONFIG, norm="layer", positions="learned", qkv_bias=True, attention_out_bias=True, ffn_bias=True,
                    output_bias=True)  # fmt: skip
    mixed = replace(every, experts=Experts(2, 1, 4, shared_dim=4))
    known = {name.replace("layers.0.", "layers.{i}.") for config in (every, mixed) for name in expected(config)}
    for family, spelling in table.items():
        assert set(spelling.names) <= known, family
