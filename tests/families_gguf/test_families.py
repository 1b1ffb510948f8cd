from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import npllama
from npllama.checkpoint.gguf.checkpoint import open_gguf_checkpoint
from npllama.dtypes import Array
from npllama.errors import ConfigMismatchError
from tests.families_gguf.files import write_gguf
from tests.families_gguf.models import MIXTRAL, MODELS

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tests.families.transformers_models import build, lifted

pytestmark = pytest.mark.torch

#: A text longer than the window and longrope's original context of these models, and one that is shorter.
LENGTHS = (24, 12)
NOISE = 1e-10


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(*MODELS[request.param])


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    path = write_gguf(folder, folder.parent / "model.gguf")
    return npllama.convert(path, folder.parent / "from-gguf", dtype="f32")


def config_of(store: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((store / "manifest.json").read_text())["config"]
    return config


def weights_of(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "weights").iterdir()}


def test_a_gguf_and_a_hugging_face_checkpoint_of_one_model_give_one_store(folder: Path, store: Path) -> None:
    other = npllama.convert(folder, folder.parent / "from-hf", dtype="f32")
    family = {"mistral": "llama", "mixtral": "llama"}  # as their GGUF files call themselves
    wanted = config_of(other)
    assert config_of(store) == {**wanted, "family": family.get(wanted["family"], wanted["family"])}
    assert weights_of(store) == weights_of(other)


def test_logits_are_those_of_transformers(model: Any, store: Path) -> None:
    ours = npllama.load(store, backend="numpy")
    for length in LENGTHS:
        tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, length)
        assert nmse(ours.forward(tokens), truth(model, tokens)) < NOISE


def truth(model: Any, tokens: Array) -> Array:
    """Return what transformers computes in float64, (T, V)."""
    model.double()
    with torch.no_grad(), lifted(model):
        logits: Array = model(torch.tensor(tokens)[None]).logits[0].numpy()
    return logits


def nmse(found: Array, truth: Array) -> float:
    return float(((found - truth) ** 2).sum() / (truth**2).sum())


# --- one model, in forms that its file may have as well ------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    build(*MIXTRAL).save_pretrained(folder)
    return folder


@pytest.fixture
def opened() -> Iterator[Callable[[Path], Any]]:
    """Open a checkpoint, closed at the end of the test."""
    checkpoints = []

    def open_checkpoint(path: Path) -> Any:
        checkpoints.append(open_gguf_checkpoint(path))
        return checkpoints[-1]

    yield open_checkpoint
    for checkpoint in checkpoints:
        for source in checkpoint.sources:
            source.close()


def test_experts_in_tensors_of_their_own_are_those_of_the_merged_ones(
    mixtral: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    merged = opened(write_gguf(mixtral, tmp_path / "merged.gguf"))
    split = opened(write_gguf(mixtral, tmp_path / "split.gguf", split_experts=True))
    assert split.config == merged.config
    assert list(split.tensors) == list(merged.tensors)
    for name, ref in merged.tensors.items():
        np.testing.assert_array_equal(split.tensors[name].read(), ref.read())


def test_quantised_experts_are_the_numbers_of_the_gguf_package(
    mixtral: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    path = write_gguf(mixtral, tmp_path / "q8.gguf", encoding="Q8_0")
    checkpoint = opened(path)
    theirs = {
        entry.name: gguf.quants.dequantize(entry.data, entry.tensor_type) for entry in gguf.GGUFReader(path).tensors
    }
    assert theirs["blk.1.ffn_down_exps.weight"].shape == (4, 64, 96)
    for canonical, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        ref = checkpoint.tensors[f"layers.1.feed_forward.{canonical}.weight"]
        assert ref.encoding == "Q8_0"
        np.testing.assert_array_equal(ref.read(), np.concatenate(theirs[f"blk.1.ffn_{name}_exps.weight"]))


def test_a_quantised_mixture_of_experts_runs_on_its_own_numbers(mixtral: Path, tmp_path: Path) -> None:
    model = build(*MIXTRAL)
    path = write_gguf(mixtral, tmp_path / "q8.gguf", encoding="Q8_0")
    ours = npllama.load(npllama.convert(path, tmp_path / "q8", dtype="f32"), backend="numpy")
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, 16)
    with torch.no_grad():
        for values in model.state_dict().values():
            if values.ndim > 1:
                values.copy_(torch.from_numpy(through_q8(values.numpy())))
    assert nmse(ours.forward(tokens), truth(model, tokens)) < NOISE


def through_q8(values: Array) -> Array:
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)


def test_a_window_that_the_file_names_is_obeyed_and_noted(
    mixtral: Path, tmp_path: Path, opened: Callable[[Path], Any]
) -> None:
    plain = opened(write_gguf(mixtral, tmp_path / "plain.gguf"))
    path = write_gguf(mixtral, tmp_path / "window.gguf", more=lambda writer: writer.add_sliding_window(5))
    checkpoint = opened(path)
    assert checkpoint.config == replace(plain.config, windows=(5, 5))
    assert any("the last 5 only" in note for note in checkpoint.notes)
    assert not plain.notes


def test_a_stack_of_matrices_that_are_not_the_experts_is_refused(mixtral: Path, tmp_path: Path) -> None:
    path = write_gguf(mixtral, tmp_path / "m.gguf")
    content = path.read_bytes()
    dims = np.array([64, 96, 4], "<u8").tobytes()
    assert content.count(dims) == 4  # gate and up, in two layers
    path.write_bytes(content.replace(dims, np.array([64, 4, 96], "<u8").tobytes(), 1))
    with pytest.raises(
        ConfigMismatchError, match=r"ffn_gate_exps\.weight holds 96 matrices, but the model has 4 experts"
    ):
        open_gguf_checkpoint(path)
