from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from npllama.checkpoint.gguf.checkpoint import open_gguf_checkpoint
from npllama.checkpoint.names import expected
from npllama.checkpoint.safetensors.hf import open_hf
from npllama.checkpoint.tensor import Checkpoint
from npllama.config import from_hf_json
from npllama.errors import (
    ConfigError,
    ConfigMismatchError,
    CorruptDataError,
    FileAccessError,
    NotACheckpointError,
    NpllamaError,
    ShardError,
    UnsafeFileError,
    UnsupportedError,
)

CONFIG = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
INDEX = "model.safetensors.index.json"
Tensors = dict[str, np.ndarray]
OpenHf = Callable[[Path], Checkpoint]


@pytest.fixture
def opened() -> Iterator[OpenHf]:
    """Open a checkpoint, closed at the end of the test."""
    checkpoints = []

    def open_checkpoint(path: Path) -> Checkpoint:
        checkpoints.append(open_hf(path))
        return checkpoints[-1]

    yield open_checkpoint
    for checkpoint in checkpoints:
        for source in checkpoint.sources:
            source.close()


def random_tensors(**changes: Any) -> Tensors:
    rng = np.random.default_rng(0)
    config, _ = from_hf_json(json.dumps({**CONFIG, **changes}).encode(), "config.json")
    return {entry.hf: rng.standard_normal(entry.shape, dtype=np.float32) for entry in expected(config).values()}


