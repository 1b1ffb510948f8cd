"""Names and layouts of other frameworks: translated, rearranged, and never so that a mistake gets lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllama
from npllama.check.adapters import CONVENTIONS, adapted, canonical
from npllama.check.compare import compare
from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace
from npllama.check.trace_format import forward_rank
from npllama.dtypes import Array
from npllama.taps import tap_names
from tests.check.family_models import MODELS
from tests.check.runs import CONFIG, PREFILL, TOKENS, edited, engine_trace
from tests.fixtures.loud import half_split, loud_tensors


@pytest.fixture(scope="module")
def reference() -> MemoryTrace:
    return engine_trace()


def kind(name: str) -> str:
    return name.rpartition(".")[2]


def in_halves(name: str, x: Array) -> Array:
    """Give q and k half-split heads, as Hugging Face and MLX have them."""
    if kind(name) not in ("q", "k", "q_rope", "k_rope"):
        return x
    return np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def hf_layout(name: str, x: Array) -> Array:
    """A batch axis of one; flat projections, heads before tokens behind RoPE."""
    x = in_halves(name, x)
    if kind(name) in ("q", "k", "v", "context"):
        x = x.reshape(len(x), -1)
    elif kind(name) in ("q_rope", "k_rope"):
        x = x.swapaxes(0, 1)
    return x[None]


def llama_cpp_layout(name: str, x: Array) -> Array:
    """Flat projections and contexts; four axes where there are heads."""
    if kind(name) in ("q", "k", "v", "context"):
        return x.reshape(len(x), -1)
    return x[None] if x.ndim == 3 else x


def names_of(title: str) -> Callable[[str], str | None]:
    """Return what renames a tap as a convention does: the first of its patterns that means it."""
    (convention,) = [found for found in CONVENTIONS if title in found.title]

    def rename(name: str) -> str | None:
        parts = name.split(".")
        layer = parts[1] if len(parts) == 3 else ""
        general = name.replace(f".{layer}.", ".{i}.") if layer else name
        for pattern, taps in convention.names.items():
            if general in taps.split("|"):
                return pattern.format(i=layer)
        return name if title == "Meta" else None

    return rename


STRANGERS = {
    "Hugging Face": hf_layout,
    "MLX": hf_layout,
    "Meta": lambda name, x: x.reshape(len(x), -1)[None] if kind(name) in ("q", "k", "v", "context") else x[None],
    "llama.cpp": llama_cpp_layout,
}


@pytest.mark.parametrize("title", STRANGERS)
def test_a_trace_in_other_names_and_layouts_is_bit_for_bit_the_same(reference: Any, title: str) -> None:
    rename = names_of(title)
    if title == "llama.cpp":  # one name means the projection and what RoPE made of it; a dump has room for one
        rename_all = rename
        rename = lambda name: None if kind(name) in ("q", "k") else rename_all(name)
    stranger = edited(reference, rename=rename, arrange=STRANGERS[title], producer=title, model={})
    assert {entry.name for entry in stranger.taps}.isdisjoint(["layers.0.q", "layers.0.resid_post"])
    report = compare(stranger, reference)
    assert report.verdict == "match", report.reason
    assert len(report.rows) >= 13 * CONFIG.n_layers * 4
    assert not report.extra
    assert all(row.max_abs == 0 for row in report.rows), [row.name for row in report.rows if row.max_abs]
    assert any(title in note and "translated" in note for note in report.notes)


def test_it_works_the_other_way_round_too(reference: Any) -> None:
    stranger = edited(reference, rename=names_of("Hugging Face"), arrange=hf_layout, producer="torch", model={})
    report = compare(reference, stranger)
    assert report.verdict == "match", report.reason
    assert max(row.max_abs or 0 for row in report.rows) == 0


def test_the_layout_that_a_trace_declares_counts(reference: Any) -> None:
    halves = edited(reference, arrange=in_halves, producer="mine", model={"rope_layout": "half-split"})
    assert compare(halves, reference).verdict == "match"
    undeclared = compare(edited(halves, model={}), reference)
    assert (undeclared.verdict, undeclared.first_divergence) == ("differs", "layers.0.q")
    declared = edited(reference, rename=names_of("Hugging Face"), model={"rope_layout": "interleaved"})
    assert compare(declared, reference).verdict == "match"


def test_a_missing_rope_is_not_excused_by_the_name_that_llama_cpp_gives_both(reference: Any) -> None:
    unrotated = {(f"layers.{i}.q_rope", 0): lambda x, i=i: reference.read(f"layers.{i}.q") for i in range(2)}
    wrong = edited(reference, unrotated, rename=names_of("llama.cpp"), arrange=llama_cpp_layout, model={})
    report = compare(wrong, reference)
    assert (report.verdict, report.first_divergence) == ("differs", "layers.0.q_rope")


def test_masks_of_huge_negative_numbers_are_masks(reference: Any) -> None:
    def added(name: str, x: Array) -> Array:
        return np.where(np.isneginf(x), np.float32(np.finfo(np.float32).min), x)

    assert compare(edited(reference, arrange=added), reference).verdict == "match"


def test_a_layout_that_cannot_be_understood_is_another_shape(reference: Any) -> None:
    report = compare(edited(reference, {("layers.0.gate", 0): lambda x: x.T}), reference)
    assert report.first_divergence == "layers.0.gate"
    assert next(row for row in report.rows if row.verdict == "differs").finding.startswith("shape (192, 64)")


def test_every_convention_translates_into_taps_that_exist() -> None:
    known = {name for model in (CONFIG, *MODELS.values()) for name in tap_names(replace(model, n_layers=4, windows=()))}
    for convention in CONVENTIONS:
        for pattern, taps in convention.names.items():
            for heads, tap in zip((False, True), (taps.partition("|")[0], taps.rpartition("|")[2]), strict=True):
                assert canonical(pattern.format(i=3), heads=heads) == (tap.format(i=3), convention)
                assert tap.format(i=3) in known


@pytest.mark.parametrize(
    "name",
    ["", "model.layers.x.mlp", "model.layers.01.mlp", "model.layers.0.mlp.extra", "attn_norm-", "kq-0", "layers.1.wq"],
)
def test_a_name_of_nobody_stays_as_it_is(name: str) -> None:
    assert canonical(name) is None
    assert forward_rank(name) == (3, 0, 0)


def test_a_trace_in_order_is_returned_as_it_is(reference: Any) -> None:
    plain = edited(reference, {(entry.name, entry.step): None for entry in reference.taps if "scores" in entry.name})
    assert adapted(plain, like=reference) == (plain, ())


@pytest.mark.torch
def test_forward_hooks_on_transformers_give_a_trace_that_matches(reference: Any) -> None:
    torch = pytest.importorskip("torch")
    from tests.fixtures.reference import transformers_llama

    model = transformers_llama(CONFIG, loud_tensors(CONFIG))
    trace = MemoryTrace(tokens=TOKENS[:PREFILL], prefill=PREFILL, producer="transformers", model={})

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            trace.add(0, name, (output[0] if isinstance(output, tuple) else output).detach().numpy())

        return hook

    wanted = [name for name, _ in model.named_modules() if canonical(name) is not None]
    for name in wanted:
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        model(torch.tensor([TOKENS[:PREFILL]]))
    assert len(wanted) > 10 * CONFIG.n_layers
    truth = engine_trace(backend="float64")
    report = compare(trace, reference, truth)
    assert report.verdict == "match", report.reason
    assert {"layers.1.q", "layers.1.k", "layers.1.resid_post", "logits"} <= {row.name for row in report.rows}
    permuted = half_split(trace.read("model.layers.0.self_attn.k_proj")[0].T, CONFIG.head_dim).T[None]
    trace.add(0, "model.layers.0.self_attn.k_proj", permuted)
    assert compare(trace, reference, truth).first_divergence == "layers.0.k"


_TINY = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "settings", "seen"),
    [
        (
            "Qwen3Moe",
            {**_TINY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
            {"layers.1.q_norm", "layers.1.k_norm", "layers.1.router_logits", "layers.1.ffn_out"},
        ),
        (
            "GPT2",
            {**_TINY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 80},
            {"pos_embeddings", "layers.1.attention_out", "layers.1.up", "layers.1.ffn_out", "norm"},
        ),
    ],
)  # fmt: skip
def test_hooks_on_other_families_give_traces_that_match(
    family: str, settings: dict[str, Any], seen: set[str], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from tests.families.transformers_models import build

    theirs = build(family, settings)
    theirs.save_pretrained(tmp_path / "hf")
    folder = npllama.convert(tmp_path / "hf", tmp_path / "store", dtype="f32")
    tokens = [token % 64 for token in TOKENS[:PREFILL]]
    trace = MemoryTrace(tokens=tokens, prefill=PREFILL, producer="transformers", model={})

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            trace.add(0, name, (output[0] if isinstance(output, tuple) else output).detach().numpy())

        return hook

    for name, module in theirs.named_modules():
        if canonical(name) is not None:
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        theirs(torch.tensor([tokens]))
    reference, truth = (
        run_trace(npllama.load(folder, backend=backend), tokens, prefill=PREFILL) for backend in ("numpy", "float64")
    )
    report = compare(trace, reference, truth)
    assert report.verdict == "match", report.reason
    assert {row.name for row in report.rows} >= seen
    assert not report.extra
