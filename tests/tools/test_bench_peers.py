"""The comparison with other engines: its arithmetic, its processes and its files, with engines that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.convert import convert
from npllama.loading import physical_cores
from tools import bench_peers
from tools.peers import engines, models, results
from tools.peers.engines import ENGINES, Engine, prepare
from tools.peers.machine import processor
from tools.peers.models import Shape
from tools.peers.process import Unavailable, Worker

TINY = Shape(dim=32, layers=2, heads=4, kv_heads=2, hidden=48, vocabulary=64, tied=True)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module that the workers share, imported as they import it."""
    monkeypatch.syspath_prepend(str(engines.WORKERS))
    monkeypatch.delitem(sys.modules, "serving", raising=False)
    import serving

    return serving


# --- the table ---------------------------------------------------------------------------------------------------


def measured() -> dict[str, Any]:
    """Return results of three rounds in which npllama is twice as fast, then as fast, then four times as fast."""
    rounds = [
        {
            "npllama-bf16": {"prefill": 100.0 * times, "decode": 10.0 * times, "read": 1000.0},
            "llama.cpp-bf16": {"prefill": 100.0, "decode": 10.0, "read": 500.0},
        }
        for times in (2, 1, 4)
    ]
    known = {"weight_bytes": 20, "position_bytes": 2, "version": "npllama 1", "logits": [1.0, 2.0, 4.0]}
    return {
        "machine": {"cpu": "A Processor", "threads": 2},
        "shape": "1b",
        "prompt": 8,
        "decode": 3,
        "engines": {
            "npllama-bf16": known,
            "llama.cpp-bf16": {**known, "version": "llama.cpp 2", "logits": [-1.0, -2.0, -4.0]},
            "torch-bf16": {"unavailable": "ModuleNotFoundError: No module named 'torch'"},
        },
        "rounds": rounds,
    }


def test_speeds_and_ratios_are_medians_over_the_rounds() -> None:
    own, peer, _ = results.rows(measured())
    assert (own.prefill, own.decode, own.prefill_ratio, own.decode_ratio) == (200, 20, 1, 1)
    assert (peer.prefill, peer.decode, peer.prefill_ratio, peer.decode_ratio) == (100, 10, 2, 2)


def test_a_ratio_is_of_speeds_in_the_same_round() -> None:
    found = measured()
    found["rounds"].append({"npllama-bf16": {"prefill": 1e6, "decode": 1e6, "read": 1000.0}})
    found["rounds"].append({"llama.cpp-bf16": {"prefill": 1e-6, "decode": 1e-6, "read": 1000.0}})
    assert results.rows(found)[1].decode_ratio == 2


def test_npllama_in_as_many_bits_is_what_an_engine_is_compared_with() -> None:
    found = measured()
    found["engines"]["llama.cpp-q8_0"] = found["engines"]["llama.cpp-bf16"]
    found["rounds"][0]["llama.cpp-q8_0"] = {"prefill": 1.0, "decode": 1.0, "read": 500.0}
    row = next(row for row in results.rows(found) if row.engine.key == "llama.cpp-q8_0")
    assert (row.decode, row.decode_ratio) == (1, None)


def test_what_is_rounded_is_compared_apart() -> None:
    found = measured()
    found["engines"]["npllama-bf16-rounded"] = found["engines"]["npllama-bf16"]
    for entry in found["rounds"]:
        entry["npllama-bf16-rounded"] = {"prefill": 500.0, "decode": 20.0, "read": 1000.0}
    peer = next(row for row in results.rows(found) if row.engine.name == "llama.cpp")
    assert (peer.prefill_ratio, peer.rounded_prefill_ratio, peer.rounded_decode_ratio) == (2, 5, 2)


def test_of_several_roundings_the_fastest_counts() -> None:
    found = measured()
    found["engines"] |= {key: {} for key in ("llama.cpp-q8_0", "npllama-int8-rounded", "npllama-int8-in-int8")}
    for entry in found["rounds"]:
        entry["llama.cpp-q8_0"] = {"prefill": 100.0, "decode": 10.0, "read": 1000.0}
        entry["npllama-int8-rounded"] = {"prefill": 300.0, "decode": 10.0, "read": 1000.0}
        entry["npllama-int8-in-int8"] = {"prefill": 200.0, "decode": 40.0, "read": 1000.0}
    peer = next(row for row in results.rows(found) if row.engine.key == "llama.cpp-q8_0")
    assert (peer.rounded_prefill_ratio, peer.rounded_decode_ratio) == (3, 4)


