"""Routers at a near-tie: another choice is neither a difference nor a match, and excuses nothing else."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from npllama.check.compare import compare
from npllama.check.diagnose import diagnose
from npllama.check.report import Report
from npllama.check.run import run_trace
from npllama.check.ties import Tie, touched
from npllama.check.trace import TraceLike
from npllama.dtypes import Array
from tests.check.cases import record, tokens_of
from tests.check.family_models import MODELS
from tests.check.planted import PLANTED
from tests.check.runs import edited
from tests.check.wrong_engine import Build, build
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import LOUD_TOKENS

CONFIG = MODELS["mixtral"]


@cache
def tied() -> Build:
    """Return a model in which experts 1 and 2 are equally probable for every token, and answer differently."""

    def change(name: str, x: Array) -> Array:
        return x[[0, 1, 1, 3]] if "router" in name else x

    return build(CONFIG).with_tensors(change)


def nudged(b: Build) -> Build:
    """Return an engine whose routers round otherwise: the logit of expert 2 is some units in the last place larger."""
    nudge = np.array([1, 1, 1 + 3e-7, 1], np.float32)

    def linear(x: Array, weight: Any, bias: Any = None) -> Array:
        y: Array = b.base.linear(x, weight, bias)
        return y * nudge if weight.shape[0] == len(nudge) else y

    return b.with_ops(linear=linear)


@cache
def right(backend: str) -> TraceLike:
    model = loud_model(CONFIG, backend=backend, tensors=tied().tensors)
    return run_trace(model, tokens_of(CONFIG), prefill=LOUD_TOKENS)


def judged(candidate: TraceLike) -> Report:
    return compare(candidate, right("numpy"), right("float64"))


def test_another_choice_within_the_noise_is_no_difference_and_no_match() -> None:
    candidate = record(nudged(tied()).model(), CONFIG)
    chosen = [trace.read("layers.0.router_weights") > 0 for trace in (candidate, right("float64"))]
    assert (chosen[0] != chosen[1]).any()
    report = judged(candidate)
    assert (report.verdict, report.first_divergence) == ("cannot tell", None)
    assert "equally probable, as far as rounding shows" in report.reason
    assert any("where a router's margin is within the noise" in note for note in report.notes)
    verdicts = {row.name: row.verdict for row in report.rows if row.step == 0}
    assert verdicts["layers.0.router_probs"] == "match"
    assert verdicts["layers.0.router_weights"] == verdicts["layers.0.ffn_out"] == verdicts["logits"] == "cannot tell"


def test_so_it_is_where_the_candidate_does_not_say_whom_it_asked() -> None:
    candidate = record(nudged(tied()).model(), CONFIG)
    silent = edited(candidate, rename=lambda name: None if "router" in name or "expert" in name else name)
    assert judged(silent).verdict == "cannot tell"


def test_a_sound_run_of_the_same_model_matches() -> None:
    assert judged(record(tied().model(), CONFIG)).verdict == "match"


@pytest.mark.parametrize(
    ("mistake", "first"),
    [
        (("experts-active", "one too few"), "layers.0.router_weights"),
        (("wrong-activation", "ReLU"), "layers.0.expert_act"),
        (("residual-missing", "feed-forward"), "layers.0.resid_post"),
    ],
)
def test_a_mistake_beside_it_is_a_difference_all_the_same(mistake: tuple[str, str], first: str) -> None:
    report = judged(record(PLANTED[mistake](nudged(tied())).model(), CONFIG))
    assert (report.verdict, report.first_divergence) == ("differs", first)


def test_the_diagnosis_follows_the_choice_of_the_candidate() -> None:
    truth = loud_model(CONFIG, backend="float64", tensors=tied().tensors)
    assert diagnose(truth, record(nudged(tied()).model(), CONFIG)).sentence.startswith("Every operation")
    wrong = record(PLANTED["silu-of-up", ""](nudged(tied())).model(), CONFIG)
    assert diagnose(truth, wrong).name == "silu-of-up"


def test_a_choice_touches_its_own_token_and_behind_its_layer_those_that_attend_to_it() -> None:
    ties = (Tie(layer=1, step=0, row=2),)

    def rows(name: str, step: int = 0, count: int = 4) -> list[int]:
        return np.flatnonzero(touched(ties, name, step, count)).tolist()

    assert [rows(name) for name in ("embeddings", "layers.0.resid_post", "layers.1.q", "layers.1.router_probs")] == [
        [] for _ in range(4)
    ]
    assert rows("layers.1.router_weights") == rows("layers.1.resid_post") == [2]
    assert rows("layers.2.attention_norm") == rows("logits") == [2, 3]
    assert rows("layers.1.resid_post", step=1, count=1) == []
    assert rows("layers.2.scores", step=1, count=1) == rows("logits", step=1, count=1) == [0]
