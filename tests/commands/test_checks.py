"""The commands that check: trace, compare and verify, end to end on a small real store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from npllama.check.golden import FOLDER
from npllama.check.trace import Trace
from npllama.checkpoint.store import Store
from npllama.taps import tap_names

IDS = "5,80,17,203,41,9,120,66,31,7"


@pytest.fixture(scope="module")
def traces(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a trace of each backend: eight tokens and two steps that are fed."""
    from npllama.cli import main

    folder = tmp_path_factory.mktemp("traces")
    for backend in ("fast", "numpy", "float64"):
        line = ["trace", store, "-o", folder / backend, "--tokens", IDS, "--decode", 2, "--teacher-force"]
        assert main([str(part) for part in [*line, "--backend", backend]]) == 0
    return {backend: folder / backend for backend in ("fast", "numpy", "float64")}


@pytest.fixture
def wrong(traces: dict[str, Path], tmp_path: Path) -> Path:
    """Return a copy of the fast trace in which w1 and w3 of layer 1 are swapped from there on."""
    folder = shutil.copytree(traces["fast"], tmp_path / "wrong")
    for part in (folder, folder / "step-0001", folder / "step-0002"):
        gate, up = part / "layers.1.gate.npy", part / "layers.1.up.npy"
        gate.rename(part / "aside.npy")
        up.rename(gate)
        (part / "aside.npy").rename(up)
    return folder


# --- trace ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_traced_and_continued_greedily(npllama: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    run = npllama("trace", store, "abc", "-o", tmp_path / "t", "--decode", 2, "--backend", "numpy")
    assert (run.code, run.out) == (0, f"{tmp_path / 't'}\n")
    trace = Trace.open(tmp_path / "t")
    assert (trace.prefill, trace.steps, len(trace.tokens)) == (3, 2, 5)
    assert trace.tokens[3] == trace.read("logits")[-1].argmax()
    assert [entry.name for entry in trace.taps if entry.step == 2] == tap_names(Store.open(store).config)
    assert trace.producer.startswith("npllama ")
    assert trace.model["config"]["dim"] == 64


def test_token_ids_can_be_fed_one_by_one(traces: dict[str, Path]) -> None:
    trace = Trace.open(traces["float64"])
    assert (trace.tokens, trace.prefill, trace.steps) == ([int(x) for x in IDS.split(",")], 8, 2)
    assert trace.dtype == "float64"
    assert trace.read("logits", 2).dtype == np.float64


