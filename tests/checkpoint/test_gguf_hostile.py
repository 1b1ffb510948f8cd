from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npllama.checkpoint.gguf.file import open_gguf
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
from tests.checkpoint.handcraft import (
    ARRAY,
    BOOL,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    array,
    pair,
    string,
    tensor,
    u32,
    u64,
)

Q4_0, BF16, IQ2_XXS = 2, 30, 16
ALIGNMENT = "general.alignment"
ONE = tensor("t", [4])
DATA = bytes(16)
NESTED = array(ARRAY, 1, b"") * 10_000

MALFORMED: dict[str, tuple[bytes, type[NpllamaError], str]] = {
    "empty": (b"", EmptyFileError, "0 bytes"),
    "other magic": (handcraft.gguf(magic=b"GGML"), NotACheckpointError, "47 47 4d 4c"),
    "web page": (b"<!DOCTYPE html><html>", NotACheckpointError, "web page"),
    "safetensors": (handcraft.safetensors({}), NotACheckpointError, "safetensors"),
    "magic only": (b"GGUF", TruncatedFileError, "4 bytes are needed"),
    "version 0": (handcraft.gguf(version=0), UnsupportedError, "version 0"),
    "version 1": (handcraft.gguf(version=1), UnsupportedError, "version 1"),
    "future version": (handcraft.gguf(version=4), UnsupportedError, "version 4"),
    "big endian": (handcraft.gguf(version=3 << 24), UnsupportedError, "big-endian"),
    "2^63 pairs": (handcraft.gguf(n_pairs=1 << 63), CorruptDataError, f"{1 << 63} metadata pairs"),
    "2^64-1 tensors": (handcraft.gguf(n_tensors=(1 << 64) - 1), CorruptDataError, f"{(1 << 64) - 1} tensors"),
    "one pair too many": (handcraft.gguf([pair("k", UINT32, u32(1))], n_pairs=2), CorruptDataError, "pair 1@.*0 bytes"),
    "key of 2^60 bytes": (handcraft.gguf([u64(1 << 60) + bytes(99)]), CorruptDataError, "name has"),
    "key past the end": (handcraft.gguf([u64(60_000) + bytes(99)]), TruncatedFileError, "60008 bytes are needed"),
    "empty key": (handcraft.gguf([pair("", UINT32, u32(1))]), CorruptDataError, "name has 0 bytes"),
    "key not UTF-8": (handcraft.gguf([pair(b"k\xff", UINT32, u32(1))]), CorruptDataError, "not UTF-8"),
    "duplicate key": (handcraft.gguf([pair("k", UINT32, u32(1))] * 2), CorruptDataError, "'k'.*twice"),
    "value type 13": (handcraft.gguf([pair("k", 13, bytes(16))]), CorruptDataError, "value type 13"),
    "negative value type": (
        handcraft.gguf([pair("k", 2**32 - 1, bytes(16))]),
        CorruptDataError,
        "value type 4294967295",
    ),
    "bool of 2": (handcraft.gguf([pair("k", BOOL, b"\x02")]), CorruptDataError, "bool has the value 2"),
    "string of 2^60": (
        handcraft.gguf([pair("k", STRING, u64(1 << 60))]),
        TruncatedFileError,
        f"{(1 << 60) + 8} bytes are needed",
    ),
    "string not UTF-8": (handcraft.gguf([pair("k", STRING, string(b"\xc3"))]), CorruptDataError, "'k'@.*not UTF-8"),
    "array of 2^63 numbers": (
        handcraft.gguf([pair("k", ARRAY, array(UINT64, 1 << 63, b""))]),
        TruncatedFileError,
        "bytes are needed",
    ),
    "array of 2^63 strings": (
        handcraft.gguf([pair("k", ARRAY, array(STRING, 1 << 63, b""))]),
        TruncatedFileError,
        "bytes are needed",
    ),
    "array of bools of 2": (
        handcraft.gguf([pair("k", ARRAY, array(BOOL, 3, b"\0\1\2"))]),
        CorruptDataError,
        "bool has the value 2",
    ),
    "array of type 13": (handcraft.gguf([pair("k", ARRAY, array(13, 1, bytes(8)))]), CorruptDataError, "value type 13"),
    "arrays 10,000 deep": (handcraft.gguf([pair("k", ARRAY, NESTED)]), UnsupportedError, "array of arrays"),
    "second string of an array not UTF-8": (
        handcraft.gguf([pair("k", ARRAY, array(STRING, 2, string("a") + string(b"\x80")))]),
        CorruptDataError,
        "string 1 is not UTF-8",
    ),
    "alignment 0": (handcraft.gguf([pair(ALIGNMENT, UINT32, u32(0))]), CorruptDataError, "alignment is 0"),
    "alignment 3": (handcraft.gguf([pair(ALIGNMENT, UINT32, u32(3))]), CorruptDataError, "alignment is 3"),
    "alignment of a wrong type": (
        handcraft.gguf([pair(ALIGNMENT, UINT64, u64(32))]),
        CorruptDataError,
        "alignment has value type 10",
    ),
    "alignment of 2^31": (
        handcraft.gguf([pair(ALIGNMENT, UINT32, u32(1 << 31))], [ONE], DATA),
        TruncatedFileError,
        "begin at 2147483648",
    ),
    "tensor name of 65 bytes": (
        handcraft.gguf([], [tensor("n" * 65, [4])], DATA),
        CorruptDataError,
        "name has 65 bytes, expected 1 to 64",
    ),
    "tensor without a name": (handcraft.gguf([], [tensor("", [4])], DATA), CorruptDataError, "name has 0 bytes"),
    "duplicate tensor": (
        handcraft.gguf([], [ONE, tensor("t", [4], offset=32)], bytes(48)),
        CorruptDataError,
        "'t'.*two tensors",
    ),
    "five dimensions": (handcraft.gguf([], [tensor("t", [1] * 5)], DATA), CorruptDataError, "5 dimensions"),
    "2^32-1 dimensions": (
        handcraft.gguf([], [string("t") + u32(2**32 - 1) + bytes(64)], DATA),
        CorruptDataError,
        "4294967295 dimensions",
    ),
    "dimension of 0": (handcraft.gguf([], [tensor("t", [4, 0])], DATA), CorruptDataError, "shape of 0 x 4"),
    "negative dimension": (handcraft.gguf([], [tensor("t", [2**64 - 4])], DATA), CorruptDataError, "impossible"),
    "product of dimensions overflows": (
        handcraft.gguf([], [tensor("t", [1 << 32, 1 << 32])], DATA),
        CorruptDataError,
        "4294967296 x 4294967296 is impossible",
    ),
    "product of dimensions wraps to 4": (
        handcraft.gguf([], [tensor("t", [4, (1 << 62) + 1])], DATA),
        CorruptDataError,
        "impossible",
    ),
    "bytes overflow": (handcraft.gguf([], [tensor("t", [1 << 62])], DATA), TruncatedFileError, "18446744073709551616"),
    "padded size wraps": (
        handcraft.gguf([], [tensor("t", [(1 << 62) - 1])], DATA),
        TruncatedFileError,
        "18446744073709551612",
    ),
    "unknown tensor type": (
        handcraft.gguf([], [tensor("t", [4], 777)], DATA),
        UnsupportedError,
        "'t'.*unknown type 777",
    ),
    "negative tensor type": (handcraft.gguf([], [tensor("t", [4], 2**32 - 1)], DATA), UnsupportedError, "4294967295"),
    "type that is not read": (
        handcraft.gguf([], [tensor("t", [256], IQ2_XXS)], bytes(66)),
        UnsupportedError,
        "'t'.*IQ2_XXS.*Q4_K",
    ),
    "row not a multiple of the block": (
        handcraft.gguf([], [tensor("t", [33, 32], Q4_0)], bytes(18 * 33)),
        CorruptDataError,
        "row of 33 numbers is not a multiple of Q4_0's 32",
    ),
    "first offset not 0": (
        handcraft.gguf([], [tensor("t", [4], offset=32)], bytes(64)),
        CorruptDataError,
        "at 32, but 0 is the next",
    ),
    "offset not aligned": (
        handcraft.gguf([], [ONE, tensor("u", [4], offset=16)], bytes(64)),
        CorruptDataError,
        "'u'.*at 16, but 32 is the next",
    ),
    "tensors overlap": (
        handcraft.gguf([], [ONE, tensor("u", [4], offset=0)], bytes(64)),
        CorruptDataError,
        "at 0, but 32 is the next",
    ),
    "tensors leave a gap": (
        handcraft.gguf([], [ONE, tensor("u", [4], offset=64)], bytes(128)),
        CorruptDataError,
        "at 64, but 32 is the next",
    ),
    "offset of 2^64-32": (
        handcraft.gguf([], [ONE, tensor("u", [4], offset=2**64 - 32)], bytes(64)),
        CorruptDataError,
        "but 32 is the next",
    ),
    "data one byte short": (handcraft.gguf([], [ONE], DATA[1:]), TruncatedFileError, "'t'.*16 bytes begin at"),
    "no data": (handcraft.gguf([], [ONE]), TruncatedFileError, "'t'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_a_typed_error_at_little_cost(case: str, tmp_path: Path) -> None:
    content, error, message = MALFORMED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def test_a_header_larger_than_any_real_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    count = 200 << 20
    path.write_bytes(handcraft.gguf(n_pairs=1)[:24] + pair("k", ARRAY, array(UINT8, count, b"")))
    with path.open("r+b") as file:
        file.truncate(count + 100)
    with pytest.raises(ResourceLimitError, match="larger than"):
        open_gguf(path)


def sample() -> bytes:
    """Spell a small file that has something of everything."""
    pairs = [
        pair("general.architecture", STRING, string("llama")),
        pair("k", UINT32, u32(5)),
        pair("b", BOOL, b"\x01"),
        pair("tokens", ARRAY, array(STRING, 3, string("a") + string("Ġb") + string(""))),
        pair("types", ARRAY, array(UINT8, 3, b"\1\2\3")),
    ]
    lines = [tensor("a", [4, 2]), tensor("q", [32, 2], Q8_0, offset=32), tensor("v", [3], BF16, offset=128)]
    return handcraft.gguf(pairs, lines, bytes(range(134)))


def read_all(path: Path) -> None:
    """Open a file and read every tensor; only a typed error may come out."""
    try:
        file = open_gguf(path)
    except NpllamaError:
        return
    try:
        for ref in file.tensors.values():
            assert ref.read().shape == ref.shape
    finally:
        file.source.close()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = sample()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(NpllamaError):
            open_gguf(path)


def test_every_flipped_byte_gives_a_typed_error_or_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    content = sample()
    for position in range(len(content) - 134):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
            read_all(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=300), pairs=st.integers(0, 4), tensors=st.integers(0, 4))
def test_arbitrary_bytes_after_the_counts_give_a_typed_error(
    tmp_path: Path, tail: bytes, pairs: int, tensors: int
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(handcraft.gguf(n_pairs=pairs, n_tensors=tensors)[:24] + tail)
    read_all(path)
