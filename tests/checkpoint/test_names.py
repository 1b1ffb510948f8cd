"""The table of tensors, held against those of transformers and of the gguf package."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from npllama.checkpoint.names import EMBEDDING, OUTPUT, expected, is_ignored, select
from npllama.checkpoint.tensor import TensorRef
from npllama.config import Experts
from npllama.errors import ConfigMismatchError
from tests.checkpoint.tiny import CONFIG, checkpoint
from tests.fixtures.loud import hf_config, loud_config


def found() -> dict[str, TensorRef]:
    return dict(checkpoint().tensors)


# --- the table -----------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
def test_hugging_face_names_and_shapes_are_those_of_transformers(tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = loud_config(head_dim=24, tied=tied)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(config)))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {entry.hf: entry.shape for entry in expected(config).values()} == theirs


def test_gguf_names_are_those_of_the_gguf_package_for_both_other_spellings() -> None:
    gguf = pytest.importorskip("gguf")
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.n_layers)
    for entry in expected(CONFIG).values():
        for spelled in (entry.name, entry.hf):
            assert mapping.get_name(spelled, try_suffixes=(".weight",)) == entry.gguf


def test_table_is_in_the_order_of_the_forward_pass_and_complete() -> None:
    names = list(expected(CONFIG))
    assert names[0] == EMBEDDING
    assert names[-2:] == ["norm.weight", OUTPUT]
    assert names[1:10] == [
        f"layers.0.{part}.weight"
        for part in (
            "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
            "ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2",
        )
    ]  # fmt: skip
    assert [name.replace("layers.0.", "layers.1.") for name in names[1:10]] == names[10:19]
    assert len(names) == 9 * 2 + 3


def test_shapes_follow_the_axes() -> None:
    table = expected(replace(CONFIG, head_dim=6))
    assert table["layers.0.attention.wq.weight"].shape == (24, 8)
    assert table["layers.0.attention.wk.weight"].shape == (12, 8)
    assert table["layers.0.attention.wo.weight"].shape == (8, 24)
    assert table["layers.0.feed_forward.w2.weight"].shape == (8, 12)
    assert table["norm.weight"].shape == (8,)
    assert table[EMBEDDING].shape == table[OUTPUT].shape == (16, 8)


def test_rotated_rows_are_those_of_queries_and_keys() -> None:
    heads = {name: entry.heads for name, entry in expected(CONFIG).items() if entry.heads}
    assert heads == {f"layers.{i}.attention.w{p}.weight": n for i in (0, 1) for p, n in (("q", 4), ("k", 2))}


def test_shard_axes_are_those_of_fairscale() -> None:
    """Column-parallel layers are cut along their output, row-parallel ones along their input."""
    axes = {entry.name.split(".")[-2]: entry.shard_axis for entry in expected(CONFIG).values()}
    assert axes == {
        "tok_embeddings": 0, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1,
        "norm": None, "attention_norm": None, "ffn_norm": None,
    }  # fmt: skip


def test_a_tied_model_has_no_output() -> None:
    assert set(expected(CONFIG)) - set(expected(replace(CONFIG, tied=True))) == {OUTPUT}


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({"qkv_bias": True}, {"attention.wq.bias", "attention.wk.bias", "attention.wv.bias"}),
        ({"attention_out_bias": True}, {"attention.wo.bias"}),
        ({"norm": "layer"}, {"attention_norm.bias", "ffn_norm.bias"}),
        ({"qk_norm": "head"}, {"attention.q_norm.weight", "attention.k_norm.weight"}),
        ({"ffn_bias": True}, {f"feed_forward.{name}.bias" for name in ("w1", "w2", "w3")}),
    ],
)
def test_a_family_s_tensors_are_there_when_it_has_them(changes: dict[str, Any], there: set[str]) -> None:
    more = set(expected(replace(CONFIG, **changes))) - set(expected(CONFIG))
    assert more - {"norm.bias"} == {f"layers.{i}.{name}" for i in (0, 1) for name in there}


def test_experts_stand_under_one_another_in_the_layers_that_have_them() -> None:
    experts = Experts(count=3, active=1, hidden_dim=5, shared_dim=7, dense_layers=(0,))
    table = expected(replace(CONFIG, experts=experts))
    assert table["layers.0.feed_forward.w1.weight"].shape == (12, 8)
    assert table["layers.1.feed_forward.w1.weight"].shape == (15, 8)
    assert table["layers.1.feed_forward.w2.weight"].shape == (24, 5)
    assert table["layers.1.feed_forward.w2.weight"].stacked == 3
    assert table["layers.1.feed_forward.router.weight"].shape == (3, 8)
    assert table["layers.1.feed_forward.shared.w2.weight"].shape == (8, 7)
    assert not any("router" in name or "shared" in name for name in table if name.startswith("layers.0."))


# --- matching ------------------------------------------------------------------------------------------------------


def test_select_gives_canonical_names_in_order_whatever_the_file_s_order() -> None:
    shuffled = dict(sorted(found().items(), reverse=True))
    chosen = select(shuffled, CONFIG, "file")
    assert list(chosen) == list(expected(CONFIG))
    assert chosen["norm.weight"] is shuffled["norm.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "rope.freqs",
        "rope_freqs.weight",
        "layers.0.attention.rotary_emb.inv_freq",
        "model.layers.11.self_attn.rotary_emb.inv_freq",
        "transformer.h.3.attn.bias",
        "h.3.attn.masked_bias",
    ],
)
def test_tables_that_are_computed_anew_are_ignored(name: str) -> None:
    assert is_ignored(name)
    assert name not in select({**found(), name: found()["norm.weight"]}, CONFIG, "file")


@pytest.mark.parametrize("name", ["rope_freqsXweight", "rope.freqs.weight", "x.rope.freqs", "layers.0.rotary_emb"])
def test_what_only_looks_like_one_is_not_ignored(name: str) -> None:
    assert not is_ignored(name)
    with pytest.raises(ConfigMismatchError, match="1 tensors are unknown"):
        select({**found(), name: found()["norm.weight"]}, CONFIG, "file")


def test_at_most_five_names_are_listed_with_the_count_of_the_rest() -> None:
    with pytest.raises(ConfigMismatchError) as caught:
        select({}, CONFIG, "model.pth")
    message = str(caught.value)
    assert message.startswith(
        "model.pth: 21 tensors are missing: tok_embeddings.weight, layers.0.attention_norm.weight, "
    )
    assert "and 16 more" in message
    assert message.count("layers.") == 4


def test_shapes_are_shown_both() -> None:
    refs = found()
    refs["norm.weight"] = refs[EMBEDDING]
    with pytest.raises(ConfigMismatchError, match=r"norm\.weight is \(16, 8\), expected \(8,\)"):
        select(refs, CONFIG, "file")


def test_an_output_beside_a_tied_embedding_is_dropped() -> None:
    assert OUTPUT not in select(found(), replace(CONFIG, tied=True), "file")


def test_another_spelling_is_not_taken() -> None:
    spelled = {entry.hf: found()[name] for name, entry in expected(CONFIG).items()}
    with pytest.raises(ConfigMismatchError, match="missing"):
        select(spelled, CONFIG, "file")