def test_the_share_of_bandwidth_counts_weights_and_cache_by_the_read_of_the_same_round() -> None:
    own, peer, _ = results.rows(measured())
    token = 20 + 2 * (8 + 2)  # the second of three decoded tokens stands at position 10
    assert own.share == pytest.approx(token * 20 / 1000)
    assert peer.share == pytest.approx(token * 10 / 500)


def test_logits_are_correlated_with_those_of_npllama() -> None:
    own, peer, missing = results.rows(measured())
    assert own.agreement == pytest.approx(1)
    assert peer.agreement == pytest.approx(-1)
    assert missing.agreement is None


def test_the_text_is_a_table_that_says_what_is_missing_and_why() -> None:
    text = results.as_text(measured()).splitlines()
    assert text[0] == "A Processor, 2 threads, reading memory at 0.0 GB/s; 1b, 8 tokens of prompt, 3 rounds"
    assert text[4] == "| npllama | bf16 | 200 |  |  | 20.0 |  |  | 80% | 1.0000 |"
    assert text[5] == "| llama.cpp | BF16 | 100 | 2.00 x |  | 10.0 | 2.00 x |  | 80% | -1.0000 |"
    assert text[6] == ("| torch | bf16 | not available: ModuleNotFoundError: No module named 'torch' | | | | | | | |")
    assert text[-2:] == ["- npllama 1", "- llama.cpp 2"]
    assert {line.count("|") for line in text[2:7]} == {11}


def test_the_json_holds_the_table_and_what_it_was_made_of() -> None:
    found = json.loads(json.dumps(results.as_json(measured())))
    assert found["bandwidth"] == 750
    assert found["table"][1]["prefill_ratio"] == 2
    assert found["table"][2]["unavailable"].startswith("ModuleNotFoundError")
    assert len(found["rounds"]) == 3
    assert "logits" not in found["engines"]["npllama-bf16"]


def test_rounds_of_several_sittings_add_up() -> None:
    later = measured()
    later["engines"] = {"torch-bf16": {"version": "torch 3", "weight_bytes": 1, "position_bytes": 1}}
    later["rounds"] = [{"torch-bf16": {"prefill": 1.0, "decode": 1.0, "read": 1.0}}]
    both = results.merged(measured(), later)
    assert len(both["rounds"]) == 4
    assert [row.unavailable for row in results.rows(both)] == [None, None, None]


