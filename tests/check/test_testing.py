"""Somebody else's model, checked in their own test suite: as documented, run as documented."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.check.run import run_trace
from npllama.check.testing import assert_taps_close
from npllama.check.trace import MemoryTrace, TraceWriter
from npllama.errors import ParameterError
from tests.check.runs import CONFIG, PREFILL, TOKENS, engine_trace
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_tensors
from tools.environment import ROOT

PROMPT = TOKENS[:PREFILL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a reference trace on disk, as another machine may have written it."""
    path = tmp_path_factory.mktemp("reference") / "trace"
    with TraceWriter(
        path, producer="npllama", dtype="float32", tokens=PROMPT, prefill=PREFILL, config=CONFIG
    ) as writer:
        run_trace(loud_model(CONFIG), PROMPT, prefill=PREFILL, into=writer)
        return writer.finish()


def somebodys_model(tokens: list[int], **changes: Any) -> dict[str, Any]:
    """Stand for a model of another program: its logits and residual stream, in names of its own framework."""
    trace = run_trace(loud_model(dataclasses.replace(CONFIG, **changes), backend="fast"), tokens, prefill=len(tokens))
    names = {"model.embed_tokens": "tok_embeddings", "model.layers.0": "layers.0.resid_post",
             "model.layers.1": "layers.1.resid_post", "lm_head": "logits"}  # fmt: skip
    return {theirs: trace.read(ours)[None] for theirs, ours in names.items()}


def test_a_callable_is_given_the_references_tokens(folder: Path) -> None:
    report = assert_taps_close(somebodys_model, folder)
    assert {row.name for row in report.rows} == {
        "tok_embeddings", "layers.0.resid_post", "layers.1.resid_post", "logits",
    }  # fmt: skip


def test_a_mapping_a_trace_and_a_folder_are_candidates_too(folder: Path) -> None:
    model = loud_model(CONFIG, backend="float64")
    for candidate in (somebodys_model(PROMPT), run_trace(loud_model(CONFIG), PROMPT, prefill=PREFILL), folder):
        assert assert_taps_close(candidate, folder, truth=model).measured


def test_a_model_is_a_reference_and_runs_the_given_tokens() -> None:
    assert_taps_close(somebodys_model(PROMPT), loud_model(CONFIG), tokens=PROMPT)
    with pytest.raises(ParameterError, match="there are no tokens to run"):
        assert_taps_close(somebodys_model(PROMPT), loud_model(CONFIG))


def test_decode_steps_go_by_name_and_step() -> None:
    reference = engine_trace()
    fast = engine_trace(backend="fast")
    tensors: dict[str | tuple[str, int], Any] = {("logits", step): fast.read("logits", step) for step in (0, 1, 2)}
    report = assert_taps_close(tensors, reference)
    assert [(row.name, row.step) for row in report.rows] == [("logits", 0), ("logits", 1), ("logits", 2)]


def test_a_difference_fails_with_the_first_tensor_in_the_message(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"DIFFERS: The first difference is at layers\.0\.resid_post") as caught:
        assert_taps_close(lambda tokens: somebodys_model(tokens, norm_eps=1e-6), folder)
    assert "verdict" in str(caught.value)
    assert "tok_embeddings " not in str(caught.value)


def test_not_being_able_to_tell_is_no_success(folder: Path) -> None:
    with pytest.raises(AssertionError, match="CANNOT TELL: The traces have no tap in common"):
        assert_taps_close({"something": np.zeros(3)}, folder)


def test_a_model_of_a_coarser_dtype_says_so(folder: Path) -> None:
    import ml_dtypes

    coarse = {name: x.astype(ml_dtypes.bfloat16) for name, x in somebodys_model(PROMPT).items()}
    assert_taps_close(coarse, folder, dtype="bfloat16")
    with pytest.raises(AssertionError, match="DIFFERS"):
        assert_taps_close(coarse, folder)


@pytest.mark.torch
def test_torch_tensors_are_read_as_they_are(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.fixtures.reference import transformers_llama

    model = transformers_llama(CONFIG, loud_tensors(CONFIG))
    output = model(torch.tensor([PROMPT]), output_hidden_states=True)
    assert output.logits.requires_grad
    tensors = {"lm_head": output.logits, "model.layers.0": output.hidden_states[1]}
    assert_taps_close(tensors, folder)
    bfloat16 = {name: x.to(torch.bfloat16) for name, x in tensors.items()}
    assert_taps_close(bfloat16, folder, dtype="bfloat16")


EXAMPLE = """
import numpy as np

def my_llama(tokens):
    return {"logits": np.load("logits.npy")}

def test_my_llama(assert_taps_close):
    assert_taps_close(my_llama, "reference")
"""


@pytest.mark.parametrize(("change", "outcome"), [({}, "1 passed"), ({"norm_eps": 1e-6}, "1 failed")])
def test_the_example_runs_in_a_suite_of_its_own(
    folder: Path, tmp_path: Path, change: dict[str, Any], outcome: str
) -> None:
    (tmp_path / "reference").symlink_to(folder)
    (tmp_path / "test_mine.py").write_text(EXAMPLE)
    np.save(tmp_path / "logits.npy", somebodys_model(PROMPT, **change)["lm_head"][0])
    # Not installed here, so the plugin is named; its entry point does that where it is.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "npllama.check.pytest_plugin", "-p", "no:cacheprovider"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome in done.stdout, done.stdout + done.stderr
    assert ("DIFFERS: The first difference is at logits" in done.stdout) == bool(change)


def test_the_entry_point_names_the_plugin() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.entry-points.pytest11]\nnpllama = "npllama.check.pytest_plugin"' in text


def test_a_trace_that_says_nothing_of_itself_is_a_strangers() -> None:
    from npllama.check.noise import is_foreign
    from npllama.check.testing import _candidate

    candidate = _candidate(somebodys_model(PROMPT), engine_trace(), "float32", "interleaved", "")
    assert isinstance(candidate, MemoryTrace)
    assert is_foreign(candidate)
