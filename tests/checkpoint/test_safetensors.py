from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from npllama.checkpoint.safetensors.file import SafetensorsFile, open_safetensors
from npllama.dtypes import STORAGE
from npllama.errors import (
    CorruptDataError,
    EmptyFileError,
    NotACheckpointError,
    NpllamaError,
    ResourceLimitError,
    TruncatedFileError,
    UnsupportedError,
)
from tests.checkpoint import handcraft
from tests.checkpoint.handcraft import safetensors

Open = Callable[[bytes], SafetensorsFile]


@pytest.fixture
def open_bytes(tmp_path: Path) -> Iterator[Open]:
    """Open the given bytes as a safetensors file, closed at the end of the test."""
    opened = []

    def open_file(content: bytes) -> SafetensorsFile:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        opened.append(open_safetensors(path))
        return opened[-1]

    yield open_file
    for file in opened:
        file.source.close()


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# --- what is read right --------------------------------------------------------------------------------------------

NUMPY_DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def test_a_file_of_the_safetensors_package_reads_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: (rng.standard_normal((4, 3)) * 9).astype(name) for name in NUMPY_DTYPES}
    tensors |= {
        "cube": rng.standard_normal((2, 3, 4)),
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np", "日本": "é"})
    file = open_safetensors(tmp_path / "m.safetensors")
    assert file.metadata == {"format": "np", "日本": "é"}
    assert set(file.tensors) == set(tensors)
    for name, values in tensors.items():
        ref = file.tensors[name]
        found = ref.read()
        assert ref.shape == found.shape == values.shape
        assert ref.dtype == found.dtype.name == values.dtype.name
        assert (ref.nbytes, ref.encoding) == (values.nbytes, "")
        assert found.tobytes() == values.tobytes()
    file.source.close()


@pytest.mark.torch
def test_bfloat16_is_read_as_bit_patterns(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(-8.0, 8.0, 0.37).reshape(4, 11).to(torch.bfloat16)
    pytest.importorskip("safetensors.torch").save_file({"w": values}, tmp_path / "m.safetensors")
    file = open_safetensors(tmp_path / "m.safetensors")
    ref = file.tensors["w"]
    assert ref.dtype == "bfloat16"
    assert ref.read().dtype == STORAGE["bfloat16"]
    np.testing.assert_array_equal(ref.read(), values.view(torch.uint16).numpy())
    file.source.close()


def test_rows_are_rows_of_the_whole(open_bytes: Open) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    ref = open_bytes(save({"first": np.ones(3, np.float32), "w": whole})).tensors["w"]
    for start in range(5):
        for stop in range(start, 5):
            np.testing.assert_array_equal(ref.read_rows(start, stop), whole[start:stop])


def test_tensors_may_lie_in_another_order_than_the_header_names_them(open_bytes: Open) -> None:
    header = {"late": entry(offsets=[8, 16]), "early": entry()}
    file = open_bytes(safetensors(header, np.array([1, 2, 3, 4], "<f4").tobytes()))
    assert list(file.tensors) == ["late", "early"]
    assert file.tensors["late"].read().tolist() == [3, 4]


def test_spaces_after_the_header_are_padding(open_bytes: Open) -> None:
    assert open_bytes(safetensors(json.dumps({"w": entry()}) + "   ", bytes(8))).tensors["w"].shape == (2,)


def test_a_file_without_tensors_is_read(open_bytes: Open) -> None:
    assert open_bytes(safetensors({})).tensors == {}


# --- what is refused -----------------------------------------------------------------------------------------------


def broken(name: str = "w", data: bytes = bytes(8), **changes: Any) -> bytes:
    return safetensors({name: {**entry(), **changes}}, data)


TWO = {"a": entry(), "b": entry(offsets=[8, 16])}

MALFORMED: dict[str, tuple[bytes, type[NpllamaError], str]] = {
    "empty": (b"", EmptyFileError, "0 bytes"),
    "seven bytes": (bytes(7), TruncatedFileError, "has 7 bytes"),
    "length only": (handcraft.u64(40), TruncatedFileError, "has 8 bytes"),
    "zeros": (bytes(600), NotACheckpointError, "zeros"),
    "web page": (b"<html><body>not found</body></html>", NotACheckpointError, "web page"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 16060522240\n",
        NotACheckpointError,
        "git-lfs pointer for an object of 16.1 GB",
    ),
    "gguf": (handcraft.gguf(), NotACheckpointError, "this is a gguf file"),
    "header over 100 MB": (safetensors({}, length=100_000_001), ResourceLimitError, "100000001 bytes"),
    "header of 2^64-1": (safetensors({}, length=2**64 - 1), ResourceLimitError, f"{2**64 - 1} bytes"),
    "header longer than the file": (safetensors({}, length=99), TruncatedFileError, "header of 99 bytes"),
    "header of 0 bytes": (safetensors("{}", length=0), CorruptDataError, "not JSON"),
    "header cut short": (safetensors({"w": entry()}, length=9), CorruptDataError, "not JSON"),
    "header not UTF-8": (safetensors(b'{"\xff": 1}'), CorruptDataError, "not UTF-8 text at byte 2"),
    "header not JSON": (safetensors("{'w': 1}"), CorruptDataError, "not JSON"),
    "header after a space": (safetensors(" {}"), NotACheckpointError, "no checkpoint format"),
    "header is a list": (safetensors("[]"), NotACheckpointError, "no checkpoint format"),
    "header nested deeply": (safetensors('{"w":' * 100_000), CorruptDataError, "nested too deeply"),
    "duplicate tensor": (safetensors('{"w": 1, "w": 1}'), CorruptDataError, "'w' appears twice"),
    "duplicate field": (
        safetensors('{"w": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
        CorruptDataError,
        "'dtype' appears twice",
    ),
    "NaN": (safetensors('{"w": NaN}'), CorruptDataError, "NaN"),
    "description is a number": (safetensors({"w": 3}), CorruptDataError, "w: the description is 3"),
    "field missing": (safetensors({"w": {"dtype": "F32", "shape": [2]}}), CorruptDataError, "w: the description is"),
    "field too many": (broken(stride=[1]), CorruptDataError, "w: the description is"),
    "metadata with a number": (safetensors({"__metadata__": {"a": 1}}), CorruptDataError, "object of strings"),
    "metadata is a list": (safetensors({"__metadata__": []}), CorruptDataError, "object of strings"),
    "unknown dtype": (broken(dtype="F99"), UnsupportedError, "w: stored as F99"),
    "fp8": (broken(dtype="F8_E4M3", data=bytes(2)), UnsupportedError, "w: stored as F8_E4M3"),
    "dtype is a number": (broken(dtype=32), UnsupportedError, "w: stored as 32"),
    "dtype is a list": (broken(dtype=["F32"]), UnsupportedError, "w: stored as "),
    "shape is a number": (broken(shape=2), CorruptDataError, "w: the shape is 2"),
    "fractional dimension": (broken(shape=[2.0]), CorruptDataError, r"w: the shape is \[2.0\]"),
    "bool dimension": (broken(shape=[2, True]), CorruptDataError, r"w: the shape is \[2, True\]"),
    "negative dimension": (broken(shape=[-2, -1]), CorruptDataError, r"w: the shape is \[-2, -1\]"),
    "too many dimensions": (broken(shape=[1] * 9), CorruptDataError, "w: the shape is"),
    "product of dimensions overflows": (broken(shape=[1 << 40, 1 << 40]), CorruptDataError, "w: a shape .* impossible"),
    "product of dimensions overflows beside a 0": (
        broken(shape=[0, 1 << 62], data_offsets=[0, 0]),
        CorruptDataError,
        "w: a shape .* impossible",
    ),
    "one offset": (broken(data_offsets=[0]), CorruptDataError, "w: the offsets are"),
    "negative offset": (broken(data_offsets=[-8, 0]), CorruptDataError, "w: the offsets are"),
    "bool offset": (broken(data_offsets=[False, 8]), CorruptDataError, "w: the offsets are"),
    "offsets reversed": (broken(data_offsets=[8, 0]), CorruptDataError, "w: bytes 8 to 0"),
    "size contradicts the shape": (broken(shape=[3]), CorruptDataError, "w: bytes 0 to 8 .* needs 12"),
    "size contradicts the dtype": (broken(dtype="F16"), CorruptDataError, "w: bytes 0 to 8 .* needs 4"),
    "overlap": (
        safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        CorruptDataError,
        "b: begins at 4 and overlaps",
    ),
    "two tensors in one place": (safetensors({"a": entry(), "b": entry()}, bytes(8)), CorruptDataError, "overlaps"),
    "gap": (
        safetensors({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        CorruptDataError,
        "b: begins at 12 and leaves a gap",
    ),
    "gap at the start": (broken(data_offsets=[4, 12], data=bytes(12)), CorruptDataError, "w: begins at 4"),
    "data one byte short": (safetensors(TWO, bytes(15)), TruncatedFileError, "b: ends at"),
    "no data": (safetensors(TWO), TruncatedFileError, "a: ends at"),
    "offsets past any file": (
        broken(shape=[1 << 58], data_offsets=[0, 1 << 60]),
        TruncatedFileError,
        "w: ends at 115292150460684",
    ),
    "one trailing byte": (safetensors(TWO, bytes(17)), CorruptDataError, "1 unexpected bytes after"),
    "trailing bytes without tensors": (safetensors({}, bytes(3)), CorruptDataError, "3 unexpected bytes"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_a_typed_error_at_little_cost(case: str, tmp_path: Path) -> None:
    content, error, message = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            open_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < (8 << 20) + 4 * len(content)
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def read_all(path: Path) -> bool:
    """Open a file and read every tensor; only a typed error may come out. Tell whether it was accepted."""
    try:
        file = open_safetensors(path)
    except NpllamaError:
        return False
    try:
        for ref in file.tensors.values():
            assert ref.read().shape == ref.shape
    finally:
        file.source.close()
    return True


def accepted_by_the_package(path: Path) -> bool:
    try:
        with safe_open(path, "np") as file:
            return all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118 - not a mapping
    except (SafetensorError, AttributeError, TypeError, KeyError):  # the last three: dtypes that NumPy lacks
        return False


def test_every_truncation_and_every_extension_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2))}, metadata={"k": "v"})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(NpllamaError):
            open_safetensors(path)
    for more in (1, 7, 64):
        path.write_bytes(content + bytes(more))
        with pytest.raises(NpllamaError):
            open_safetensors(path)


def test_a_flipped_header_byte_is_accepted_only_where_the_package_accepts_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = save({"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 2))}, metadata={"k": "v"})
    for position in range(len(content) - 56):
        for flip in (0x01, 0x10, 0x80):
            path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            if read_all(path):
                assert accepted_by_the_package(path), position


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 20) | st.sampled_from(["F32", "BF16", "I8", "w", 2**70, 0.5]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "w"]), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 8), st.integers(0, 16)) | JSON,
    }
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON), data=st.binary(max_size=24))
def test_any_header_gives_a_typed_error_or_what_the_package_accepts(
    tmp_path: Path, header: dict[str, Any], data: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header, data))
    if read_all(path):
        assert accepted_by_the_package(path)
