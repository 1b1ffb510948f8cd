"""Every family, from a checkpoint that transformers saved, against transformers in float64, tap by tap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import npllama
from npllama.check.compare import compare
from npllama.check.report import Report
from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace
from npllama.checkpoint.store import Store
from npllama.kernels import UNMATERIALISED
from npllama.taps import tap_names
from tests.families.cases import CASES, Case

pytestmark = pytest.mark.torch

#: One model of each family is stored in every dtype, the others in the one that hides least.
PLAIN = list({case.family: name for name, case in reversed(CASES.items())}.values())
every_model = pytest.mark.parametrize("saved", CASES, indirect=True)
every_store = pytest.mark.parametrize(
    ("saved", "dtype"),
    [(name, "f32") for name in CASES] + [(name, dtype) for name in PLAIN for dtype in ("bf16", "int8", "int4")],
    indirect=["saved"],
)


@dataclass(slots=True)
class Saved:
    """A model of transformers, in memory and as the checkpoint that it saved."""

    case: Case
    model: Any
    folder: Path
    tokens: list[int]
    stores: dict[str, Path] = field(default_factory=dict)
    traces: dict[str, tuple[MemoryTrace, MemoryTrace]] = field(default_factory=dict)

    def store(self, dtype: str) -> Path:
        """Return the converted checkpoint; the reference rounds its weights without measuring what they multiply."""
        if dtype not in self.stores:
            with mock.patch("npllama.checkpoint.convert.importance", return_value={}):
                self.stores[dtype] = npllama.convert(self.folder, self.folder / f"store-{dtype}", dtype=dtype)
        return self.stores[dtype]

    def truth(self, dtype: str) -> tuple[MemoryTrace, MemoryTrace]:
        """Return transformers' traces in float32 and in float64, with the weights that a store of ``dtype`` has."""
        from tests.families import transformers_models as theirs

        if dtype not in self.traces:
            store = Store.open(self.store(dtype))
            model = theirs.rounded(self.model, dtype)
            run = (self.case.family, store.config, self.tokens, self.case.prompt)
            theirs.use_frequencies(model, *store.frequencies())
            single = theirs.trace(model, *run)
            model = model.double()
            with theirs.lifted(model):
                double = theirs.trace(model, *run)
            self.traces[dtype] = single, double
        return self.traces[dtype]


@pytest.fixture(scope="module")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.families import transformers_models as theirs

    case = CASES[request.param]
    model = theirs.build(case.family, case.settings)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder, max_shard_size=case.shard)
    assert (folder / "model.safetensors.index.json").exists() == (case.shard != "1GB")
    rng = np.random.default_rng(0)
    return Saved(case, model, folder, rng.integers(0, model.config.vocab_size, case.prompt + case.steps).tolist())


def explained(report: Report) -> str:
    """Say what is wrong, for a failed assertion."""
    odd = [f"{row.name} step {row.step}: {row.verdict} x{row.ratio} {row.finding}" for row in report.rows
           if row.verdict != "match"]  # fmt: skip
    return "\n".join([report.reason, *odd[:12]])


def last(name: str) -> str:
    """Return a tap's name without its layer, or its step."""
    return name.partition("@")[0].rpartition(".")[2]


@every_model
def test_transformers_shows_every_tap_but_those_inside_its_functions(saved: Saved) -> None:
    from tests.families.transformers_models import UNSEEN

    hidden = UNSEEN | ({"probs"} if saved.case.family == "OpenAIGPT" else set())
    reference, _ = saved.truth("f32")
    seen = {entry.name for entry in reference.taps}
    every = tap_names(Store.open(saved.store("f32")).config)
    assert {last(name) for name in {*every} - seen} <= hidden
    assert seen <= {*every}


@every_model
def test_frequencies_and_their_factor_are_those_of_transformers(saved: Saved) -> None:
    from tests.families.transformers_models import rope_of

    store = Store.open(saved.store("f32"))
    theirs = rope_of(saved.model)
    if theirs is None:
        assert store.frequencies() == (None, None)
        return
    short, long = store.frequencies()
    scaling = store.config.rope_scaling
    np.testing.assert_allclose(short, theirs.short, rtol=4e-7)
    assert (long is None) == (theirs.long is None)
    if long is not None:
        np.testing.assert_allclose(long, theirs.long, rtol=4e-7)
    assert (1.0 if scaling is None else scaling.attention_factor) == pytest.approx(theirs.factor, rel=1e-12)


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@every_store
def test_every_tap_that_transformers_shows_is_right(saved: Saved, dtype: str, backend: str) -> None:
    reference, truth = saved.truth(dtype)
    model = npllama.load(saved.store(dtype), backend=backend)
    mine = run_trace(model, saved.tokens, prefill=saved.case.prompt)
    report = compare(mine, reference, truth)
    if dtype == "int4":  # its sums cancel against those of the minima: up to five times the error of a plain product
        assert report.verdict != "differs", explained(report)
    else:
        assert report.verdict == "match", explained(report)
    fused = UNMATERIALISED if backend == "fast" else frozenset()
    assert {last(name) for name in report.missing} <= fused
