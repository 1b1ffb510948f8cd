"""A checkpoint becomes a store: the right bits, the right manifest, and nothing when something is wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from npllama.checkpoint.convert import convert, convert_checkpoint
from npllama.checkpoint.open import open_checkpoint
from npllama.checkpoint.rope import inverse_frequencies
from npllama.checkpoint.source import Source
from npllama.checkpoint.store import manifest as manifests
from npllama.checkpoint.store.folder import Store, verify_store
from npllama.config import RopeScaling
from npllama.dtypes import Array, widen
from npllama.errors import (
    CorruptDataError,
    NpllamaError,
    ParameterError,
)
from tests.checkpoint.tiny import CONFIG, TOKENIZER, checkpoint, ref, stored, tree
from tests.fixtures.loud import loud_config, loud_tensors, write_gguf, write_hf, write_meta

GOLDEN = Path(__file__).parents[1] / "fixtures" / "manifest.json"


def numbers(store: Store) -> dict[str, Array]:
    return {name: store.tensor(name).numbers() for name in store.entries if name != manifests.ROPE_FREQS}


# --- bits ----------------------------------------------------------------------------------------------------------


def test_bfloat16_keeps_its_bits(tmp_path: Path) -> None:
    values = stored(dtype="bfloat16")
    store = Store.open(convert_checkpoint(checkpoint(values, dtype="bfloat16"), tmp_path / "m"))
    for name, bits in values.items():
        assert store.tensor(name).dtype == "bfloat16"
        np.testing.assert_array_equal(store.tensor(name).data, bits)


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32"])
def test_f32_holds_every_source_exactly(tmp_path: Path, source: str) -> None:
    values = stored(dtype=source)
    store = Store.open(convert_checkpoint(checkpoint(values, dtype=source), tmp_path / "m", dtype="f32"))
    for name, found in numbers(store).items():
        exact = values[name].view(ml_dtypes.bfloat16) if source == "bfloat16" else values[name]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, exact.astype(np.float64))


@pytest.mark.torch
@pytest.mark.parametrize("source", ["float16", "float32", "float64"])
def test_rounding_to_bfloat16_is_torch_s(tmp_path: Path, source: str) -> None:
    torch = pytest.importorskip("torch")
    values = stored(dtype=source)
    store = Store.open(convert_checkpoint(checkpoint(values, dtype=source), tmp_path / "m"))
    for name, found in numbers(store).items():
        np.testing.assert_array_equal(found, torch.from_numpy(values[name]).to(torch.bfloat16).float().numpy())


def test_large_tensors_are_written_in_blocks_and_lose_nothing(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=50_000, dim=128, n_layers=1, hidden_dim=256, head_dim=32)
    values = stored(config)  # the embedding has 25 MB
    asked: list[tuple[int, int]] = []
    tensors = dict(checkpoint(values, config=config).tensors)
    whole = tensors["tok_embeddings.weight"]

    def read_rows(start: int, stop: int) -> Array:
        asked.append((start, stop))
        return whole.read_rows(start, stop)

    tensors["tok_embeddings.weight"] = replace(whole, read_rows=read_rows)
    store = Store.open(convert_checkpoint(checkpoint(config=config, tensors=tensors), tmp_path / "m", dtype="f32"))
    np.testing.assert_array_equal(store.tensor("tok_embeddings.weight").data, values["tok_embeddings.weight"])
    assert len(asked) > 1
    assert all((stop - start) * config.dim * 4 <= 16 << 20 for start, stop in asked)
    assert [start for start, _ in asked[1:]] == [stop for _, stop in asked[:-1]]


def test_every_tensor_is_verified_after_it_was_read(tmp_path: Path) -> None:
    events: list[str] = []

    def refuse() -> None:
        events.append("verify")
        raise CorruptDataError("the CRC-32 is wrong")

    tensors = dict(checkpoint().tensors)
    tensors["norm.weight"] = replace(tensors["norm.weight"], verify=refuse)
    with pytest.raises(CorruptDataError, match="CRC-32"):
        convert_checkpoint(checkpoint(tensors=tensors), tmp_path / "m")
    assert events == ["verify"]
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.partial" / "weights" / "norm.weight.npy").exists()


# --- small integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_matrices_become_integers_and_the_rest_stays_as_it_was(tmp_path: Path, dtype: str, source: str) -> None:
    values = stored(dtype=source)
    store = Store.open(convert_checkpoint(checkpoint(values, dtype=source), tmp_path / "m", dtype=dtype))
    assert store.manifest["dtype"] == dtype
    steps = {"int8": 2 * 127, "int4": 15}[dtype]
    for name, found in numbers(store).items():
        exact = widen(values[name], source)
        if exact.ndim == 1:
            assert store.entries[name].dtype == "float32"
            np.testing.assert_array_equal(found, exact)
        else:
            assert store.entries[name].dtype == dtype
            span = exact.max(axis=1) - exact.min(axis=1) if dtype == "int4" else 2 * np.abs(exact).max(axis=1)
            assert (np.abs(found - exact) <= span[:, None] / steps * 1.6).all(), name  # ends may be cut off
            assert not np.array_equal(found, exact)


def test_a_router_stays_float32() -> None:
    assert manifests.weight_dtype("layers.0.feed_forward.router.weight", (8, 64), "int4") == "float32"
    assert manifests.weight_dtype("layers.0.feed_forward.w1.weight", (8, 64), "int4") == "int4"
    assert manifests.weight_dtype("layers.0.feed_forward.router.weight", (8, 64), "bfloat16") == "bfloat16"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_blocks_do_not_change_what_is_written(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert_checkpoint(checkpoint(), tmp_path / "whole", dtype=dtype)
    monkeypatch.setattr("npllama.checkpoint.store.stream._BLOCK_BYTES", 100)
    assert tree(convert_checkpoint(checkpoint(), tmp_path / "parts", dtype=dtype)) == tree(whole)


def test_a_quantised_output_with_equal_numbers_is_tied(tmp_path: Path) -> None:
    values = stored()
    values["output.weight"] = values["tok_embeddings.weight"].copy()
    store = Store.open(convert_checkpoint(checkpoint(values), tmp_path / "m", dtype="int4"))
    assert store.config.tied
    assert not list((tmp_path / "m" / "weights").glob("output.*"))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_files_of_integers_say_something_sensible_to_numpy(tmp_path: Path, dtype: str) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m", dtype=dtype) / "weights"
    parts = {file.name: np.load(file, mmap_mode="r") for file in folder.glob("layers.0.feed_forward.w2.weight*")}
    data = parts.pop("layers.0.feed_forward.w2.weight.npy")
    assert (data.dtype, data.shape) == ((np.int8, (8, 64)) if dtype == "int8" else (np.uint8, (8, 32)))
    assert set(parts) == {
        f"layers.0.feed_forward.w2.weight.{kind}.npy" for kind in ("scale", "min")[: 1 if dtype == "int8" else 2]
    }
    assert all((part.dtype, part.shape) == (np.uint16, (8, 1)) for part in parts.values())


# --- what the folder is --------------------------------------------------------------------------------------------


def test_numpy_maps_every_file_at_a_multiple_of_64(tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    files = sorted((folder / "weights").iterdir())
    assert len(files) == 2 * 9 + 3 + 1
    for file in files:
        array = np.load(file, mmap_mode="r")
        assert isinstance(array, np.memmap)
        assert array.offset % 64 == 0
        assert array.flags.c_contiguous
        assert array.dtype == ("<f4" if file.stem == "rope.freqs" else "<u2")


def test_manifest_is_this_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format is a promise: a change here needs a new format version, or a very good reason."""
    monkeypatch.setattr(manifests, "producer", lambda: "npllama 0.0.0")
    config = replace(CONFIG, rope_scaling=RopeScaling("llama3", 8.0))
    values = {name: np.full_like(array, 0x3F00) for name, array in stored(config, "bfloat16").items()}  # 0.5
    values["output.weight"][...] = 0x3F80
    (tmp_path / "consolidated.00.pth").write_bytes(b"the source")
    source = Source(tmp_path / "consolidated.00.pth")
    made = checkpoint(values, config=config, dtype="bfloat16", sources=(source,))
    folder = convert_checkpoint(made, tmp_path / "m", layers=1)
    source.close()
    assert (folder / "manifest.json").read_text() == GOLDEN.read_text()


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_digests_are_those_of_the_files(tmp_path: Path, dtype: str) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m", dtype=dtype)
    document = json.loads((folder / "manifest.json").read_bytes())
    lines = [*document["tensors"], *document["tokenizer"]]
    lines += [line[kind] for line in document["tensors"] for kind in ("scale", "min") if kind in line]
    assert {file.relative_to(folder).as_posix() for file in folder.glob("*/*")} == {line["file"] for line in lines}
    for line in lines:
        assert hashlib.sha256((folder / line["file"]).read_bytes()).hexdigest() == line["sha256"]
    digest = document.pop("digest")
    spelled = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(spelled.encode()).hexdigest() == digest


