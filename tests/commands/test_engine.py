"""What commands that run a model share: nobody waits for kernels to be told of a mistake."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from npllama.checkpoint.convert import convert
from npllama.engine import Model

Npllama = Callable[..., Any]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of what happens from now on: kernels are compiled, tokens are computed."""
    pytest.importorskip("numba")
    from npllama.kernels import warmup

    found: list[str] = []
    forward = Model.forward
    monkeypatch.setattr(warmup, "compile_kernels", lambda needs, progress: found.append("compiled"))
    monkeypatch.setattr(Model, "forward", lambda *a, **options: found.append("ran") or forward(*a, **options))
    return found


@pytest.fixture
def without_tokenizer(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    shutil.copytree(checkpoint, folder, ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    return convert(folder, tmp_path / "store", dtype="f32")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "STORE", "a text"),
        ("generate", "STORE", "--batch", "FILE"),
        ("chat", "STORE"),
        ("trace", "STORE", "a text", "-o", "OUT"),
        ("perplexity", "STORE", "FILE"),
    ],
    ids=" ".join,
)
def test_a_model_without_a_tokenizer_is_told_before_anything_is_compiled(
    command: tuple[str, ...], without_tokenizer: Path, tmp_path: Path, npllama: Npllama, events: list[str]
) -> None:
    (tmp_path / "text").write_text("one line\n" * 10)
    places = {"STORE": without_tokenizer, "FILE": tmp_path / "text", "OUT": tmp_path / "trace"}
    done = npllama(*(places.get(word, word) for word in command))
    assert (done.code, events) == (3, [])
    assert "this model has no tokenizer" in done.err


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("generate", "STORE", "a text", "--temperature", "-1"), 2),
        (("chat", "STORE", "--temperature", "-1"), 2),
        (("chat", "STORE", "--top-k", "1000000"), 2),
        (("chat", "STORE", "--lookup", "-1"), 2),
        (("perplexity", "STORE", "FILE", "--context", "3"), 2),
        (("trace", "STORE", "--tokens", "1,999", "-o", "OUT"), 2),
        (("trace", "STORE", "--tokens", "1,2", "--taps", "nothing", "-o", "OUT"), 3),
        (("trace", "STORE", "--tokens", "1,2", "--teacher-force", "--decode", "2", "-o", "OUT"), 2),
    ],
)
def test_a_setting_out_of_its_range_is_told_before_anything_is_compiled(
    command: tuple[str, ...], code: int, store: Path, tmp_path: Path, npllama: Npllama, events: list[str]
) -> None:
    (tmp_path / "text").write_text("one line\n" * 10)
    places = {"STORE": store, "FILE": tmp_path / "text", "OUT": tmp_path / "trace"}
    assert npllama(*(places.get(word, word) for word in command)).code == code
    assert events == []


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "STORE", "a text", "-n", "2"),
        ("generate", "STORE", "--batch", "FILE", "-n", "2", "--lanes", "1"),
        ("trace", "STORE", "--tokens", "1,2", "-o", "OUT"),
        ("perplexity", "STORE", "FILE"),
    ],
    ids=" ".join,
)
def test_kernels_are_compiled_once_before_the_first_token(
    command: tuple[str, ...], store: Path, tmp_path: Path, npllama: Npllama, events: list[str]
) -> None:
    (tmp_path / "text").write_text("one line\n")
    places = {"STORE": store, "FILE": tmp_path / "text", "OUT": tmp_path / "trace"}
    assert npllama(*(places.get(word, word) for word in command)).code == 0
    assert events[0] == "compiled"
    assert set(events[1:]) <= {"ran"}


def test_chat_looks_at_its_settings_without_a_cache_for_them(
    store: Path, npllama: Npllama, typed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("")
    capacities: list[int] = []
    new_cache = Model.new_cache
    monkeypatch.setattr(Model, "new_cache", lambda self, n: capacities.append(n) or new_cache(self, n))
    assert npllama("chat", store, "-n", "1000", "--context", "16").code == 0
    assert capacities == [16]