def test_only_the_taps_that_are_asked_for_are_written(npllama: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    assert npllama("trace", store, "-o", tmp_path / "t", "--tokens", "1,2", "--taps", "*.q_rope").code == 0
    assert {entry.name for entry in Trace.open(tmp_path / "t").taps} == {"layers.0.q_rope", "layers.1.q_rope"}
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "layers.0.q_rope.npy", "layers.1.q_rope.npy", "trace.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to run"),
        (["abc", "--tokens", "1,2"], "a PROMPT and --tokens were given"),
        (["--tokens", "1,2", "--teacher-force"], "the last 0 are to be fed"),
        (["--tokens", "1,2", "--teacher-force", "--decode", 2], "2 tokens, of which the last 2 are to be fed"),
        (["--tokens", "1,999"], "token 999 at index 1"),
    ],
)
def test_a_trace_of_nothing_sensible_is_a_usage_error(
    npllama: Callable[..., Any], store: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    run = npllama("trace", store, *options, "-o", tmp_path / "t")
    assert run.code == 2
    assert message in run.err
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_without_a_tap_is_bad_input_and_leaves_nothing(
    npllama: Callable[..., Any], store: Path, tmp_path: Path
) -> None:
    run = npllama("trace", store, "-o", tmp_path / "t", "--tokens", "1", "--taps", "layers.9.*")
    assert (run.code, list(tmp_path.iterdir())) == (3, [])
    assert "matches no tap" in run.err


# --- compare --------------------------------------------------------------------------------------------------------


def test_backends_match_with_a_truth_and_without(npllama: Callable[..., Any], traces: dict[str, Path]) -> None:
    for truth in (["--truth", traces["float64"]], []):
        run = npllama("compare", traces["fast"], traces["numpy"], *truth)
        assert run.code == 0
        assert "MATCH: Everything agrees" in run.out
        assert run.err == ""


def test_json_is_one_object_and_tells_the_verdict(
    npllama: Callable[..., Any], traces: dict[str, Path], wrong: Path
) -> None:
    run = npllama("compare", wrong, traces["numpy"], "--truth", traces["float64"], "--json")
    found = run.json
    assert run.code == 1
    assert (found["verdict"], found["first_divergence"], found["step"]) == ("differs", "layers.1.gate", 0)
    assert (found["diagnosis"], found["margin"]) == (None, None)
    assert [tap["name"] for tap in found["taps"] if tap["verdict"] != "match"] == ["layers.1.gate", "layers.1.up"] * 3


def test_a_comparison_that_cannot_tell_leaves_with_seven(
    npllama: Callable[..., Any], traces: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    npllama("trace", store, "-o", tmp_path / "t", "--tokens", IDS)
    run = npllama("compare", tmp_path / "t", traces["numpy"])
    assert run.code == 7
    assert run.out.startswith("CANNOT TELL: The candidate's prefill has 10 tokens")


def test_reports_are_written(npllama: Callable[..., Any], traces: dict[str, Path], wrong: Path, tmp_path: Path) -> None:
    page, junit = tmp_path / "report.html", tmp_path / "report.xml"
    run = npllama("compare", wrong, traces["numpy"], "--html", page, "--junit", junit)
    assert run.code == 1
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert int(ET.parse(junit).getroot().attrib["failures"]) > 1
    run = npllama("compare", wrong, traces["numpy"], "--html", tmp_path / "nowhere" / "x.html")
    assert run.code == 5
    assert "cannot write" in run.err


def test_a_diagnosis_names_the_mistake_and_the_model_gives_the_truth(
    npllama: Callable[..., Any], traces: dict[str, Path], store: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(store, tmp_path / "other")
    names = [other / "weights" / f"layers.1.feed_forward.{w}.weight.npy" for w in ("w1", "w3")]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)
    npllama("trace", other, "-o", tmp_path / "t", "--tokens", IDS, "--decode", 2, "--teacher-force")
    run = npllama("compare", tmp_path / "t", traces["numpy"], "--diagnose", store, "--json")
    found = run.json
    assert (run.code, found["first_divergence"]) == (1, "layers.1.gate")
    assert found["measured"]
    assert found["diagnosis_text"]
    assert any("given to --diagnose" in note for note in found["notes"])


@pytest.mark.parametrize("backend", ["fast", "numpy"])
def test_runs_in_int8_are_compared_with_their_like_and_a_truth(
    npllama: Callable[..., Any], traces: dict[str, Path], store: Path, tmp_path: Path, backend: str
) -> None:
    arguments = ("--tokens", IDS, "--decode", 2, "--teacher-force", "--activations", "int8")
    for name in (backend, "reference"):
        assert npllama("trace", store, "-o", tmp_path / name, *arguments, "--backend", backend).code == 0
    assert Trace.open(tmp_path / backend).dtype == "int8"
    mine, theirs, truth = tmp_path / backend, tmp_path / "reference", ("--truth", traces["float64"])
    assert npllama("compare", mine, theirs, *truth, "--json").json["verdict"] == "match"
    assert npllama("compare", mine, theirs, "--diagnose", store, "--json").json["verdict"] == "match"
    for others, remedy in (((mine, theirs), "--truth"), ((mine, traces["numpy"], *truth), "same --activations")):
        run = npllama("compare", *others)
        assert (run.code, run.out, remedy in run.err) == (3, "", True)


def test_what_is_no_trace_is_bad_input(npllama: Callable[..., Any], traces: dict[str, Path], store: Path) -> None:
    run = npllama("compare", traces["fast"], store)
    assert (run.code, run.out) == (3, "")
    assert "TraceError" in run.err
    assert npllama("compare", "/nonexistent", store).code == 5


# --- verify ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(npllama: Callable[..., Any], store: Path, tmp_path: Path) -> Path:
    """Return a copy of the store with a recorded run beside its weights."""
    folder = shutil.copytree(store, tmp_path / "recorded")
    run = npllama("verify", folder, "--record")
    assert run.code == 0
    assert "recorded run replayed" in run.out
    return folder


@pytest.mark.parametrize("backend", ["fast", "numpy"])
def test_a_recorded_run_is_replayed(npllama: Callable[..., Any], recorded: Path, backend: str) -> None:
    run = npllama("verify", recorded, "--backend", backend, "--json")
    assert run.code == 0
    found = run.json
    assert found["ok"]
    assert (found["replay"]["verdict"], found["replay"]["taps"]) == ("match", (3 + 4 * 2) * 3)


def test_a_recorded_run_is_not_replayed_where_int8_would_hide_damage(
    npllama: Callable[..., Any], recorded: Path
) -> None:
    run = npllama("verify", recorded, "--activations", "int8")
    assert (run.code, run.out) == (2, "")
    assert "Leave --activations away" in run.err


def test_without_a_recorded_run_only_the_bytes_are_checked(npllama: Callable[..., Any], store: Path) -> None:
    run = npllama("verify", store, "--json")
    assert (run.code, run.json["ok"], run.json["replay"]) == (0, True, None)
    assert "no recorded run to replay; --record makes one" in npllama("verify", store).out


def test_conversion_records_a_run_when_asked(npllama: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    assert npllama("convert", checkpoint, tmp_path / "m", "--golden").code == 0
    assert npllama("verify", tmp_path / "m", "--json").json["replay"]["verdict"] == "match"


def test_an_installation_that_computes_wrongly_fails(
    npllama: Callable[..., Any], recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npllama import kernels

    monkeypatch.setattr(kernels, "glu", lambda gate, up, activation: gate * up)
    run = npllama("verify", recorded, "--json")
    assert run.code == 1
    found = run.json
    assert not found["ok"]
    assert (found["replay"]["verdict"], found["replay"]["first_divergence"]) == ("differs", "layers.0.resid_post")


def test_a_recording_of_other_weights_or_with_damage_is_named(
    npllama: Callable[..., Any], recorded: Path, checkpoint: Path, tmp_path: Path
) -> None:
    npllama("convert", checkpoint, tmp_path / "bf16")
    shutil.copytree(recorded / FOLDER, tmp_path / "bf16" / FOLDER)
    run = npllama("verify", tmp_path / "bf16")
    assert run.code == 3
    assert "the recorded run belongs to other weights" in run.err

    file = recorded / FOLDER / "truth" / "norm.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    run = npllama("verify", recorded, "--json")
    assert (run.code, run.json["problems"][0]["error"]) == (3, "TraceError")
    assert "norm.npy: the SHA-256 is not the one in golden.json" in run.err

    file.unlink()
    assert "missing or unexpected files: truth/norm.npy" in npllama("verify", recorded).err
    (recorded / FOLDER / "golden.json").write_text(json.dumps({"format_version": 2}))
    assert "golden format 2" in npllama("verify", recorded).err
    (recorded / FOLDER / "golden.json").write_text("{}")
    assert "not what it must be" in npllama("verify", recorded).err
    assert npllama("verify", recorded, "--record").code == 0
