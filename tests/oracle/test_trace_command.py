"""`python -m oracle trace`: what it writes, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllama
from npllama.check.trace import Trace
from npllama.taps import tap_names
from oracle.__main__ import main
from tests.fixtures.loud import loud_config
from tests.oracle.sources import FAMILIES, loud_store

pytestmark = pytest.mark.torch
pytest.importorskip("torch")

CONFIG = loud_config()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return loud_store(tmp_path_factory.mktemp("oracle"), CONFIG)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_tokens_and_greedy_steps_become_a_trace_of_every_tap(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "trace"
    assert run("trace", store, "-o", folder, "--tokens", "1,2,3,4", "--decode", 2) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    trace = Trace.open(folder)
    assert (trace.tokens[:4], trace.prefill, trace.steps) == ([1, 2, 3, 4], 4, 2)
    assert (trace.dtype, trace.producer, trace.model["rope_layout"]) == ("float32", "oracle", "interleaved")
    assert [(tap.name, tap.step) for tap in trace.taps] == [
        (name, step) for step in range(3) for name in tap_names(CONFIG)
    ]
    logits = npllama.load(store, backend="numpy").forward(trace.tokens[:5])
    assert trace.tokens[4:] == [int(logits[3].argmax()), int(logits[4].argmax())]
    np.testing.assert_allclose(trace.read("logits", 1), logits[4:], atol=1e-4)


def test_teacher_forcing_feeds_the_last_tokens_one_by_one(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    assert run("trace", store, "-o", folder, "--tokens", "1,2,3,4,5", "--decode", 2, "--teacher-force") == 0
    trace = Trace.open(folder)
    assert (trace.tokens, trace.prefill, trace.steps) == ([1, 2, 3, 4, 5], 3, 2)
    assert trace.read("layers.1.scores", 2).shape == (CONFIG.n_heads, 1, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_trace_says_what_was_computed_in_and_holds_numbers_that_numpy_has(
    store: Path, tmp_path: Path, dtype: str
) -> None:
    assert run("trace", store, "-o", tmp_path / dtype, "--tokens", "7", "--dtype", dtype) == 0
    trace = Trace.open(tmp_path / dtype)
    assert trace.dtype == dtype
    assert {tap.dtype for tap in trace.taps} == {"float64" if dtype == "float64" else "float32"}


def test_a_third_opinion_writes_traces_too(store: Path, tmp_path: Path) -> None:
    arguments = ("trace", store, "--tokens", "1,2,3", "-o")
    assert run(*arguments, tmp_path / "theirs", "--by", "transformers") == 0
    assert run(*arguments, tmp_path / "ours") == 0
    theirs, ours = Trace.open(tmp_path / "theirs"), Trace.open(tmp_path / "ours")
    assert theirs.producer == "transformers"
    np.testing.assert_allclose(theirs.read("logits"), ours.read("logits"), atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_moe"])
def test_a_trace_of_any_family_lists_its_taps_in_the_order_of_the_pass(tmp_path: Path, name: str) -> None:
    store = loud_store(tmp_path, FAMILIES[name])
    assert run("trace", store, "-o", tmp_path / "trace", "--tokens", "1,2,3", "--decode", 1) == 0
    names = tap_names(FAMILIES[name])
    found = [(tap.name, tap.step) for tap in Trace.open(tmp_path / "trace").taps]
    assert found == [(name, step) for step in range(2) for name in names]


@pytest.mark.real
def test_meta_s_reference_writes_traces_too(store: Path, tmp_path: Path, meta_model: None) -> None:
    assert run("trace", store, "--tokens", "1,2,3", "--decode", 1, "-o", tmp_path / "meta", "--by", "meta") == 0
    assert Trace.open(tmp_path / "meta").steps == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--tokens", "1,300"], 2, "ParameterError: token 300 at index 1 is not an id from 0 to 255"),
        (["a text"], 3, "TokenizerError: STORE: the model has no tokenizer. Give token ids: --tokens 1,2,3."),
        ([], 2, "ParameterError: nothing to run. Give a PROMPT or --tokens."),
        (["--tokens", "1,2", "--teacher-force"], 2, "2 tokens, of which the last 0 are to be fed one by one"),
        (["--tokens", "1,2", "--teacher-force", "--decode", "2"], 2, "the last 2 are to be fed one by one"),
        (["--tokens", "1", "--decode", "8192"], 3, "ContextOverflowError: 1 tokens and 8192 decode steps"),
        (["--tokens", "1", "--by", "meta", "--dtype", "float64"], 4, "UnsupportedError: Meta's reference lowers"),
    ],
)
def test_what_cannot_be_run_ends_with_a_typed_error_and_writes_nothing(
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if "meta" in arguments:
        pytest.importorskip("fairscale")
    assert run("trace", store, *arguments, "-o", tmp_path / "trace") == code
    output = capsys.readouterr()
    assert message.replace("STORE", str(store)) in output.err
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trace", tmp_path, "-o", tmp_path / "trace", "--tokens", "1") == 3
    assert "NotACheckpointError" in capsys.readouterr().err


def test_an_existing_trace_is_not_overwritten(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious").write_text("")
    assert run("trace", store, "-o", tmp_path, "--tokens", "1") == 2
    assert "DestinationExistsError" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_without_torch_the_command_says_how_to_get_it(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("trace", store, "-o", tmp_path / "trace", "--tokens", "1") == 4
    assert "the oracle needs torch. Install it: `pip install -e .[oracle]`." in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["trace"], ["check"], ["trace", "m", "-o", "t", "--tokens", "1;2"], ["x"]])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: python -m oracle" in capsys.readouterr().err


def test_a_prompt_is_tokenised_by_the_model_s_own_tokenizer(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tokenizer:
        @staticmethod
        def from_path(path: Any) -> Any:
            return Tokenizer()

        def encode(self, text: str) -> list[int]:
            return list(text.encode())

    monkeypatch.setattr("npllama.Tokenizer", Tokenizer, raising=False)
    monkeypatch.setattr("npllama.checkpoint.store.Store.tokenizer_folder", property(lambda store: store.path))
    assert run("trace", store, "Hi", "-o", tmp_path / "trace") == 0
    assert Trace.open(tmp_path / "trace").tokens == [72, 105]
