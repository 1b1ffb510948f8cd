"""Shards must be put together to the whole model's exact numbers, reading each once, or one must be named as wrong."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoint.names import expected
from npllama.checkpoint.pth.file import open_pth
from npllama.checkpoint.pth.shards import merge
from npllama.checkpoint.source import Source
from npllama.errors import (
    ConfigMismatchError,
    CorruptDataError,
    ShardError,
)
from tests.checkpoint.archives import View, archive, c_stride, torch_members, write_checkpoint
from tests.checkpoint.meta_files import (
    CONFIG,
    NORM,
    WHOLE,
    WK,
    WO,
    WQ,
    assert_reads,
    cut,
    edit_shard,
    opened,
    refused,
    write_params,
    write_shards,
)
from tests.fixtures.loud import loud_config, loud_tensors
from tests.fixtures.loud import write_meta as write_meta_with_torch


class TestShards:
    @pytest.mark.parametrize("n_shards", [1, 2])
    @pytest.mark.parametrize("embedding_axis", [0, 1])
    def test_any_number_of_shards_is_the_whole_model(self, tmp_path: Path, n_shards: int, embedding_axis: int) -> None:
        folder = write_shards(tmp_path, n_shards=n_shards, embedding_axis=embedding_axis)
        assert_reads(folder, WHOLE)

    @pytest.mark.parametrize("n_shards", [4, 8])
    def test_heads_that_more_shards_than_heads_repeat_are_taken_once(self, tmp_path: Path, n_shards: int) -> None:
        copies = n_shards // CONFIG.n_kv_heads
        repeated = {
            name: np.repeat(whole.reshape(CONFIG.n_kv_heads, -1, CONFIG.dim), copies, axis=0).reshape(-1, CONFIG.dim)
            if name.endswith(("wk.weight", "wv.weight"))
            else whole
            for name, whole in WHOLE.items()
        }
        folder = write_shards(tmp_path, repeated, n_shards)
        assert_reads(folder, WHOLE)

    def test_repeated_heads_that_differ_are_an_error(self, tmp_path: Path) -> None:
        wrong = {
            name: np.concatenate([whole, whole]) if name.endswith(("wk.weight", "wv.weight")) else whole
            for name, whole in WHOLE.items()
        }
        words = r"attention\.wk\.weight must be equal.*differs from"
        with opened(write_shards(tmp_path, wrong, 4)) as checkpoint, pytest.raises(ShardError, match=words):
            checkpoint.tensors[WK].read()

    def test_what_every_shard_repeats_is_compared(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        changed = WHOLE[NORM].copy()
        changed[5] += 0.25
        edit_shard(folder, 1, 2, **{NORM.replace(".", "__"): changed})
        words = rf"{NORM}.*consolidated\.01\.pth.*by up to 0\.25"
        with opened(folder) as checkpoint, pytest.raises(ShardError, match=words):
            checkpoint.tensors[NORM].read()

    def test_a_missing_shard_is_named_by_its_number(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        (folder / "consolidated.00.pth").unlink()
        refused(folder, ShardError, "shard 00 of 2 is missing")

    def test_a_missing_last_shard_is_known_from_the_checklist(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        (folder / "checklist.chk").write_text(f"{'0' * 32}  ./consolidated.00.pth\n{'1' * 32}  ./consolidated.01.pth\n")
        assert_reads(folder, WHOLE)
        (folder / "consolidated.01.pth").unlink()
        refused(folder, ShardError, "shard 01 of 2 is missing")

    def test_a_missing_last_shard_is_known_from_the_shapes(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=4)
        (folder / "consolidated.03.pth").unlink()
        refused(folder, ConfigMismatchError, r"in each of 3 shards, which does not add up.*A shard is missing")

    def test_a_repeated_tensor_of_another_shape_is_an_error(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        for shard in range(2):
            edit_shard(folder, shard, 2, norm__weight=np.ones(32, np.float32))
        refused(folder, ConfigMismatchError, r"norm\.weight has the shape \(32,\) in each of 2 shards")

    def test_heads_that_cannot_be_repeated_evenly_are_an_error(self, tmp_path: Path) -> None:
        """Three shards of 32 rows are 96: twice the 48 that are expected, but not in pairs of shards."""
        for shard in range(3):
            write_checkpoint(tmp_path / f"{shard}.pth", {WK: np.ones((32, 4), np.float32)})
        files = [open_pth(tmp_path / f"{shard}.pth") for shard in range(3)]
        table = {WK: replace(expected(CONFIG)[WK], shape=(48, 4))}
        with pytest.raises(ConfigMismatchError, match="in each of 3 shards"):
            merge(files, table)
        for file in files:
            file.source.close()

    def test_an_extra_shard_is_noticed(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
        refused(folder, ConfigMismatchError, "in each of 3 shards")

    def test_two_spellings_of_one_number_are_refused(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path)
        (folder / "consolidated.0.pth").write_bytes(b"")
        refused(folder, ShardError, "the same shard twice")

    def test_numbers_are_ordered_as_numbers(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        (folder / "consolidated.00.pth").rename(folder / "consolidated.0.pth")
        (folder / "consolidated.01.pth").rename(folder / "consolidated.1.pth")
        assert_reads(folder, WHOLE)

    def test_shards_of_two_models_are_told_by_their_first_difference(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        edit_shard(folder, 1, 2, norm__weight=None)
        refused(folder, ShardError, r"norm\.weight is in consolidated\.00\.pth, but not in this shard")
        edit_shard(folder, 1, 2, extra__weight=np.ones(1, np.float32))
        refused(folder, ShardError, r"extra\.weight is in this shard, but not in consolidated\.00\.pth")
        edit_shard(folder, 1, 2, norm__weight=WHOLE["norm.weight"].astype(np.float16))
        refused(folder, ShardError, r"norm\.weight is float16 \(64,\), but float32 \(64,\)")
        edit_shard(folder, 1, 2, norm__weight=np.ones(65, np.float32))
        refused(folder, ShardError, r"norm\.weight is float32 \(65,\)")

    def test_one_shard_of_several_cannot_be_opened_alone(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        refused(folder / "consolidated.01.pth", ShardError, "is one of 2 shards. Name the folder")

    def test_damage_in_any_shard_is_noticed(self, tmp_path: Path) -> None:
        folder = write_shards(tmp_path, n_shards=2)
        path = folder / "consolidated.01.pth"
        content = bytearray(path.read_bytes())
        content[content.index(cut(WO, WHOLE[WO], 1, 2).tobytes())] ^= 1
        path.write_bytes(content)
        with opened(folder) as checkpoint:
            checkpoint.tensors[WQ].read()
            with pytest.raises(CorruptDataError, match=r"consolidated\.01\.pth:archive/data/\d+: the CRC-32"):
                checkpoint.tensors[WO].read()
        with opened(folder, verify_crc=False) as checkpoint:
            checkpoint.tensors[WO].read()


class TestCost:
    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        counts: list[int] = []
        original = Source.read_into

        def read_into(source: Source, offset: int, buffer: memoryview) -> None:
            counts.append(len(buffer))
            original(source, offset, buffer)

        monkeypatch.setattr(Source, "read_into", read_into)
        return counts

    @staticmethod
    def shared_storages(folder: Path, *, all_in_one: bool = False) -> Path:
        """Write a file in which each layer's tensors share one storage, as Meta's do, in an order of its own."""
        groups: dict[str, list[str]] = {}
        for name in sorted(WHOLE, reverse=True):
            groups.setdefault("" if all_in_one else name[:8], []).append(name)
        views, storages = {}, {}
        for key, names in enumerate(groups.values()):
            numel, offset = sum(WHOLE[name].size for name in names), 0
            for name in names:
                values = WHOLE[name]
                views[name] = View(str(key), numel, values.shape, c_stride(values.shape), offset)
                offset += values.size
            storages[str(key)] = b"".join(WHOLE[name].tobytes() for name in names)
        (folder / "consolidated.00.pth").write_bytes(archive(torch_members(views, storages)))
        return write_params(folder)

    @pytest.mark.parametrize("n_shards", [0, 1, 2], ids=["shared storages", "one file", "two shards"])
    def test_every_weight_is_read_once(self, tmp_path: Path, counted: list[int], n_shards: int) -> None:
        folder = write_shards(tmp_path, n_shards=n_shards) if n_shards else self.shared_storages(tmp_path)
        with opened(folder) as checkpoint:
            total = sum(ref.nbytes for ref in checkpoint.tensors.values())
            counted.clear()
            for name, ref in checkpoint.tensors.items():
                half = ref.n_rows // 2
                found = np.concatenate([ref.read_rows(0, half), ref.read_rows(half, ref.n_rows)])
                ref.verify()
                np.testing.assert_array_equal(found, WHOLE[name])
        assert sum(counted) == total

    @pytest.mark.parametrize("kept", ["layers.0.", "layers.1.", ""])
    @pytest.mark.parametrize("backwards", [False, True])
    def test_damage_is_noticed_by_some_tensor_of_the_same_layer(
        self, tmp_path: Path, kept: str, backwards: bool
    ) -> None:
        """Whatever layers are taken and in whatever order, a damaged storage never passes."""
        path = self.shared_storages(tmp_path) / "consolidated.00.pth"
        content = bytearray(path.read_bytes())
        for name in (WK, WK.replace("0", "1")):
            content[content.index(WHOLE[name].tobytes()) + 100] ^= 1
        path.write_bytes(content)
        with opened(tmp_path) as checkpoint:
            names = [name for name in checkpoint.tensors if name.startswith(kept)]
            caught = []
            for name in reversed(names) if backwards else names:
                try:
                    checkpoint.tensors[name].read()
                except CorruptDataError as problem:
                    caught.append(str(problem))
        assert len(caught) == (1 if kept else 2)
        assert all("CRC-32" in message for message in caught)

    def test_a_layer_taken_alone_answers_for_a_storage_that_all_layers_share(self, tmp_path: Path) -> None:
        path = self.shared_storages(tmp_path, all_in_one=True) / "consolidated.00.pth"
        content = bytearray(path.read_bytes())
        content[content.index(WHOLE[WK].tobytes()) + 100] ^= 1
        path.write_bytes(content)
        caught = []
        with opened(tmp_path) as checkpoint:
            for name in (name for name in checkpoint.tensors if name.startswith("layers.1.")):
                try:
                    checkpoint.tensors[name].read()
                except CorruptDataError:
                    caught.append(name)
        assert len(caught) == 1

    def test_memory_does_not_grow_with_the_tensor(self, tmp_path: Path) -> None:
        config = loud_config(dim=512, n_heads=8, n_layers=1, hidden_dim=8192, head_dim=64)
        tensors = {name: np.zeros(entry.shape, np.float32) for name, entry in expected(config).items()}
        for shard in range(2):
            parts = {name: cut(name, whole, shard, 2) for name, whole in tensors.items()}
            write_checkpoint(tmp_path / f"consolidated.{shard:02d}.pth", parts)
        del tensors, parts
        with opened(write_params(tmp_path, config)) as checkpoint:
            tracemalloc.start()
            try:
                for ref in checkpoint.tensors.values():  # w1, w2 and w3 have 16 MiB each
                    for start in range(0, ref.n_rows, 16):
                        ref.read_rows(start, min(start + 16, ref.n_rows))
                    ref.verify()
                assert tracemalloc.get_traced_memory()[1] < 3 << 20
            finally:
                tracemalloc.stop()


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(6))
def test_random_models_in_random_shards_are_what_torch_cut(tmp_path: Path, seed: int) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    n_shards = int(rng.choice([1, 2, 3, 4, 8]))
    kv_heads = n_shards * int(rng.integers(1, 3))
    heads = kv_heads * int(rng.integers(1, 4))
    config = loud_config(
        n_layers=int(rng.integers(1, 4)),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=4,
        dim=4 * heads,
        hidden_dim=n_shards * 12 * heads,
        vocab_size=n_shards * int(rng.integers(8, 40)),
    )
    tensors = loud_tensors(config, seed)
    axis = int(rng.integers(0, 2))
    write_meta_with_torch(tmp_path, tensors, config, n_shards=n_shards, embedding_axis=axis)
    bits = {name: torch.from_numpy(v).bfloat16().view(torch.uint16).numpy() for name, v in tensors.items()}
    assert_reads(tmp_path, bits, rows=int(rng.integers(1, 50)))
    with opened(tmp_path) as checkpoint:
        assert checkpoint.config == config