def test_folder_holds_nothing_else_and_no_path_of_this_machine(tmp_path: Path) -> None:
    source = tmp_path / "secret-place" / "model.gguf"
    source.parent.mkdir()
    source.write_bytes(b"x" * 100)
    made = checkpoint(sources=(Source(source),))
    folder = convert_checkpoint(made, tmp_path / "m")
    made.sources[0].close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "secret-place"]
    assert sorted(entry.name for entry in folder.iterdir()) == ["manifest.json", "tokenizer", "weights"]
    assert "secret-place" not in (folder / "manifest.json").read_text()


def test_two_conversions_give_the_same_bytes(tmp_path: Path) -> None:
    first = convert_checkpoint(checkpoint(), tmp_path / "a" / "m")
    second = convert_checkpoint(checkpoint(), tmp_path / "b" / "other-name")
    assert tree(first) == tree(second)


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    store = Store.open(convert_checkpoint(checkpoint(), tmp_path / "m"))
    assert store.tokenizer_folder == tmp_path / "m" / "tokenizer"
    assert tree(store.tokenizer_folder) == TOKENIZER


def test_without_a_tokenizer_there_is_no_folder_for_it(tmp_path: Path) -> None:
    store = Store.open(convert_checkpoint(checkpoint(tokenizer={}), tmp_path / "m"))
    assert store.tokenizer_folder is None
    assert store.manifest["tokenizer"] == []
    assert not (tmp_path / "m" / "tokenizer").exists()


