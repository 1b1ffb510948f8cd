"""The trace: written and read back, recorded from the engine, and held to its form when a stranger wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.check.run import run_trace, shadow_run
from npllama.check.trace import MemoryTrace, Trace, TraceWriter
from npllama.check.trace_format import TapEntry, in_forward_order
from npllama.errors import (
    DestinationExistsError,
    FileAccessError,
    ParameterError,
    TapError,
    TraceError,
    UnsafeFileError,
    VersionError,
)
from npllama.taps import tap_names
from tests.check.family_models import MODELS
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens

CONFIG = loud_config()
TOKENS = loud_tokens(CONFIG, 12).tolist()


def stranger(folder: Path, **changes: Any) -> Path:
    """Write the smallest trace, as the documentation tells strangers to; None leaves a key out."""
    folder.mkdir()
    np.save(folder / "logits.npy", np.zeros((3, 5), np.float32))
    document = {"tokens": [1, 2, 3], "prefill": 3, "taps": [{"name": "logits"}], **changes}
    (folder / "trace.json").write_text(json.dumps({key: x for key, x in document.items() if x is not None}))
    return folder


def same(a: Any, b: Any) -> bool:
    """Tell whether two traces hold the same tensors."""
    keys = [[(entry.name, entry.step, entry.shape, entry.dtype) for entry in trace.taps] for trace in (a, b)]
    return keys[0] == keys[1] and all(np.array_equal(a.read(n, s), b.read(n, s)) for n, s, _, _ in keys[0])


# --- recording ------------------------------------------------------------------------------------------------------


def test_a_trace_holds_every_tap_of_every_step_in_the_order_of_the_forward_pass() -> None:
    trace = run_trace(loud_model(CONFIG), TOKENS, prefill=9)
    names = tap_names(CONFIG)
    assert [(entry.step, entry.name) for entry in trace.taps] == [(step, name) for step in range(4) for name in names]
    assert (trace.tokens, trace.prefill, trace.steps, trace.dtype) == (TOKENS, 9, 3, "float32")
    assert trace.read("layers.1.scores", 2).shape == (CONFIG.n_heads, 1, 11)


def test_a_written_trace_reads_back_bit_for_bit(tmp_path: Path) -> None:
    model = loud_model(CONFIG)
    with TraceWriter(
        tmp_path / "t", producer="me", dtype="float32", tokens=TOKENS, prefill=10, config=CONFIG
    ) as writer:
        run_trace(model, TOKENS, prefill=10, into=writer)
        assert not (tmp_path / "t").exists()
        assert writer.finish() == tmp_path / "t"
    trace = Trace.open(tmp_path / "t")
    assert same(trace, run_trace(model, TOKENS, prefill=10))
    assert (trace.producer, trace.model["rope_layout"], trace.steps) == ("me", "interleaved", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert isinstance(trace.read("logits"), np.memmap)


def test_the_files_lie_where_the_format_says(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", producer="me", dtype="float64", tokens=[4, 5], prefill=1) as writer:
        for step in (0, 1):
            writer.add(step, "layers.0.q_rope", np.ones((1, 2, 4)))
        writer.finish()
    assert (tmp_path / "t" / "layers.0.q_rope.npy").is_file()
    assert np.load(tmp_path / "t" / "step-0001" / "layers.0.q_rope.npy").dtype == np.float64
    document = json.loads((tmp_path / "t" / "trace.json").read_text())
    assert document["taps"][0] == {
        "name": "layers.0.q_rope",
        "step": 0,
        "shape": [1, 2, 4],
        "dtype": "float64",
        "file": "layers.0.q_rope.npy",
    }
    assert {"format_version", "producer", "dtype", "tokens", "prefill", "steps", "model", "taps"} == set(document)


def test_greedy_steps_feed_the_most_probable_token() -> None:
    model = loud_model(CONFIG)
    trace = run_trace(model, TOKENS[:5], prefill=5, greedy=3)
    assert trace.steps == 3
    chosen = [int(trace.read("logits", step)[-1].argmax()) for step in range(3)]
    assert trace.tokens == TOKENS[:5] + chosen
    assert same(trace, run_trace(model, trace.tokens, prefill=5))


def test_a_chunked_prefill_looks_like_one_piece() -> None:
    model = loud_model(CONFIG, backend="float64")
    whole, chunked = (run_trace(model, TOKENS, prefill=11, chunk=chunk) for chunk in (None, 4))
    for entry in whole.taps:
        a, b = whole.read(entry.name, entry.step), chunked.read(entry.name, entry.step)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b), err_msg=entry.name)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11, err_msg=entry.name)


def test_a_pattern_records_only_what_it_matches() -> None:
    trace = run_trace(loud_model(CONFIG), TOKENS, prefill=12, pattern="*.q_rope")
    assert [entry.name for entry in trace.taps] == ["layers.0.q_rope", "layers.1.q_rope"]
    with pytest.raises(TapError, match="no tensor 'logits' of step 0"):
        trace.read("logits")


def test_nothing_to_prefill_is_refused() -> None:
    for prefill in (0, 13):
        with pytest.raises(ParameterError, match=f"a prefill of {prefill} tokens, expected 1 to 12"):
            run_trace(loud_model(CONFIG), TOKENS, prefill=prefill)


def test_a_failed_recording_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t", producer="me", dtype="float32", tokens=[1], prefill=1)
    writer.add(0, "logits", np.zeros((1, 2), np.float32))
    with pytest.raises(TraceError), writer:
        writer.add(0, "norm", np.zeros((1, 2), np.int32))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DestinationExistsError, match="it exists"):
        TraceWriter(tmp_path, producer="me", dtype="float32", tokens=[1], prefill=1)


def test_missing_steps_are_noticed_at_the_end(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", producer="me", dtype="float32", tokens=[1], prefill=1, steps=1) as writer:
        writer.add(0, "logits", np.zeros((1, 2), np.float32))
        with pytest.raises(TraceError, match="1 decode steps were announced"):
            writer.finish()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("../evil", np.zeros(1, np.float32), "cannot be a file name"),
        ("x", np.zeros(1, np.int64), "is int64"),
        ("logits", np.zeros(1, np.float32), "written twice"),
    ],
)
def test_what_no_trace_can_hold_is_refused(tmp_path: Path, name: str, array: Any, message: str) -> None:
    with TraceWriter(tmp_path / "t", producer="me", dtype="float32", tokens=[1], prefill=1) as writer:
        writer.add(0, "logits", np.zeros((1, 2), np.float32))
        with pytest.raises(TraceError, match=message):
            writer.add(0, name, array)


def test_a_folder_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError, match="cannot write"):
        TraceWriter(tmp_path / "file" / "t", producer="me", dtype="float32", tokens=[1], prefill=1)


# --- a stranger's trace ---------------------------------------------------------------------------------------------


def test_three_keys_are_enough(tmp_path: Path) -> None:
    trace = Trace.open(stranger(tmp_path / "t"))
    assert (trace.tokens, trace.steps, trace.dtype, trace.producer, dict(trace.model)) == (
        [1, 2, 3],
        0,
        "float32",
        "",
        {},
    )
    assert [(entry.name, entry.shape, entry.file) for entry in trace.taps] == [("logits", (3, 5), "logits.npy")]


def test_a_run_is_as_exact_as_its_least_exact_tensor(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "t", taps=[{"name": "logits"}, {"name": "norm"}])
    np.save(folder / "norm.npy", np.zeros((3, 2)))
    assert Trace.open(folder).dtype == "float32"
    np.save(folder / "logits.npy", np.zeros((3, 5)))
    assert Trace.open(folder).dtype == "float64"


DEFECTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tokens": ({"tokens": None}, TraceError, "tokens is missing"),
    "empty tokens": ({"tokens": []}, TraceError, "tokens is not that"),
    "a float token": ({"tokens": [1, 2.0, 3]}, TraceError, r"tokens\[1\] is 2.0"),
    "a boolean token": ({"tokens": [1, True, 3]}, TraceError, r"tokens\[1\] is True"),
    "a negative token": ({"tokens": [1, -2, 3]}, TraceError, r"tokens\[1\] is -2"),
    "no prefill": ({"prefill": None}, TraceError, "prefill is missing"),
    "too long a prefill": ({"prefill": 4}, TraceError, "prefill is 4, expected an integer from 1 to 3"),
    "steps that do not add up": ({"steps": 2}, TraceError, "tokens has 3 ids, expected 3 of the prefill and one for"),
    "no taps": ({"taps": []}, TraceError, "taps is missing or empty"),
    "a nameless tap": ({"taps": [{"step": 0}]}, TraceError, r"taps\[0\]\.name is None"),
    "a tap twice": ({"taps": [{"name": "logits"}] * 2}, TraceError, "logits of step 0 twice"),
    "a step too many": (
        {"taps": [{"name": "logits", "step": 1}]},
        TraceError,
        r"step is 1, expected an integer from 0",
    ),
    "another shape": (
        {"taps": [{"name": "logits", "shape": [3, 6]}]},
        TraceError,
        r"has shape \(3, 5\), .* says \(3, 6\)",
    ),
    "another dtype": ({"taps": [{"name": "logits", "dtype": "float64"}]}, TraceError, "is float32, .* says float64"),
    "an odd shape": ({"taps": [{"name": "logits", "shape": [3, -5]}]}, TraceError, "expected a list of integers"),
    "a missing file": ({"taps": [{"name": "norm"}]}, TraceError, "names this file, but it is missing"),
    "a path upwards": (
        {"taps": [{"name": "q", "file": "../logits.npy"}]},
        UnsafeFileError,
        "inside the trace's folder",
    ),
    "an absolute path": (
        {"taps": [{"name": "q", "file": "/etc/passwd"}]},
        UnsafeFileError,
        "inside the trace's folder",
    ),
    "a path of another system": (
        {"taps": [{"name": "q", "file": "a\\b"}]},
        UnsafeFileError,
        "inside the trace's folder",
    ),
    "a name that is a path": ({"taps": [{"name": "a/../../b"}]}, TraceError, "cannot be a file name"),
    "an unknown dtype": ({"dtype": "int4"}, TraceError, "dtype is 'int4', expected one of float16, bfloat16"),
    "an unknown layout": ({"model": {"rope_layout": "spiral"}}, TraceError, "rope_layout is 'spiral'"),
    "a model that is a list": ({"model": []}, TraceError, r"model is \[\]"),
    "a newer format": ({"format_version": 2}, VersionError, "trace format 2"),
    "a version of the wrong kind": ({"format_version": "1"}, TraceError, "format_version is '1'"),
    "a producer that is a number": ({"producer": 7}, TraceError, "producer is 7"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), DEFECTS.values(), ids=list(DEFECTS))
def test_a_wrong_trace_is_refused(tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    folder = stranger(tmp_path / "t", **changes)
    with pytest.raises(kind, match=message) as caught:
        Trace.open(folder)
    assert str(folder) in str(caught.value) or "file name" in message


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b'{"tokens": [1], "tokens": [2]}', b'{"prefill": NaN}', b"\xff", b"[" * 100_000]
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = stranger(tmp_path / "t")
    (folder / "trace.json").write_bytes(text)
    with pytest.raises(TraceError):
        Trace.open(folder)


def test_what_is_not_a_trace_at_all_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(FileAccessError, match="no such folder"):
        Trace.open(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"there is no trace\.json"):
        Trace.open(tmp_path)


def broken_arrays(good: bytes) -> dict[str, bytes]:
    """Return contents that are no .npy array of numbers."""
    import io
    import pickle

    archive, objects, words = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(archive, np.zeros(3))
    np.save(objects, np.array([{"a": 1}], object), allow_pickle=True)
    np.save(words, np.array(["a"]))
    return {
        "empty": b"",
        "truncated header": good[:20],
        "truncated data": good[:-4],
        "an archive": archive.getvalue(),
        "a pickle": pickle.dumps([1]),
        "objects": objects.getvalue(),
        "words": words.getvalue(),
        "a header that is code": good.replace(b"'fortran_order': False", b"'fortran_order': exit()"),
        "a huge shape": good.replace(b"(3, 5)", b"(3" + b"0" * 20 + b", 5)"),
    }


def test_a_file_that_is_no_array_of_numbers_is_refused(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "t")
    for what, content in broken_arrays((folder / "logits.npy").read_bytes()).items():
        (folder / "logits.npy").write_bytes(content)
        with pytest.raises(TraceError, match=r"logits\.npy"):
            pytest.fail(f"{what}: {Trace.open(folder)}")


def test_bfloat16_bits_are_refused_with_the_remedy(tmp_path: Path) -> None:
    import ml_dtypes

    folder = stranger(tmp_path / "t")
    np.save(folder / "logits.npy", np.zeros((3, 5), ml_dtypes.bfloat16))
    with pytest.raises(TraceError, match="Widen bfloat16 to float32"):
        Trace.open(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = stranger(tmp_path / "t")
    outside = tmp_path / "outside.npy"
    (folder / "logits.npy").rename(outside)
    (folder / "logits.npy").symlink_to(outside)
    with pytest.raises(TraceError, match="not a regular file inside"):
        Trace.open(folder)


# --- the shadow run -------------------------------------------------------------------------------------------------


def test_in_a_shadow_run_the_engine_errs_only_by_rounding_at_every_tap() -> None:
    reference = run_trace(loud_model(CONFIG, backend="float64"), TOKENS, prefill=9)
    local = shadow_run(loud_model(CONFIG), reference)
    assert set(local) == {(entry.name, entry.step) for entry in reference.taps}
    assert 0 < max(local.values()) < 1e-11


def test_a_shadow_run_blames_the_wrong_operation_alone() -> None:
    from types import SimpleNamespace

    from npllama import ops

    reference = run_trace(loud_model(CONFIG, backend="float64"), TOKENS, prefill=9)
    model = loud_model(CONFIG)
    model._ops = SimpleNamespace(**{**vars(ops), "glu": lambda gate, up, activation: gate * up})
    wrong = {key for key, error in shadow_run(model, reference).items() if error > 1e-6}
    assert wrong == {(f"layers.{i}.ffn_act", step) for i in range(2) for step in range(4)}


def test_a_reference_of_another_shape_cannot_be_shadowed() -> None:
    reference = MemoryTrace(tokens=TOKENS, prefill=12)
    reference.add(0, "layers.0.q", np.zeros((12, 64), np.float32))
    with pytest.raises(TraceError, match=r"layers\.0\.q of step 0 has shape \(12, 64\) in the reference"):
        shadow_run(loud_model(CONFIG), reference)


@pytest.mark.parametrize("model", MODELS)
def test_the_tensors_of_every_family_come_in_the_order_of_its_forward_pass(model: str) -> None:
    names = tap_names(MODELS[model])
    taps = [TapEntry(name, step, (1,), "float32") for step in (1, 0) for name in sorted(names)]
    found = [(tap.step, tap.name) for tap in in_forward_order(taps)]
    assert found == [(step, name) for step in (0, 1) for name in names]
