"""What the matrices of a model multiply, measured without a text: against transformers' hooks, and against the taps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllama
from npllama.checkpoint.convert import convert_checkpoint
from npllama.checkpoint.store import Store
from npllama.config import Experts, ModelConfig
from npllama.dtypes import Array, Tensor
from npllama.importance import importance, sequences
from tests.checkpoint.tiny import checkpoint
from tests.families.cases import CASES
from tests.fixtures.loud import loud_config, loud_tensors, write_hf

#: Rounding to bfloat16, with room for sums in another order.
BFLOAT16 = 2.0**-8 + 1e-9

#: transformers' name of a layer's matrix -> ours.
PROJECTIONS = {
    **{f"self_attn.{name}_proj": f"attention.w{name}" for name in "qkvo"},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def measured(store: Store, find: Callable[[str], Any] | None = None) -> dict[str, Array]:
    tensors: dict[str, Tensor | None] = {}

    def once(name: str) -> Tensor | None:
        name = store.manifest["tied"].get(name, name)
        return tensors.setdefault(name, store.find(name))

    return importance(store.config, find or once, *store.frequencies())


def test_tokens_are_spread_over_the_vocabulary() -> None:
    tokens = sequences(loud_config(vocab_size=1000))
    assert len(set(tokens.ravel().tolist())) == tokens.size
    counts, _ = np.histogram(tokens, bins=8, range=(0, 1000))
    assert np.ptp(counts) <= 2
    assert sequences(loud_config(max_seq_len=5)).shape[1] == 5


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama", "llama, odd widths, biases", "mistral, window of 7", "qwen3", "olmo2"])
def test_mean_squares_are_those_that_transformers_sees(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.families import transformers_models as theirs

    case = CASES[name]
    model = theirs.build(case.family, case.settings)
    model.save_pretrained(tmp_path / "hf")
    store = Store.open(npllama.convert(tmp_path / "hf", tmp_path / "m", dtype="f32"))
    theirs.use_frequencies(model, *store.frequencies())
    model = model.double()
    inputs: dict[str, Any] = {}

    def watch(ours: str) -> Callable[..., None]:
        return lambda module, arguments: inputs.__setitem__(ours, arguments[0])

    for i, layer in enumerate(model.model.layers):
        for path, ours in PROJECTIONS.items():
            layer.get_submodule(path).register_forward_pre_hook(watch(f"layers.{i}.{ours}.weight"))
    model.lm_head.register_forward_pre_hook(watch("output.weight"))
    with torch.no_grad(), theirs.lifted(model):
        model(torch.from_numpy(sequences(store.config)))
    found = measured(store)
    assert found.keys() == inputs.keys()
    for ours, x in inputs.items():
        np.testing.assert_allclose(found[ours], x.square().mean((0, 1)).numpy(), rtol=BFLOAT16, err_msg=ours)


def test_experts_share_what_their_matrices_are_given(tmp_path: Path) -> None:
    """Against the taps of the textbook in float64, one sequence at a time."""
    config = loud_config(n_layers=1, experts=Experts(4, 2, hidden_dim=24))
    store = Store.open(convert_checkpoint(checkpoint(config=config, tokenizer={}), tmp_path / "m", dtype="f32"))
    model = npllama.load(store.path, backend="float64")
    seen: dict[str, list[Array]] = {"layers.0.ffn_norm": [], "layers.0.expert_act": []}
    for tokens in sequences(config):
        with npllama.record(model) as rec:
            model.forward(tokens)
        for name, parts in seen.items():
            parts.append(np.square(rec[name]))
    found = measured(store)
    into, between = (np.concatenate(parts) for parts in seen.values())
    for name in ("router", "w1", "w3"):
        np.testing.assert_allclose(found[f"layers.0.feed_forward.{name}.weight"], into.mean(0), rtol=BFLOAT16)
    np.testing.assert_allclose(found["layers.0.feed_forward.w2.weight"], between.mean((0, 1)), rtol=BFLOAT16)


def test_only_the_rows_that_are_needed_are_read(tmp_path: Path) -> None:
    """Of the embedding those of the tokens; of the output none; of the matrices all, a piece at a time."""
    config = replace(loud_config(vocab_size=4096), tied=False)
    made = checkpoint(config=config, tokenizer={})
    rows: dict[str, int] = {}

    def counted(name: str) -> Any:
        if name not in made.tensors:
            return None
        ref = made.tensors[name]
        if len(ref.shape) < 2:
            return ref.rows(0, ref.n_rows)

        def read_rows(start: int, stop: int) -> Array:
            rows[name] = rows.get(name, 0) + stop - start
            return ref.read_rows(start, stop)

        return kept.setdefault(name, replace(ref, read_rows=read_rows))

    kept: dict[str, Any] = {}
    importance(config, counted, np.ones(config.head_dim // 2, np.float32))
    assert rows.pop("tok_embeddings.weight") == sequences(config).size
    assert "output.weight" not in rows
    assert rows
    assert all(count == made.tensors[name].n_rows for name, count in rows.items())


def test_a_matrix_whose_input_is_no_number_is_left_out(tmp_path: Path) -> None:
    config = loud_config(n_layers=2)
    tensors = loud_tensors(config)
    tensors["layers.1.attention_norm.weight"][3] = np.nan
    source = write_hf(tmp_path / "hf", tensors, config)
    store = Store.open(npllama.convert(source, tmp_path / "m", dtype="f32", allow_nan=True))
    assert {name.rpartition(".")[0] for name in measured(store)} == {
        f"layers.0.{place}" for place in (*(f"attention.w{x}" for x in "qkvo"), *(f"feed_forward.w{i}" for i in "123"))
    }
    assert npllama.convert(source, tmp_path / "int8", dtype="int8", allow_nan=True).is_dir()


def energies(config: ModelConfig, folder: Path, dtype: str) -> float:
    """Return by how much logits change, as a mean square, when weights become integers."""
    exact, model = (
        npllama.load(convert_checkpoint(outlying(config), folder / name, dtype=name), backend="float64")
        for name in ("f32", dtype)
    )
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 60)
    return float(np.square(exact.forward(tokens) - model.forward(tokens)).mean())


def outlying(config: ModelConfig) -> Any:
    """Return a model one of whose columns is large, as in trained ones: its norms' weights are, and so its inputs."""
    made = checkpoint(config=config, tokenizer={})
    values = {name: ref.read() for name, ref in made.tensors.items()}
    for numbers in values.values():
        if numbers.ndim == 1:
            numbers[...] = 0.1
            numbers[5] = 3.0
    return checkpoint(values, config=config, tokenizer={})


@pytest.mark.parametrize(("dtype", "factor"), [("int8", 4), ("int4", 4)])
def test_integers_are_chosen_for_the_columns_that_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, factor: float
) -> None:
    config = loud_config(dim=64, hidden_dim=128, n_layers=1)
    with_it = energies(config, tmp_path / "with", dtype)
    monkeypatch.setattr("npllama.checkpoint.convert.importance", lambda *_: {})
    assert energies(config, tmp_path / "without", dtype) > factor * with_it