@pytest.mark.parametrize("name", ["machine", "shape", "prompt", "decode"])
def test_rounds_of_different_things_do_not(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        results.merged(measured(), {**measured(), name: "other"})


# --- the processes -----------------------------------------------------------------------------------------------


class FakeEngine:
    """An engine that notes what it is fed; a prompt takes a second, a token a quarter."""

    version, vocab_size, weight_bytes, position_bytes = "fake", 50, 1, 1

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.now = 0.0

    def start(self, capacity: int) -> None:
        self.calls.append("start")

    def feed(self, tokens: list[int]) -> None:
        self.calls.append(len(tokens))
        self.now += 1.0 if len(tokens) > 1 else 0.25


def test_an_engine_is_warmed_up_and_then_timed_phase_by_phase(serving: ModuleType) -> None:
    engine = FakeEngine()
    found = serving.measure(engine, 10, 4, 60.0, lambda: engine.now)
    assert engine.calls == ["start", 10, 1, 1, "start", 10, 1, 1, 1, 1]
    assert found == {"prefill": 10, "decode": 4}


def test_a_slow_engine_decodes_until_its_time_is_up(serving: ModuleType) -> None:
    engine = FakeEngine()
    found = serving.measure(engine, 10, 400, 0.5, lambda: engine.now)
    assert engine.calls[-4:] == ["start", 10, 1, 1]
    assert found["decode"] == 4


def test_every_engine_gets_the_same_tokens(serving: ModuleType) -> None:
    tokens = serving.random_tokens(100, 50)
    assert tokens == serving.random_tokens(200, 50)[:100]
    assert set(tokens) <= set(range(50))


def worker(tmp_path: Path, script: str, **options: Any) -> Worker:
    """Start a worker of these lines."""
    return Worker([sys.executable, "-c", script], {"threads": 1}, tmp_path / "log", **options)


TALKATIVE = f"""
import sys
sys.path.insert(0, {str(engines.WORKERS)!r})
from serving import serve
print("a library says hello")
serve(lambda settings: (settings, lambda order: print("noise") or {{"twice": 2 * order["number"]}}))
"""


def test_a_worker_says_what_it_loaded_and_answers_orders_whatever_its_libraries_print(tmp_path: Path) -> None:
    quiet = worker(tmp_path, TALKATIVE.replace('print("a library says hello")', ""))
    assert quiet.greeting == {"threads": 1}
    assert [quiet.ask({"number": number})["twice"] for number in (1, 2)] == [2, 4]
    quiet.close()
    assert "noise" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise SystemExit(3)", "the process ended with code 3"),
        ("import sys; sys.stderr.write('ValueError: no\\nsee above\\n'); sys.exit(1)", "ValueError: no"),
    ],
)
def test_a_worker_that_dies_says_why(tmp_path: Path, script: str, why: str) -> None:
    with pytest.raises(Unavailable, match=why):
        worker(tmp_path, script)


def test_a_worker_that_hangs_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no answer within 0\.2 s"):
        worker(tmp_path, "import time; time.sleep(3600)", timeout=0.2)


def test_a_worker_that_dies_later_is_noticed_at_the_next_order(tmp_path: Path) -> None:
    dying = worker(tmp_path, "print('{}', flush=True); input(); raise MemoryError('too large')")
    with pytest.raises(Unavailable, match="MemoryError: too large"):
        dying.ask({})
    dying.close()


def test_the_engines_take_turns_at_being_first() -> None:
    three = list(ENGINES.values())[:3]
    assert [bench_peers.turn(three, number)[0] for number in range(4)] == [*three, three[0]]
    assert set(bench_peers.turn(three, 2)) == set(three)
    assert bench_peers.turn([], 1) == []


FAKE_ENGINE = """
import sys
sys.path.insert(0, {workers!r})
from serving import serve
serve(lambda s: (dict(version="f", weight_bytes=1, position_bytes=1, logits=[1, 2, 3]),
                 lambda order: dict({answer})))
"""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Put fake workers in the place of the engines', and files in the place of their models; return the work folder."""
    for name, answer in (("npllama", "prefill=4, decode=2"), ("torch", "prefill=2, decode=1"), ("memory", "read=50")):
        script = FAKE_ENGINE.format(workers=str(engines.WORKERS), answer=answer)
        (tmp_path / f"{name}_worker.py").write_text(script)
    (tmp_path / "llamacpp_worker.py").write_text("raise OSError('no such library')")
    monkeypatch.setattr(bench_peers, "WORKERS", tmp_path)

    def prepared(file: str, *rest: Any) -> Path:
        if "int8" in file:
            raise Unavailable("cannot be made")
        return tmp_path

    monkeypatch.setattr(bench_peers, "prepare", prepared)
    (tmp_path / "smollm2").mkdir()
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Call the command."""
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *(str(argument) for argument in arguments)])
    return bench_peers.main()


@pytest.mark.parametrize("lifetime", [[], ["--respawn"]])
def test_the_command_measures_all_that_can_be_had_and_adds_to_what_it_has(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lifetime: list[str]
) -> None:
    chosen = ("--work", made_up, "--engines", "*-bf16,npllama-int8", "--rounds", "2", *lifetime)
    assert run(monkeypatch, *chosen, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    table = {(row["engine"], row["format"]): row for row in found["table"]}
    assert table["torch", "bf16"]["decode_ratio"] == 2
    assert table["npllama", "int8"]["unavailable"] == "cannot be made"
    assert table["llama.cpp", "BF16"]["unavailable"] == "OSError: no such library"
    assert run(monkeypatch, *chosen) == 0
    assert "4 rounds" in capsys.readouterr().out
    assert run(monkeypatch, *chosen, "--fresh") == 0
    assert "2 rounds" in capsys.readouterr().out


def test_preparing_measures_nothing(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--work", made_up, "--prepare") == 0
    assert capsys.readouterr().out == ""


# --- the model and its files -------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a small shape known; return its name."""
    monkeypatch.setitem(models.SHAPES, "tiny", TINY)
    return "tiny"


