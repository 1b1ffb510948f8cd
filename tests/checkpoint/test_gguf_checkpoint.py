from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from npllama.checkpoint.gguf.checkpoint import open_gguf_checkpoint
from npllama.checkpoint.names import expected
from npllama.checkpoint.tensor import Checkpoint
from npllama.config import ModelConfig, RopeScaling
from npllama.errors import ConfigError, ConfigMismatchError, NpllamaError, TokenizerError, UnsupportedError

Open = Callable[[Path], Checkpoint]
Tensors = dict[str, np.ndarray]
CONFIG = ModelConfig("llama", 24, 2, 4, 2, 6, 40, 8, 1e-5, 10000.0, None, 64, False)
TOKENS = ["a", "b", "ab", "<s>", "</s>", "c", "d", "e"]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Open a checkpoint, closed at the end of the test."""
    checkpoints = []

    def open_checkpoint(path: Path) -> Checkpoint:
        checkpoints.append(open_gguf_checkpoint(path))
        return checkpoints[-1]

    yield open_checkpoint
    for checkpoint in checkpoints:
        for source in checkpoint.sources:
            source.close()


def random_tensors() -> Tensors:
    rng = np.random.default_rng(0)
    return {entry.gguf: rng.standard_normal(entry.shape, dtype=np.float32) for entry in expected(CONFIG).values()}


def write(path: Path, tensors: Tensors | None = None, *, arch: str = "llama", tokenizer: str = "", **more: Any) -> Path:
    """Write a model with the gguf package; ``more`` are integers under the architecture's prefix."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(24)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(6)
    writer.add_vocab_size(8)
    for key, value in more.items():
        writer.add_uint32(f"{arch}.{key}", value)
    if tokenizer:
        writer.add_tokenizer_model(tokenizer)
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([1, 1, 1, 3, 3, 1, 1, 1])
        writer.add_token_merges(["a b"])
    for name, values in (random_tensors() if tensors is None else tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_tensor_has_its_canonical_name_and_its_rows_as_they_are(tmp_path: Path, opened: Open) -> None:
    path = write(tmp_path / "m.gguf")
    checkpoint = opened(path)
    tensors = random_tensors()
    assert (checkpoint.kind, checkpoint.path, checkpoint.rope_layout) == ("gguf", str(path), "interleaved")
    assert checkpoint.config == CONFIG
    table = expected(CONFIG)
    assert list(checkpoint.tensors) == list(table)
    for name, ref in checkpoint.tensors.items():
        np.testing.assert_array_equal(ref.read(), tensors[table[name].gguf])
    assert (checkpoint.tokenizer, checkpoint.freq_factors, checkpoint.notes) == ({}, None, ())
    assert [source.name for source in checkpoint.sources] == ["m.gguf"]


def test_a_file_without_output_is_tied(tmp_path: Path, opened: Open) -> None:
    tensors = random_tensors()
    del tensors["output.weight"]
    checkpoint = opened(write(tmp_path / "m.gguf", tensors))
    assert checkpoint.config.tied
    assert "output.weight" not in checkpoint.tensors


def test_rope_frequency_factors_are_handed_on(tmp_path: Path, opened: Open) -> None:
    factors = np.array([1, 2, 8], np.float32)
    checkpoint = opened(write(tmp_path / "m.gguf", {**random_tensors(), "rope_freqs.weight": factors}))
    assert checkpoint.config.rope_scaling == RopeScaling("factors")
    assert checkpoint.freq_factors is not None
    np.testing.assert_array_equal(checkpoint.freq_factors.read(), factors)
    assert "rope_freqs.weight" not in checkpoint.tensors


def test_the_tokenizer_comes_along(tmp_path: Path, opened: Open) -> None:
    files = opened(write(tmp_path / "m.gguf", tokenizer="gpt2")).tokenizer
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_a_tokenizer_that_is_not_read_leaves_a_note(tmp_path: Path, opened: Open) -> None:
    checkpoint = opened(write(tmp_path / "m.gguf", tokenizer="bert"))
    assert checkpoint.tokenizer == {}
    assert any("the tokenizer is of the kind 'bert'" in note for note in checkpoint.notes)


def refused(path: Path, error: type[NpllamaError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        open_gguf_checkpoint(path)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00003.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused(tmp_path / "m-00002-of-00003.gguf", UnsupportedError, "one of the 3 parts .*llama-gguf-split --merge")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "m.gguf", arch="mamba"), UnsupportedError, "mamba")


def test_an_unknown_key_of_the_architecture_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path / "m.gguf", logit_softcap=3), ConfigError, "logit_softcap")


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_that_contradict_the_config_are_refused(tmp_path: Path, change: str) -> None:
    tensors = random_tensors()
    if change == "missing":
        del tensors["output_norm.weight"]
    elif change == "unknown":
        tensors["blk.0.attn_q_norm.weight"] = np.zeros(6, np.float32)
    else:
        tensors["blk.1.ffn_down.weight"] = np.zeros((40, 24), np.float32)
    refused(write(tmp_path / "m.gguf", tensors), ConfigMismatchError, change)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through Linux's /proc")
def test_nothing_stays_open_when_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.checkpoint.test_gguf_checkpoint.TOKENS", ["a"] * 8)
    path = write(tmp_path / "m.gguf", tokenizer="gpt2")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names only
    refused(path, TokenizerError, "two ids")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.real
def test_the_real_model_opens_whole(smollm2_gguf: Path, opened: Open) -> None:
    checkpoint = opened(smollm2_gguf)
    config = checkpoint.config
    assert (config.n_layers, config.dim, config.n_heads, config.n_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.tied, config.rope_theta) == (49152, True, 100_000.0)
    assert checkpoint.notes == ()
    encodings = {ref.encoding for ref in checkpoint.tensors.values()}
    assert encodings == {"Q4_1", "Q8_0", ""}