def test_rope_frequencies_are_float32_in_every_store(tmp_path: Path) -> None:
    config = replace(CONFIG, rope_scaling=RopeScaling("factors"))
    factors = ref("rope_freqs.weight", np.array([4.0], np.float32))
    for dtype in ("bf16", "f32"):
        made = checkpoint(config=config, freq_factors=factors)
        store = Store.open(convert_checkpoint(made, tmp_path / dtype, dtype=dtype))
        assert store.frequencies()[0].dtype == np.float32
        np.testing.assert_array_equal(store.frequencies()[0], [0.25])
        np.testing.assert_array_equal(np.load(tmp_path / dtype / "weights" / "rope.freqs.npy"), [0.25])


def test_bfloat16_frequency_factors_are_numbers_and_not_bit_patterns(tmp_path: Path) -> None:
    config = replace(CONFIG, rope_scaling=RopeScaling("factors"))
    factors = ref("rope_freqs.weight", np.array([0x4080], np.uint16), "bfloat16")
    store = Store.open(convert_checkpoint(checkpoint(config=config, freq_factors=factors), tmp_path / "m"))
    np.testing.assert_array_equal(store.frequencies()[0], [0.25])


# --- ties ----------------------------------------------------------------------------------------------------------


def tied_store(folder: Path, **changes: Any) -> Store:
    store = Store.open(convert_checkpoint(checkpoint(**changes), folder))
    assert store.manifest["tied"] == {"output.weight": "tok_embeddings.weight"}
    assert store.config.tied
    assert not (folder / "weights" / "output.weight.npy").exists()
    np.testing.assert_array_equal(store.tensor("output.weight").data, store.tensor("tok_embeddings.weight").data)
    return store


def test_a_tied_model_stores_the_embedding_once(tmp_path: Path) -> None:
    tied_store(tmp_path / "m", config=replace(CONFIG, tied=True))


def test_an_output_that_is_the_same_bytes_of_the_file_is_tied(tmp_path: Path) -> None:
    values = stored()
    tensors = {name: ref(name, array) for name, array in values.items()}
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = ref(name, values["tok_embeddings.weight"], alias="data/0")
    tied_store(tmp_path / "m", tensors=tensors)


def test_an_output_with_equal_numbers_is_tied(tmp_path: Path) -> None:
    values = stored()
    values["output.weight"] = values["tok_embeddings.weight"].copy()
    unlike = tied_store(tmp_path / "m", values=values)
    assert tree(unlike.path)["manifest.json"] == (tmp_path / "m" / "manifest.json").read_bytes()


def test_an_output_that_differs_is_kept(tmp_path: Path) -> None:
    store = Store.open(convert_checkpoint(checkpoint(), tmp_path / "m"))
    assert store.manifest["tied"] == {}
    assert not np.array_equal(store.tensor("output.weight").data, store.tensor("tok_embeddings.weight").data)


# --- fewer layers --------------------------------------------------------------------------------------------------


def test_layers_keeps_the_first_ones_exactly_and_says_so(tmp_path: Path) -> None:
    whole = Store.open(convert_checkpoint(checkpoint(), tmp_path / "whole"))
    one = Store.open(convert_checkpoint(checkpoint(), tmp_path / "one", layers=1))
    assert one.config == replace(CONFIG, n_layers=1)
    assert one.manifest["truncated"] == {"layers": 1, "of": 2}
    assert whole.manifest["truncated"] is None
    assert set(one.entries) == {name for name in whole.entries if not name.startswith("layers.1.")}
    for name in one.entries:
        np.testing.assert_array_equal(one.tensor(name).data, whole.tensor(name).data)


