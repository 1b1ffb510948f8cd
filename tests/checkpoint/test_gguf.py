from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from npllama.checkpoint.gguf.file import GgufFile, open_gguf
from npllama.checkpoint.source import Source
from tests.checkpoint import handcraft
from tests.checkpoint.handcraft import Q8_0, UINT32, pair, tensor, u32

Open = Callable[[bytes], GgufFile]


@pytest.fixture
def open_bytes(tmp_path: Path) -> Iterator[Open]:
    """Open the given bytes as a GGUF file, closed at the end of the test."""
    opened = []

    def open_file(content: bytes) -> GgufFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        opened.append(open_gguf(path))
        return opened[-1]

    yield open_file
    for file in opened:
        file.source.close()


def written(path: Path) -> dict[str, np.ndarray]:
    """Write a file with the gguf package; return what its tensors are."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("t.u8", 200)
    writer.add_int8("t.i8", -100)
    writer.add_uint16("t.u16", 60000)
    writer.add_int16("t.i16", -30000)
    writer.add_uint32("t.u32", 4_000_000_000)
    writer.add_int32("t.i32", -2_000_000_000)
    writer.add_uint64("t.u64", 2**64 - 1)
    writer.add_int64("t.i64", -(2**63))
    writer.add_float32("t.f32", 0.1)
    writer.add_float64("t.f64", 0.1)
    writer.add_bool("t.bool", True)
    writer.add_string("t.str", "Ġ日本 🤗")
    writer.add_array("t.strings", ["", "a", "Ġb"])
    writer.add_array("t.ints", [3, -1, 2])
    writer.add_array("t.floats", [0.5, 1.5])
    writer.add_array("t.bools", [True, False])
    tensors = {
        "plain": rng.standard_normal((3, 5), dtype=np.float32),
        "half": rng.standard_normal((4, 2)).astype(np.float16),
        "vector": rng.standard_normal(7, dtype=np.float32),
        "cube": rng.standard_normal((2, 3, 4), dtype=np.float32),
        "double": rng.standard_normal((2, 2)),
    }
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    for name, kind in (("blocks", gguf.GGMLQuantizationType.Q8_0), ("brain", gguf.GGMLQuantizationType.BF16)):
        values = rng.standard_normal((6, 64), dtype=np.float32)
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        tensors[name] = gguf.quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_file_of_the_gguf_package_reads_back(tmp_path: Path) -> None:
    tensors = written(tmp_path / "m.gguf")
    file = open_gguf(tmp_path / "m.gguf")
    metadata = {key: value for key, value in file.metadata.items() if key.startswith("t.")}
    assert {key: value for key, value in metadata.items() if not isinstance(value, np.ndarray)} == {
        "t.u8": 200,
        "t.i8": -100,
        "t.u16": 60000,
        "t.i16": -30000,
        "t.u32": 4_000_000_000,
        "t.i32": -2_000_000_000,
        "t.u64": 2**64 - 1,
        "t.i64": -(2**63),
        "t.f32": float(np.float32(0.1)),
        "t.f64": 0.1,
        "t.bool": True,
        "t.str": "Ġ日本 🤗",
        "t.strings": ["", "a", "Ġb"],
    }
    assert metadata["t.bool"] is True
    assert metadata["t.ints"].tolist() == [3, -1, 2]
    assert metadata["t.floats"].tolist() == [0.5, 1.5]
    assert metadata["t.bools"].tolist() == [True, False]
    assert list(file.tensors) == list(tensors)
    for name, values in tensors.items():
        ref = file.tensors[name]
        found = ref.read()
        if values.ndim == 3:
            values = values.reshape(-1, values.shape[-1])
        assert ref.shape == found.shape == values.shape, name
        if ref.dtype == "bfloat16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        assert found.dtype == values.dtype, name
        assert found.tobytes() == values.tobytes(), name
    assert {name: (ref.dtype, ref.encoding, ref.nbytes) for name, ref in file.tensors.items()} == {
        "plain": ("float32", "", 60),
        "half": ("float16", "", 16),
        "vector": ("float32", "", 28),
        "cube": ("float32", "", 96),
        "double": ("float64", "", 32),
        "blocks": ("float32", "Q8_0", 6 * 68),
        "brain": ("bfloat16", "", 6 * 128),
    }
    assert file.stacks == {"cube": 2}
    file.source.close()


@pytest.mark.parametrize("name", ["plain", "vector", "cube", "blocks", "brain"])
def test_rows_are_rows_of_the_whole(tmp_path: Path, name: str) -> None:
    written(tmp_path / "m.gguf")
    file = open_gguf(tmp_path / "m.gguf")
    ref = file.tensors[name]
    whole = ref.read()
    for start in range(ref.n_rows):
        for stop in range(start, ref.n_rows + 1):
            np.testing.assert_array_equal(ref.read_rows(start, stop), whole[start:stop])
    file.source.close()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_row_of_one_of_many_matrices_is_all_that_is_read_for_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5, 64), dtype=np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("experts", packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "m.gguf")
    assert (file.stacks, file.tensors["experts"].shape) == ({"experts": 3}, (15, 64))
    read: list[int] = []
    read_into = Source.read_into
    monkeypatch.setattr(
        Source, "read_into", lambda self, start, into: (read.append(len(into)), read_into(self, start, into))[1]
    )
    rows = file.tensors["experts"].read_rows(7, 8)
    assert read == [packed.nbytes // 15]
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(rows, wanted.reshape(15, 64)[7:8])
    file.source.close()


def test_a_quantised_vector_can_be_cut_inside_a_block(open_bytes: Open) -> None:
    packed = np.random.default_rng(0).integers(0, 100, 3 * 34, dtype=np.uint8)
    ref = open_bytes(handcraft.gguf([], [tensor("v", [96], Q8_0)], packed.tobytes())).tensors["v"]
    whole = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(ref.read(), whole)
    np.testing.assert_array_equal(ref.read_rows(30, 67), whole[30:67])


def test_a_scalar_is_one_row(open_bytes: Open) -> None:
    ref = open_bytes(handcraft.gguf([], [tensor("s", [])], np.float32(2.5).tobytes())).tensors["s"]
    assert ref.shape == ()
    assert ref.read() == np.float32(2.5)


def test_another_alignment_is_obeyed(open_bytes: Open) -> None:
    pairs = [pair("general.alignment", UINT32, u32(128))]
    lines = [tensor("a", [1]), tensor("b", [1], offset=128)]
    data = np.float32(1).tobytes() + bytes(124) + np.float32(2).tobytes()
    file = open_bytes(handcraft.gguf(pairs, lines, data, alignment=128))
    assert [ref.read().item() for ref in file.tensors.values()] == [1.0, 2.0]


def test_version_2_is_read(open_bytes: Open) -> None:
    assert open_bytes(handcraft.gguf([pair("k", UINT32, u32(7))], version=2)).metadata == {"k": 7}


def test_a_file_without_anything_is_read(open_bytes: Open) -> None:
    file = open_bytes(handcraft.gguf())
    assert file.metadata == {}
    assert file.tensors == {}


def test_the_last_tensor_needs_no_padding_after_it(open_bytes: Open) -> None:
    assert open_bytes(handcraft.gguf([], [tensor("t", [3])], bytes(12))).tensors["t"].read().tolist() == [0, 0, 0]


@pytest.mark.real
def test_the_real_model_reads_as_the_gguf_package_reads_it(smollm2_gguf: Path) -> None:
    file, theirs = open_gguf(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = file.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key
    assert [entry.name for entry in theirs.tensors] == list(file.tensors)
    for entry in theirs.tensors[:20]:
        wanted = gguf.quants.dequantize(entry.data, entry.tensor_type)
        assert file.tensors[entry.name].read().tobytes() == wanted.tobytes(), entry.name
    file.source.close()
