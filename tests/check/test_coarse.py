"""Runs in int8: what is refused, what the noise must not excuse, and what an operation alone decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from npllama.check import coarse, noise
from npllama.check.compare import compare
from npllama.check.run import shadow_run
from npllama.check.trace import MemoryTrace, TraceLike
from npllama.errors import TraceError
from tests.check.cases import candidate, traces, wrong_model
from tests.check.family_models import MODELS
from tests.check.runs import edited
from tests.fixtures.loud import loud_config

CONFIG = loud_config()
#: Errors grow in it until they are as large as the tensors.
CHAOTIC = loud_config(n_layers=12, dim=32, n_heads=2, n_kv_heads=1, hidden_dim=48, vocab_size=64)


@pytest.fixture(scope="module")
def truth() -> TraceLike:
    return traces(CONFIG, "float32", "int8")[0]


@pytest.fixture(scope="module")
def reference() -> TraceLike:
    return traces(CONFIG, "float32", "int8")[1]


@pytest.fixture(scope="module")
def fast() -> TraceLike:
    return candidate([], CONFIG, backend="fast", rounds_to="int8")


def test_both_backends_match_and_the_noise_is_measured(fast: Any, reference: Any, truth: Any) -> None:
    report = compare(fast, reference, truth)
    assert (report.verdict, report.measured) == ("match", True)
    assert any("smaller than the noise of int8" in note for note in report.notes)
    noisy = {row.name: row.noise_db for row in report.rows if row.step == 0 and row.noise_db is not None}
    assert -45 < noisy["layers.0.q"] < -25
    assert noisy["logits"] < -10


def test_without_a_truth_or_a_reference_that_rounds_alike_nothing_is_said(
    fast: Any, reference: Any, truth: Any
) -> None:
    plain = traces(CONFIG, "float32")[1]
    bfloat16 = edited(plain, dtype="bfloat16")
    for other in (plain, bfloat16, truth):
        for pair in ((fast, other), (other, fast)):
            with pytest.raises(TraceError, match=r"measured by a run that rounds alike.*same --activations"):
                compare(*pair, truth)
    for nothing in (None, plain):
        with pytest.raises(TraceError, match=r"no truth in float64 to measure that by.*--truth"):
            compare(fast, reference, nothing)


def test_a_tensor_that_is_off_by_half_is_no_match_however_large_the_noise(truth: Any) -> None:
    """The reference is as far off as the candidate, so the noise explains everything."""

    def off(part: float) -> MemoryTrace:
        def larger(x: Any) -> Any:
            return (truth.read("logits") * (1 + part)).astype(np.float32)

        return edited(traces(CONFIG, "float32", "int8")[1], {("logits", 0): larger})

    assert compare(off(0.3), off(0.3), truth).verdict == "match"
    report = compare(off(0.6), off(0.6), truth)
    assert report.verdict == "cannot tell"
    assert "logits of step 0 is not clearly right: off by half of its length" in report.reason


def test_a_chaotic_model_is_told_by_its_operations_alone() -> None:
    truth, reference = traces(CHAOTIC, "float32", "int8")
    clean = candidate([], CHAOTIC, backend="fast", rounds_to="int8")
    assert max(row.noise_db or -99.0 for row in compare(clean, reference, truth).rows) > -3
    local = shadow_run(wrong_model([], CHAOTIC, backend="fast", rounds_to="int8"), reference)
    assert compare(clean, reference, truth, local=local).verdict == "match"
    eps = [("norm-eps", "1e-06")]
    wrong = candidate(eps, CHAOTIC, rounds_to="int8")
    local = shadow_run(wrong_model(eps, CHAOTIC, rounds_to="int8"), reference)
    report = compare(wrong, reference, truth, local=local)
    assert (report.verdict, report.first_divergence) == ("differs", "layers.0.attention_norm")
    assert "by its own doing" in report.reason


def test_an_operation_alone_is_held_to_the_noise_of_float32() -> None:
    one = noise.typical("tok_embeddings", "float32", 0)
    errors, sizes = np.zeros(3), np.ones(3)
    found = [coarse.judge("match", errors, sizes, x * one)[0] for x in (0, 99, 101, 9_900, 10_100)]
    assert found == ["match", "match", "cannot tell", "cannot tell", "differs"]
    assert coarse.judge("differs", errors, sizes, 0.0)[0] == "differs"
    assert coarse.judge("cannot tell", errors, sizes, 0.0) == ("cannot tell", "")
    assert noise.local_limit("int8", "int8") == noise.local_limit("float32") < noise.local_limit("bfloat16")


def test_a_reference_that_departs_from_the_truth_is_not_trusted(fast: Any, reference: Any, truth: Any) -> None:
    worse = edited(reference, {("layers.0.q", 0): lambda x: x * np.float32(3)})
    report = compare(worse, worse, truth)
    assert (report.verdict, report.first_divergence) == ("differs", "layers.0.q")
    assert any("reference itself departs from the truth" in note for note in report.notes)


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_no_alarm_on_clean_models(backend: str) -> None:
    shape = {"dim": 32, "hidden_dim": 64, "head_dim": 8, "vocab_size": 64, "n_layers": 2}
    configs = [loud_config(**shape, n_kv_heads=n, norm_eps=eps) for n in (1, 2, 4) for eps in (1e-5, 1e-6)]
    for config in configs:
        truth, reference = traces(config, "float32", "int8")
        clean = candidate([], config, backend=backend, rounds_to="int8")
        assert compare(clean, reference, truth).verdict != "differs"
        local = shadow_run(wrong_model([], config, backend=backend, rounds_to="int8"), reference)
        assert compare(clean, reference, truth, local=local).verdict == "match"


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe"])
def test_a_near_tie_of_experts_is_no_difference(model: str) -> None:
    config = MODELS[model]
    truth, reference = traces(config, "float32", "int8")
    assert compare(candidate([], config, backend="fast", rounds_to="int8"), reference, truth).verdict != "differs"