def test_all_layers_is_not_truncated(tmp_path: Path) -> None:
    store = Store.open(convert_checkpoint(checkpoint(), tmp_path / "m", layers=2))
    assert store.manifest["truncated"] is None


@pytest.mark.parametrize("layers", [0, -1, 3, True, 1.0, "1"])
def test_impossible_layers_are_refused(tmp_path: Path, layers: Any) -> None:
    with pytest.raises(ParameterError, match=r"layers is .*from 1 to 2"):
        convert_checkpoint(checkpoint(), tmp_path / "m", layers=layers)


# --- whole files ---------------------------------------------------------------------------------------------------


def test_progress_counts_the_bytes_of_the_output(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = convert_checkpoint(checkpoint(), tmp_path / "m", progress=lambda *call: seen.append(call))
    total = Store.open(folder).nbytes
    assert seen[0] == ("Converting", 0, total)
    assert seen[-1] == ("Converting", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def loud_bits(tensors: dict[str, Array]) -> dict[str, Array]:
    return {name: values.astype(ml_dtypes.bfloat16).view(np.uint16) for name, values in tensors.items()}


def test_formats_of_one_model_give_the_same_weights(tmp_path: Path) -> None:
    """Hugging Face's rows are half-split, GGUF's interleaved: both become the same store."""
    config = loud_config()
    tensors = loud_tensors(config)
    hf = convert(write_hf(tmp_path / "hf", tensors, config, n_files=2), tmp_path / "a")
    gguf = convert(write_gguf(tmp_path / "model.gguf", tensors, config), tmp_path / "b")
    for folder, layout in ((hf, "half-split"), (gguf, "interleaved")):
        store = Store.open(folder)
        assert store.manifest["rope_layout"] == "interleaved"
        assert store.manifest["source_rope_layout"] == layout
        np.testing.assert_array_equal(store.frequencies()[0], inverse_frequencies(config))
        for name, bits in loud_bits(tensors).items():
            np.testing.assert_array_equal(store.tensor(name).data, bits, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize("n_shards", [1, 2])
def test_a_meta_checkpoint_converts_to_the_bit(tmp_path: Path, n_shards: int) -> None:
    pytest.importorskip("torch")
    config = loud_config()
    tensors = loud_tensors(config)
    source = write_meta(tmp_path / "meta", tensors, config, n_shards=n_shards)
    store = Store.open(convert(source, tmp_path / "m"))
    for name, bits in loud_bits(tensors).items():
        np.testing.assert_array_equal(store.tensor(name).data, bits, err_msg=name)
    assert [file["name"] for file in store.manifest["source"]["files"]] == [
        f"consolidated.{shard:02d}.pth" for shard in range(n_shards)
    ]


def test_shards_behind_symbolic_links_convert(tmp_path: Path) -> None:
    config = loud_config()
    real = write_hf(tmp_path / "blobs", loud_tensors(config), config, n_files=2)
    (tmp_path / "snapshot").mkdir()
    for file in real.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert verify_store(convert(tmp_path / "snapshot", tmp_path / "m")).problems == ()


def test_a_converted_model_is_not_converted_again(tmp_path: Path) -> None:
    folder = convert_checkpoint(checkpoint(), tmp_path / "m")
    with pytest.raises(NpllamaError, match="converted model already"):
        convert(folder, tmp_path / "again")


@pytest.mark.real
def test_the_real_model_converts_and_its_weights_are_those_of_the_gguf_package(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    store = Store.open(convert(smollm2_gguf, tmp_path / "m", dtype="f32", layers=2))
    assert (store.config.dim, store.config.n_heads, store.config.n_kv_heads) == (576, 9, 3)
    assert store.manifest["tied"] == {"output.weight": "tok_embeddings.weight"}
    reader = gguf.GGUFReader(smollm2_gguf)
    found = {tensor.name: tensor for tensor in reader.tensors}
    for name, spelled in (
        ("layers.1.attention.wk.weight", "blk.1.attn_k.weight"),
        ("layers.0.feed_forward.w2.weight", "blk.0.ffn_down.weight"),
    ):
        theirs = gguf.quants.dequantize(found[spelled].data, found[spelled].tensor_type)
        np.testing.assert_array_equal(store.tensor(name).data, theirs)
    checkpoint_again = open_checkpoint(smollm2_gguf)
    assert set(tree(store.path / "tokenizer")) == set(checkpoint_again.tokenizer)
    for source in checkpoint_again.sources:
        source.close()
