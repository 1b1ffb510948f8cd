"""A Meta checkpoint must be read in each form that it comes in, and what is something else must be named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npllama.checkpoint.names import EMBEDDING, OUTPUT
from npllama.checkpoint.source import Source
from npllama.config import RopeScaling
from npllama.errors import (
    ConfigError,
    ConfigMismatchError,
    NotACheckpointError,
    ShardError,
    UnsupportedError,
)
from tests.checkpoint.archives import View, archive, c_stride, torch_members, write_checkpoint
from tests.checkpoint.meta_files import (
    CONFIG,
    NORM,
    WHOLE,
    WQ,
    assert_reads,
    edit_shard,
    opened,
    refused,
    write_params,
    write_shards,
)
from tests.fixtures.loud import meta_params


class TestForms:
    def test_one_file_with_params_beside_it(self, tmp_path: Path) -> None:
        write_params(tmp_path)
        assert_reads(write_checkpoint(tmp_path / "mine.pth", WHOLE), WHOLE)

    def test_a_folder_with_one_unnumbered_file(self, tmp_path: Path) -> None:
        write_checkpoint(write_params(tmp_path) / "consolidated.pth", WHOLE)
        assert_reads(tmp_path, WHOLE)

    @pytest.mark.parametrize("prefix", ["model.", "module."])
    def test_a_common_prefix_is_taken_off_and_reported(self, tmp_path: Path, prefix: str) -> None:
        write_checkpoint(tmp_path / "consolidated.00.pth", {prefix + name: values for name, values in WHOLE.items()})
        write_params(tmp_path)
        assert_reads(tmp_path, WHOLE)
        with opened(tmp_path) as checkpoint:
            assert any(f"prefix '{prefix}'" in note for note in checkpoint.notes)

    def test_a_nested_state_dict_and_nested_params(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "consolidated.00.pth", WHOLE, wrap="model")
        (tmp_path / "params.json").write_text(json.dumps({"model": meta_params(CONFIG)}))
        assert_reads(tmp_path, WHOLE)
        with opened(tmp_path) as checkpoint:
            assert "the tensors are nested under 'model'" in checkpoint.notes

    def test_rope_tables_in_the_file_are_ignored_and_reported(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "consolidated.00.pth", {**WHOLE, "rope.freqs": np.ones(8, np.float32)})
        write_params(tmp_path)
        assert_reads(tmp_path, WHOLE)
        with opened(tmp_path) as checkpoint:
            assert any("rope.freqs" in note for note in checkpoint.notes)

    def test_the_tokenizer_is_copied(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path)
        (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
        with opened(folder) as checkpoint:
            assert checkpoint.tokenizer == {"tokenizer.model": b"IQ== 0\n"}
            assert (checkpoint.kind, checkpoint.rope_layout) == ("meta", "interleaved")

    def test_a_tokenizer_json_serves_where_metas_file_is_missing(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(b"{}")
        with opened(folder) as checkpoint:
            assert checkpoint.tokenizer == {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}

    def test_a_missing_tokenizer_is_reported(self, tmp_path: Path) -> None:
        with opened(write_shards(tmp_path)) as checkpoint:
            assert checkpoint.tokenizer == {}
            assert any("tokenizer.model" in note for note in checkpoint.notes)

    @pytest.mark.parametrize(("n_shards", "axis"), [(1, 0), (2, 0), (2, 1)])
    def test_an_unknown_vocabulary_is_read_off_the_embedding(self, tmp_path: Path, n_shards: int, axis: int) -> None:
        write_params(write_shards(tmp_path, n_shards=n_shards, embedding_axis=axis), vocab_size=-1)
        assert_reads(tmp_path, WHOLE)
        with opened(tmp_path) as checkpoint:
            assert checkpoint.config.vocab_size == CONFIG.vocab_size

    def test_the_rope_factor_is_assumed_and_can_be_overridden(self, tmp_path: Path) -> None:
        write_params(write_shards(tmp_path), replace(CONFIG, rope_scaling=RopeScaling("llama3", 8.0)))
        with opened(tmp_path) as checkpoint:
            assert checkpoint.config.rope_scaling == RopeScaling("llama3", 8.0)
            assert any("RoPE frequencies scaled by 8" in note for note in checkpoint.notes)
        with opened(tmp_path, rope_factor=32.0) as checkpoint:
            assert checkpoint.config.rope_scaling == RopeScaling("llama3", 32.0)


class TestTied:
    @staticmethod
    def views(*, alias: bool) -> tuple[dict[str, View], dict[str, bytes]]:
        values = {**WHOLE, OUTPUT: WHOLE[EMBEDDING]}
        keys = {name: str(index) for index, name in enumerate(values)}
        if alias:
            keys[OUTPUT] = keys[EMBEDDING]
        views = {name: View(keys[name], v.size, v.shape, c_stride(v.shape)) for name, v in values.items()}
        return views, {keys[name]: v.tobytes() for name, v in values.items()}

    def test_an_output_that_shares_the_embeddings_bytes_is_tied(self, tmp_path: Path) -> None:
        (tmp_path / "consolidated.00.pth").write_bytes(archive(torch_members(*self.views(alias=True))))
        write_params(tmp_path)
        with opened(tmp_path) as checkpoint:
            assert checkpoint.config.tied
            assert OUTPUT not in checkpoint.tensors

    def test_an_output_with_equal_numbers_elsewhere_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "consolidated.00.pth").write_bytes(archive(torch_members(*self.views(alias=False))))
        write_params(tmp_path)
        with opened(tmp_path) as checkpoint:
            assert not checkpoint.config.tied
            np.testing.assert_array_equal(checkpoint.tensors[OUTPUT].read(), WHOLE[EMBEDDING])

    @pytest.mark.parametrize("n_shards", [1, 2])
    def test_an_absent_output_is_tied_and_reported(self, tmp_path: Path, n_shards: int) -> None:
        tensors = {name: values for name, values in WHOLE.items() if name != OUTPUT}
        folder = write_shards(tmp_path, tensors, n_shards)
        assert_reads(folder, tensors)
        with opened(folder) as checkpoint:
            assert checkpoint.config.tied
            assert any(OUTPUT in note for note in checkpoint.notes)


class TestRefused:
    def test_a_folder_without_weights(self, tmp_path: Path) -> None:
        refused(write_params(tmp_path), NotACheckpointError, r"no consolidated\.00\.pth")

    def test_weights_without_params(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path / "consolidated.00.pth", WHOLE)
        for where in (tmp_path, path):
            refused(where, ConfigError, r"no params\.json beside the weights.*same folder")

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, {name: values for name, values in WHOLE.items() if name != WQ})
        refused(folder, ConfigMismatchError, rf"1 tensors are missing: {WQ}")

    def test_an_unknown_tensor(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "consolidated.00.pth", {**WHOLE, "layers.0.gate.weight": WHOLE[NORM]})
        refused(write_params(tmp_path), ConfigMismatchError, r"1 tensors are unknown: layers\.0\.gate\.weight")

    def test_params_of_another_model(self, tmp_path: Path) -> None:
        write_params(write_shards(tmp_path), n_layers=1)
        refused(tmp_path, ConfigMismatchError, "9 tensors are unknown")

    def test_a_shape_that_params_contradict(self, tmp_path: Path) -> None:
        write_params(write_shards(tmp_path), vocab_size=300)
        refused(tmp_path, ConfigMismatchError, r"tok_embeddings.weight is \(256, 64\), expected \(300, 64\)")

    def test_an_embedding_of_no_known_shape(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path / "consolidated.00.pth", {**WHOLE, EMBEDDING: np.ones(5, np.float32)})
        write_params(tmp_path, vocab_size=-1)
        refused(tmp_path, ConfigError, "vocab_size")

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("layers.0.attention.wq.scales", "SpinQuant"),
            ("layers.0.attention.wq.adaptor.A.weight", "LoRA"),
            ("layers.0.attention.wq.lora_a.weight", "LoRA"),
        ],
    )
    def test_quantised_releases_are_named(self, tmp_path: Path, name: str, words: str) -> None:
        write_checkpoint(tmp_path / "consolidated.00.pth", {**WHOLE, name: WHOLE[NORM]})
        refused(write_params(tmp_path), UnsupportedError, f"{words}.*plain bf16 release")

    @pytest.mark.parametrize(
        ("name", "words"), [("fp8_scales_0.pt", "fp8"), (".metadata", "distributed"), ("__0_0.distcp", "distributed")]
    )
    def test_other_kinds_of_folders_are_named(self, tmp_path: Path, name: str, words: str) -> None:
        (write_shards(tmp_path) / name).write_bytes(b"")
        refused(tmp_path, UnsupportedError, words)

    def test_a_refused_checkpoint_leaves_no_file_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened_sources: list[Source] = []
        original = Source.__init__

        def record(self: Source, path: Any) -> None:
            original(self, path)
            opened_sources.append(self)

        monkeypatch.setattr(Source, "__init__", record)
        folder = write_shards(tmp_path, n_shards=2)
        edit_shard(folder, 1, 2, norm__weight=None)
        refused(folder, ShardError, "norm")
        assert len(opened_sources) == 2  # params.json is not reached
        for source in opened_sources:
            with pytest.raises(ValueError, match="closed"):
                source.read(0, 1)
