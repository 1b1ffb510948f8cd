"""`python -m oracle check`: sound engines pass, whatever breaks one is seen, and the report says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from npllama import ops
from npllama.check.diagnose import Diagnosis
from npllama.engine import Model
from npllama.kernels import UNMATERIALISED
from npllama.taps import tap_names
from oracle.__main__ import main
from tests.fixtures.loud import loud_config, loud_tokens
from tests.oracle.sources import FAMILIES, OPTIONS, loud_store, prefill_of

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

CONFIG = loud_config()
TOKENS = ",".join(map(str, loud_tokens(CONFIG, 64)))
DECODED = 2


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {dtype: loud_store(tmp_path_factory.mktemp(dtype), CONFIG, dtype) for dtype in ("f32", "bf16")}


def run(capsys: pytest.CaptureFixture[str], store: Path, *options: object, decode: int = DECODED) -> tuple[int, Any]:
    """Run the command; return its exit code and what it printed as JSON."""
    arguments = ["check", store, "--json", "--decode", decode, *options]
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, json.loads(output.out) if output.out else output.err


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_sound_engine_matches_at_every_tap_of_every_step(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], backend: str, dtype: str
) -> None:
    code, report = run(capsys, stores[dtype], "--tokens", TOKENS, "--backend", backend)
    assert (code, report["verdict"], report["first_divergence"], report["diagnosis"]) == (0, "match", None, None)
    fused = UNMATERIALISED if backend == "fast" else set()
    assert [(tap["name"], tap["step"]) for tap in report["taps"]] == [
        (name, step)
        for step in range(DECODED + 1)
        for name in tap_names(CONFIG)
        if name.rpartition(".")[2] not in fused
    ]
    assert {tap["verdict"] for tap in report["taps"]} == {"match"}
    assert report["measured"] is True
    assert all(tap["local_db"] is None or tap["local_db"] < -120 for tap in report["taps"])  # None: not one bit off


def test_the_taps_that_may_be_missing_are_those_that_the_kernels_declare() -> None:
    from oracle.check import FUSED

    assert {"fast": UNMATERIALISED, "numpy": frozenset()} == FUSED


def test_a_mistake_in_the_textbook_is_seen_though_the_engine_s_own_truth_shares_it(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    glu = ops.glu
    monkeypatch.setattr(ops, "glu", lambda gate, up, activation: glu(gate, up, activation) * 1.00001)
    code, report = run(capsys, stores["f32"], "--tokens", TOKENS, "--backend", "numpy")
    assert (code, report["verdict"]) == (1, "differs")
    assert (report["first_divergence"], report["step"]) == ("layers.0.ffn_act", 0)
    origins = {tap["name"]: tap["origin"] for tap in report["taps"] if tap["step"] == 0}
    assert origins["layers.0.ffn_act"] == "local"
    assert origins["layers.0.ffn_out"] == "inherited"
    assert report["diagnosis"] is None
    assert "npllama/ops.py" in report["diagnosis_text"]


def test_a_known_mistake_in_one_backend_is_named(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from npllama import kernels

    norm = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, weight, eps: norm(x, weight, eps / 10))
    code, report = run(capsys, stores["f32"], "--tokens", TOKENS, "--backend", "fast")
    assert (code, report["verdict"]) == (1, "differs")
    assert report["first_divergence"] == "layers.0.attention_norm"
    assert report["diagnosis"] is not None
    assert "eps" in report["diagnosis"]
    assert report["margin"] > 10


def test_a_mistake_that_decoding_alone_makes_is_seen_at_its_step(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = ops.rope_tables
    monkeypatch.setattr(ops, "rope_tables", lambda freqs, start, *rest: tables(freqs, max(0, start - 1), *rest))
    code, report = run(capsys, stores["f32"], "--tokens", TOKENS, "--backend", "numpy")
    assert (code, report["first_divergence"], report["step"]) == (1, "layers.0.q_rope", 1)


def test_a_tap_that_the_engine_no_longer_shows_is_a_difference(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = ops.attention
    monkeypatch.setattr(
        ops,
        "attention",
        lambda q, keys, values, tap, **settings: attention(
            q, keys, values, lambda name, x: x if name == "probs" else tap(name, x), **settings
        ),
    )
    code, report = run(capsys, stores["f32"], "--tokens", TOKENS, "--backend", "numpy")
    assert (code, report["verdict"], report["first_divergence"]) == (1, "differs", "layers.0.probs")
    assert "The engine shows no layers.0.probs, and 5 other tensors are missing" in report["reason"]


def test_with_bfloat16_the_engine_is_allowed_the_noise_of_meta_s_roundings(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--tokens", TOKENS, "--backend", "numpy")
    _, strict = run(capsys, stores["bf16"], *arguments)
    code, loose = run(capsys, stores["bf16"], *arguments, "--dtype", "bfloat16")
    assert (code, loose["verdict"], loose["measured"]) == (0, "match", True)
    assert "the engine computed in float32 and was allowed the noise of bfloat16" in loose["notes"]
    noise = {tap["name"]: tap["noise_db"] for tap in strict["taps"] if tap["step"] == 0}
    looser = {tap["name"]: tap["noise_db"] for tap in loose["taps"] if tap["step"] == 0}
    assert looser["logits"] > noise["logits"] + 60


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_an_engine_that_rounds_is_measured_by_a_reference_that_rounds(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    rounding = ("--tokens", TOKENS, "--backend", backend, "--activations", "bfloat16")
    code, report = run(capsys, stores["bf16"], *rounding)
    assert (code, report["verdict"], report["measured"]) == (0, "match", True)
    assert "the engine computed with products of bfloat16 and was allowed the noise of bfloat16" in report["notes"]
    code, message = run(capsys, stores["bf16"], *rounding, "--dtype", "float32")
    assert (code, "Leave --dtype away" in message) == (2, True)


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_an_engine_that_rounds_to_int8_is_held_to_float32_in_each_operation(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], backend: str, dtype: str
) -> None:
    rounding = ("--tokens", TOKENS, "--backend", backend, "--activations", "int8")
    code, report = run(capsys, stores[dtype], *rounding)
    assert (code, report["verdict"], report["measured"]) == (0, "match", True)
    assert "alone, on torch's inputs, that of float32" in report["notes"][-1]
    assert all(tap["local_db"] is None or tap["local_db"] < -115 for tap in report["taps"])
    assert max(tap["noise_db"] for tap in report["taps"] if tap["noise_db"] is not None) > -40
    code, message = run(capsys, stores[dtype], *rounding, "--dtype", "bfloat16")
    assert (code, "Leave --dtype away" in message) == (2, True)


def test_what_the_noise_of_int8_hides_is_seen_in_the_operation_alone_and_named(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from npllama import kernels

    norm = kernels.rms_norm
    monkeypatch.setattr(kernels, "rms_norm", lambda x, weight, eps: norm(x, weight, eps / 10))
    code, report = run(capsys, stores["f32"], "--tokens", TOKENS, "--backend", "fast", "--activations", "int8")
    assert (code, report["verdict"]) == (1, "differs")
    assert report["first_divergence"] == "layers.0.attention_norm"
    assert max(tap["ratio"] for tap in report["taps"]) < 100
    assert "by its own doing" in report["reason"]
    assert (report["diagnosis"], report["margin"] > 10) == ("norm-eps", True)


@pytest.mark.parametrize(("group", "tap"), [(32, "layers.0.q"), (128, "layers.0.ffn_out")])
def test_other_groups_than_the_declared_ones_are_a_difference(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, group: int, tap: str
) -> None:
    monkeypatch.setattr("npllama.rounding.GROUP", group)
    code, report = run(capsys, stores["f32"], "--tokens", TOKENS, "--backend", "numpy", "--activations", "int8")
    assert (code, report["verdict"], report["first_divergence"]) == (1, "differs", tap)
    assert "round to the same integers" in report["reason"]


def test_the_report_is_also_a_page_and_a_junit_file(
    stores: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "report.html", tmp_path / "report.xml"
    code, _ = run(capsys, stores["f32"], "--tokens", "1,2,3", "--html", files[0], "--junit", files[1], decode=0)
    assert code == 0
    assert files[0].read_text(encoding="utf-8").startswith("<!doctype html>")
    suite = ElementTree.parse(files[1]).getroot()
    assert (suite.attrib["failures"], suite.attrib["errors"]) == ("0", "0")
    assert len(suite) > len(tap_names(CONFIG)) - 5


def test_without_json_a_table_and_the_verdict_are_printed(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(stores["f32"]), "--tokens", "1,2,3", "--backend", "numpy"]) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].split()[:3] == ["tap", "step", "shape"]
    assert lines[1].split()[:3] == ["tok_embeddings", "0", "3x64"]
    assert any(line.startswith("MATCH: ") for line in lines)
    assert "oracle: torch in float64, the truth" in output.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 3, "TokenizerError"),
        (["--tokens", "999"], 2, "ParameterError: token 999 at index 0"),
        (["--tokens", "1", "--threads", "100000"], 2, "ParameterError: 100000 threads were asked for"),
        (["--tokens", "1", "--html", "/nowhere/report.html"], 5, "FileNotFoundError"),
    ],
)
def test_what_cannot_be_checked_ends_with_a_message_and_its_exit_code(
    stores: dict[str, Path], capsys: pytest.CaptureFixture[str], options: list[str], code: int, message: str
) -> None:
    found, text = run(capsys, stores["f32"], *options, "--backend", "numpy", decode=0)
    assert (found, message in str(text)) == (code, True)
    assert "Traceback" not in str(text)


# --- every family ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    models = {**FAMILIES, **OPTIONS}
    return {name: loud_store(tmp_path_factory.mktemp("family"), config) for name, config in models.items()}


def tokens_of(name: str) -> str:
    config = {**FAMILIES, **OPTIONS}[name]
    return ",".join(map(str, loud_tokens(config, prefill_of(config))))


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize("name", [*FAMILIES, *OPTIONS])
def test_a_sound_engine_matches_in_every_family(
    family_stores: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str, backend: str
) -> None:
    config = {**FAMILIES, **OPTIONS}[name]
    code, report = run(capsys, family_stores[name], "--tokens", tokens_of(name), "--backend", backend, decode=3)
    assert (code, report["verdict"], report["first_divergence"]) == (0, "match", None)
    fused = UNMATERIALISED if backend == "fast" else set()
    compared = {tap["name"] for tap in report["taps"] if tap["step"] == 3}
    assert compared == {tap for tap in tap_names(config) if tap.rpartition(".")[2] not in fused}


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize("name", [*FAMILIES, *OPTIONS])
def test_a_sound_engine_that_rounds_to_int8_is_sound_in_every_family(
    family_stores: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str, backend: str
) -> None:
    arguments = ("--tokens", tokens_of(name), "--backend", backend, "--activations", "int8")
    code, report = run(capsys, family_stores[name], *arguments, decode=3)
    assert (code, report["verdict"], report["first_divergence"]) == (0, "match", None)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_a_quantised_model_is_checked_as_the_numbers_that_it_stands_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, dtype: str
) -> None:
    store = loud_store(tmp_path, FAMILIES[name], dtype)
    code, report = run(capsys, store, "--tokens", tokens_of(name), "--backend", "numpy")
    assert (code, report["verdict"]) == (0, "match")
    assert all(tap["local_db"] is None or tap["local_db"] < -120 for tap in report["taps"])


def wider_window(operation: Any) -> Any:
    return lambda *arguments, divisor, window: operation(*arguments, divisor=divisor, window=window and window + 1)


def no_bias(operation: Any) -> Any:
    return lambda x, weights, biases=(): operation(x, weights)


def not_renormalised(operation: Any) -> Any:
    return lambda probs, n_active, renormalise: operation(probs, n_active, False)


def one_expert_for_another(operation: Any) -> Any:
    return lambda x, chosen, stack, n_experts: operation(x, chosen[:, ::-1], stack, n_experts)


def no_bias_behind_the_norm(operation: Any) -> Any:
    return lambda x, weight, bias, eps: operation(x, weight, bias, eps) - bias.numbers()


def exact_gelu(operation: Any) -> Any:
    return lambda x, activation: operation(x, "gelu")


def norm_over_all_heads(operation: Any) -> Any:
    def norm(x: Any, weight: Any, eps: float) -> Any:
        if weight.shape == (64,):
            return operation(x, weight, eps)
        return operation(x, weight, eps) * np.sqrt(np.square(x).mean(-1, keepdims=True) / np.square(x).mean())

    return norm


def unscaled_turns(operation: Any) -> Any:
    return lambda freqs, start, count, scale=1.0: operation(freqs, start, count)


@pytest.mark.parametrize(
    ("name", "operation", "mistake", "tap"),
    [
        ("mistral with a window", "attention", wider_window, "layers.0.scores"),
        ("qwen2 with a window in one layer", "attention", wider_window, "layers.1.scores"),
        ("qwen2", "linears", no_bias, "layers.0.q"),
        ("qwen3", "rms_norm", norm_over_all_heads, "layers.0.q_norm"),
        ("phi3 with longrope", "rope_tables", unscaled_turns, "layers.0.q_rope"),
        ("mixtral", "route", not_renormalised, "layers.0.router_weights"),
        ("qwen3_moe", "expert_linear", one_expert_for_another, "layers.0.expert_gate"),
        ("gpt2", "layer_norm", no_bias_behind_the_norm, "layers.0.attention_norm"),
        ("openai-gpt", "activate", exact_gelu, "layers.0.ffn_act"),
    ],
)
def test_a_mistake_that_only_a_family_can_make_is_seen_where_it_is_made(
    family_stores: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    operation: str,
    mistake: Any,
    tap: str,
) -> None:
    monkeypatch.setattr(ops, operation, mistake(getattr(ops, operation)))
    monkeypatch.setattr("oracle.check.diagnose", lambda *arguments: Diagnosis("no match", None, None, "", None, "", ()))
    code, report = run(capsys, family_stores[name], "--tokens", tokens_of(name), "--backend", "numpy", decode=1)
    assert (code, report["verdict"]) == (1, "differs")
    assert (report["first_divergence"], report["step"]) == (tap, 0)
    origins = {entry["name"]: entry["origin"] for entry in report["taps"] if entry["step"] == 0}
    assert origins[tap] != "inherited"


def test_a_cache_that_stays_short_when_a_longrope_text_has_become_long_is_seen_at_that_step(
    family_stores: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "phi3 with longrope"
    monkeypatch.setattr(Model, "_recompute_if_outgrown", lambda *arguments: None)
    monkeypatch.setattr("oracle.check.diagnose", lambda *arguments: Diagnosis("no match", None, None, "", None, "", ()))
    arguments = ("--tokens", tokens_of(name), "--backend", "numpy")
    assert run(capsys, family_stores[name], *arguments, decode=2)[0] == 0
    code, report = run(capsys, family_stores[name], *arguments, decode=3)
    assert (code, report["first_divergence"], report["step"]) == (1, "layers.0.scores", 3)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_a_trained_model_matches_in_every_layer(
    smollm2_stores: dict[str, Path], capsys: pytest.CaptureFixture[str], backend: str, dtype: str
) -> None:
    prompt = "The capital of France is Paris; that of Italy is Rome, and that of"
    code, report = run(capsys, smollm2_stores[dtype], "--prompt", prompt, "--backend", backend, decode=1)
    assert (code, report["verdict"], report["measured"]) == (0, "match", True)
    assert len(report["taps"]) == 2 * (3 + 30 * (17 if backend == "numpy" else 15))
    assert report["logits"]["same_top1"] == report["logits"]["positions"] == 17


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_a_trained_model_that_rounds_to_int8_matches_in_every_layer(
    smollm2_stores: dict[str, Path], capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    prompt = "The capital of France is Paris; that of Italy is Rome, and that of"
    rounding = ("--prompt", prompt, "--backend", backend, "--activations", "int8")
    code, report = run(capsys, smollm2_stores["bf16"], *rounding, decode=1)
    assert (code, report["verdict"], report["measured"]) == (0, "match", True)
    assert all(tap["local_db"] is None or tap["local_db"] < -110 for tap in report["taps"])