def write(folder: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    """Write a checkpoint of one file."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(random_tensors(**changes) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, shards: dict[str, Tensors], weight_map: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint of several files; the index can be made to lie."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    true_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": true_map if weight_map is None else weight_map}))
    return folder


def halves() -> dict[str, Tensors]:
    tensors = random_tensors()
    names = list(tensors)
    return {
        "model-1.safetensors": {name: tensors[name] for name in names[:9]},
        "model-2.safetensors": {name: tensors[name] for name in names[9:]},
    }


# --- what is read right --------------------------------------------------------------------------------------------


def test_every_tensor_has_its_canonical_name(tmp_path: Path, opened: OpenHf) -> None:
    checkpoint = opened(write(tmp_path))
    tensors = random_tensors()
    assert (checkpoint.kind, checkpoint.path, checkpoint.rope_layout) == ("hf", str(tmp_path), "half-split")
    table = expected(checkpoint.config)
    assert list(checkpoint.tensors) == list(table)
    for name, ref in checkpoint.tensors.items():
        if not table[name].heads:
            np.testing.assert_array_equal(ref.read(), tensors[table[name].hf])


def test_rotated_rows_become_interleaved_pairs(tmp_path: Path, opened: OpenHf) -> None:
    tensors = random_tensors()
    checkpoint = opened(write(tmp_path))
    for canonical, theirs, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        rows = checkpoint.tensors[f"layers.1.attention.{canonical}.weight"].read()
        half_split = tensors[f"model.layers.1.self_attn.{theirs}.weight"]
        for head in range(heads):
            for pair in range(3):
                np.testing.assert_array_equal(rows[6 * head + 2 * pair], half_split[6 * head + pair])
                np.testing.assert_array_equal(rows[6 * head + 2 * pair + 1], half_split[6 * head + 3 + pair])


def test_rows_of_a_rotated_tensor_are_rows_of_the_whole(tmp_path: Path, opened: OpenHf) -> None:
    ref = opened(write(tmp_path)).tensors["layers.0.attention.wk.weight"]
    whole = ref.read()
    for start in range(ref.n_rows):
        for stop in range(start, ref.n_rows + 1):
            np.testing.assert_array_equal(ref.read_rows(start, stop), whole[start:stop])


def test_shards_read_as_one_file_does(tmp_path: Path, opened: OpenHf) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = opened(write(tmp_path / "one"))
    two = opened(write_shards(tmp_path / "two", halves()))
    assert [source.name for source in two.sources] == ["model-1.safetensors", "model-2.safetensors"]
    assert list(one.tensors) == list(two.tensors)
    for name, ref in one.tensors.items():
        np.testing.assert_array_equal(ref.read(), two.tensors[name].read())


def test_a_single_file_is_read_with_the_config_beside_it(tmp_path: Path, opened: OpenHf) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert len(opened(tmp_path / "other.safetensors").tensors) == 21


def test_a_single_file_in_the_current_folder_is_read(
    tmp_path: Path, opened: OpenHf, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(opened(Path("model.safetensors")).tensors) == 21


def test_a_tied_model_has_no_output(tmp_path: Path, opened: OpenHf) -> None:
    checkpoint = opened(write(tmp_path, tie_word_embeddings=True))
    assert checkpoint.config.tied
    assert "output.weight" not in checkpoint.tensors


def test_the_tokenizers_files_come_along(tmp_path: Path, opened: OpenHf) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
    for name in [*names, "chat_template.jinja", "tokenizer.model", "README.md"]:
        (tmp_path / name).write_text(name)
    files = opened(write(tmp_path)).tokenizer
    assert files == {name: name.encode() for name in [*names, "chat_template.jinja"]}


def test_metas_tokenizer_serves_where_there_is_no_tokenizer_json(tmp_path: Path, opened: OpenHf) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_text("top")
    assert opened(write(tmp_path)).tokenizer == {"tokenizer.model": b"top", "generation_config.json": b"{}"}
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_text("original")
    assert opened(tmp_path).tokenizer["tokenizer.model"] == b"original"


def test_a_checkpoint_without_a_tokenizer_has_no_files(tmp_path: Path, opened: OpenHf) -> None:
    (tmp_path / "original").mkdir()
    assert opened(write(tmp_path)).tokenizer == {}


# --- against transformers ------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_checkpoint_of_transformers_gives_the_same_attention_scores(
    tmp_path: Path, opened: OpenHf, shard_size: str
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).double()
    model.float().save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "20KB")
    checkpoint = opened(tmp_path)

    theirs = model.state_dict()
    table = expected(checkpoint.config)
    for name, ref in checkpoint.tensors.items():
        if not table[name].heads:
            np.testing.assert_array_equal(ref.read(), theirs[table[name].hf].numpy())

    # Rotated by halves with their rows, or as complex pairs with ours, q and k have the same products.
    x = torch.randn(5, 24, dtype=torch.float64)
    attention = model.double().model.layers[1].self_attn
    q = attention.q_proj(x).view(1, 5, 4, 6).transpose(1, 2)
    k = attention.k_proj(x).view(1, 5, 2, 6).transpose(1, 2)
    angles = torch.outer(torch.arange(5.0), 10000.0 ** (-torch.arange(3.0) / 3)).double()
    cos, sin = (torch.cat((part, part), -1)[None] for part in (angles.cos(), angles.sin()))
    q, k = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    wanted = q @ k.repeat_interleave(2, 1).transpose(-1, -2)

    def rotated(which: str, heads: int) -> Any:
        weight = torch.from_numpy(checkpoint.tensors[f"layers.1.attention.{which}.weight"].read()).double()
        pairs = torch.view_as_complex((x @ weight.T).view(5, heads, 3, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    found = torch.einsum("thd,shd->hts", rotated("wq", 4), rotated("wk", 2).repeat_interleave(2, 1))
    torch.testing.assert_close(found, wanted[0], rtol=1e-12, atol=1e-14)


@pytest.mark.real
@pytest.mark.torch
@pytest.mark.slow
def test_the_real_model_saved_by_transformers_equals_the_gguf_it_came_from(
    tmp_path: Path, opened: OpenHf, smollm2_gguf: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    config = transformers.AutoConfig.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = loading.load_gguf_checkpoint(smollm2_gguf, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(tmp_path, max_shard_size="200MB")
    theirs, ours = opened(tmp_path), open_gguf_checkpoint(smollm2_gguf)
    assert len(theirs.sources) > 1
    # A GGUF file holds a float32, of which transformers takes the digits and npllama the number that was meant.
    assert np.float32(theirs.config.norm_eps) == np.float32(ours.config.norm_eps)
    assert replace(theirs.config, norm_eps=ours.config.norm_eps) == ours.config
    assert list(theirs.tensors) == list(ours.tensors)
    for name, ref in ours.tensors.items():
        assert ref.read().tobytes() == theirs.tensors[name].read().tobytes(), name
    for source in ours.sources:
        source.close()


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(path: Path, error: type[NpllamaError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        open_hf(path)
    assert type(caught.value) is error
    assert caught.value.file is not None


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    save_file(random_tensors(), tmp_path / "model.safetensors")
    refused(tmp_path, NotACheckpointError, r"no config\.json")
    refused(tmp_path / "model.safetensors", NotACheckpointError, r"no config\.json")


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    refused(tmp_path, NotACheckpointError, r"neither model\.safetensors nor .*index\.json")


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none" / "model.safetensors", FileAccessError, "cannot list")
    write(tmp_path)
    refused(tmp_path / "none.safetensors", FileAccessError, "cannot open")


def test_an_unknown_config_key_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "logit_softcap": 30}))
    refused(tmp_path, ConfigError, "logit_softcap")


def test_another_family_is_unsupported(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "bert"}))
    refused(tmp_path, UnsupportedError, "bert")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_contradict_the_config_are_refused(tmp_path: Path, change: str) -> None:
    tensors = random_tensors()
    if change == "missing":
        del tensors["model.norm.weight"]
    elif change == "unknown":
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    else:
        tensors["lm_head.weight"] = np.zeros((33, 24), np.float32)
    refused(write(tmp_path, tensors), ConfigMismatchError, change)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, halves())
    (tmp_path / "model-2.safetensors").unlink()
    refused(tmp_path, ShardError, r"1 of 2 shards are missing: model-2\.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../model-2.safetensors",
        "/etc/model-2.safetensors",
        "sub/model-2.safetensors",
        "..\\model-2.safetensors",
        "C:model-2.safetensors",
        "gs://bucket/model-2.safetensors",
        "model-2.safetensors\0",
        "model-2.pkl",
        "",
    ],
)
def test_a_shard_outside_the_folder_is_unsafe(tmp_path: Path, shard: str) -> None:
    write_shards(tmp_path, halves())
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": shard}}))
    refused(tmp_path, UnsafeFileError, "the name of a .safetensors file in this folder")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = halves()
    shards["model-2.safetensors"]["model.embed_tokens.weight"] = np.zeros((32, 24), np.float32)
    weight_map = {name: shard for shard, tensors in reversed(shards.items()) for name in tensors}
    write_shards(tmp_path, shards, weight_map)
    refused(tmp_path, ShardError, r"embed_tokens.weight is in model-2\.safetensors, .* in model-1\.safetensors")


def test_a_tensor_absent_from_its_shard_is_refused(tmp_path: Path) -> None:
    shards = halves()
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    del shards["model-2.safetensors"]["model.norm.weight"]
    write_shards(tmp_path, shards, weight_map)
    refused(tmp_path, ShardError, r"model\.norm\.weight is not in model-2\.safetensors")


def test_a_tensor_that_the_index_does_not_name_is_refused(tmp_path: Path) -> None:
    shards = halves()
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    del weight_map["model.norm.weight"]
    write_shards(tmp_path, shards, weight_map)
    refused(tmp_path, ShardError, r"model\.norm\.weight is in model-2\.safetensors, .* nowhere")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{}", "weight_map is not"),
        ('{"weight_map": []}', "weight_map is not"),
        ('{"weight_map": {"a": 1}}', "weight_map is not"),
        ('{"weight_map": {', "not JSON"),
    ],
)
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, index: str, message: str) -> None:
    write_shards(tmp_path, halves())
    (tmp_path / INDEX).write_text(index)
    refused(tmp_path, CorruptDataError, message)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through Linux's /proc")
def test_nothing_stays_open_when_a_checkpoint_is_refused(tmp_path: Path) -> None:
    shards = halves()
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    del shards["model-2.safetensors"]["model.norm.weight"]
    write_shards(tmp_path, shards, weight_map)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only
    refused(tmp_path, ShardError, "not in")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