def test_the_files_hold_one_model(tiny: str, tmp_path: Path) -> None:
    models.write_hf(tiny, TINY, tmp_path / "hf")
    models.write_gguf(tiny, TINY, tmp_path / "model.gguf")
    stores = [convert(tmp_path / source, tmp_path / f"store-{source}") for source in ("hf", "model.gguf")]
    names = sorted(file.name for file in (stores[0] / "weights").iterdir())
    assert names == sorted(file.name for file in (stores[1] / "weights").iterdir())
    for name in names:
        first, second = (np.load(store / "weights" / name) for store in stores)
        np.testing.assert_array_equal(first, second, err_msg=name)


def test_no_weight_is_a_denormal_and_rows_have_a_length_of_about_one(tiny: str) -> None:
    for weight, values in models.numbers(tiny, TINY):
        wide = values.astype(np.float32)
        assert (np.abs(wide) >= np.finfo(np.float32).tiny).all()
        if len(weight.shape) == 2:
            assert np.square(wide).sum(axis=1).mean() == pytest.approx(1, rel=0.2)


def test_an_embedding_that_is_not_the_output_matrix_is_not_read() -> None:
    untied = Shape(dim=32, layers=1, heads=4, kv_heads=2, hidden=48, vocabulary=64, tied=False)
    total = sum(int(np.prod(weight.shape)) for weight in models.weights(untied))
    assert models.unread_share(untied) == 64 * 32 / total
    assert models.unread_share(TINY) == 0


def test_each_file_is_made_once_by_its_maker(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def ran(command: list[str], log: Path) -> None:
        commands.append(command)
        target = next(Path(part) for part in command if "unfinished" in part)
        target.write_text("made")

    monkeypatch.setattr(engines, "run", ran)
    python = {"npllama": "own", "llamacpp": "theirs", "openvino": "theirs"}
    for file in ("Q4_K_M.gguf", "npllama-int4", "openvino-8", "npllama-int4"):
        assert prepare(file, tiny, tmp_path, python, 2) == tmp_path / file
    assert [command[0] for command in commands] == ["theirs", "own", "theirs"]
    assert commands[0][-2:] == ["Q4_K_M", "2"]
    assert commands[1][-2:] == ["--dtype", "int4"]
    assert commands[2][-1] == "8"
    assert (tmp_path / "BF16.gguf").is_file()
    assert (tmp_path / "hf" / "config.json").is_file()


def test_a_maker_that_fails_leaves_nothing_and_says_why(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'RuntimeError: no' >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(Unavailable, match=r"^RuntimeError: no$"):
        prepare("openvino-8", tiny, tmp_path / "work", {"openvino": str(script)}, 1)
    assert not (tmp_path / "work" / "openvino-8").exists()


def test_every_engine_has_a_worker_and_a_key_of_its_own() -> None:
    assert len(ENGINES) == len({(engine.name, engine.format) for engine in ENGINES.values()})
    for key, engine in ENGINES.items():
        assert isinstance(engine, Engine)
        assert key == engine.key
        assert (engines.WORKERS / f"{engine.worker}_worker.py").is_file()


# --- the machine -------------------------------------------------------------------------------------------------


def test_the_processor_is_named_with_the_instructions_that_matter(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n")
    assert processor(info) == "A Processor with AVX2, BF16, AMX-BF16"
    assert processor(tmp_path / "missing")


def test_two_threads_of_a_core_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert physical_cores(tmp_path) == 4
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings)
    assert physical_cores(tmp_path) == 2


def test_the_command_explains_itself() -> None:
    done = subprocess.run([sys.executable, bench_peers.__file__, "--help"], capture_output=True, text=True, check=True)
    assert "--llamacpp PYTHON" in done.stdout
