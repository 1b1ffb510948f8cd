from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from npllama.checkpoint.gguf.blocks import ENCODINGS, UNREAD, Encoding
from npllama.dtypes import STORAGE, widen

QUANTISED = {number: encoding for number, encoding in ENCODINGS.items() if encoding.unpack is not None}
# Float16 bit patterns: zeros, the smallest subnormal, one, the largest number, infinities, quiet and signalling NaN.
EXTREMES = np.array([0x0000, 0x8000, 0x0001, 0x3C00, 0xFBFF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x7D01], "<u2")


def reference(number: int, raw: NDArray[np.uint8]) -> NDArray[np.uint32]:
    with np.errstate(all="ignore"):
        rows = raw.reshape(-1, ENCODINGS[number].block_bytes)
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number)).reshape(-1).view(np.uint32)


def decoded(encoding: Encoding, raw: NDArray[np.uint8]) -> NDArray[np.uint32]:
    numbers = encoding.decode(raw)
    assert numbers.dtype == np.float32
    return numbers.view(np.uint32)


def named(table: dict[int, Encoding]) -> list[object]:
    return [pytest.param(number, id=encoding.name) for number, encoding in table.items()]


@pytest.mark.parametrize("number", named(ENCODINGS))
def test_names_and_block_sizes_are_those_of_the_gguf_package(number: int) -> None:
    kind, encoding = gguf.GGMLQuantizationType(number), ENCODINGS[number]
    assert encoding.name == kind.name
    assert (encoding.block_size, encoding.block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_every_type_of_the_gguf_package_is_read_or_named() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert kind in ENCODINGS or UNREAD[kind] == kind.name


@pytest.mark.parametrize("number", named(QUANTISED))
def test_random_blocks_decode_to_the_bits_of_the_gguf_package(number: int) -> None:
    encoding = ENCODINGS[number]
    count = (1 << 17) // encoding.block_size + 3  # more than is decoded at a time, and not a multiple of it
    raw = np.random.default_rng(number).integers(0, 256, count * encoding.block_bytes, dtype=np.uint8)
    np.testing.assert_array_equal(decoded(encoding, raw), reference(number, raw))


@pytest.mark.parametrize("number", named(QUANTISED))
def test_extreme_scales_decode_to_the_bits_of_the_gguf_package(number: int) -> None:
    encoding = ENCODINGS[number]
    raw = np.random.default_rng(number).integers(0, 256, len(EXTREMES) ** 2 * encoding.block_bytes, dtype=np.uint8)
    blocks = raw.view(encoding.layout)
    blocks["d"] = np.repeat(EXTREMES, len(EXTREMES)).view("<f2")
    if "m" in (encoding.layout.names or ()):
        blocks["m"] = np.tile(EXTREMES, len(EXTREMES)).view("<f2")
    np.testing.assert_array_equal(decoded(encoding, raw), reference(number, raw))


@pytest.mark.parametrize("number", named(QUANTISED))
@given(data=st.data())
def test_any_block_decodes_to_the_bits_of_the_gguf_package(number: int, data: st.DataObject) -> None:
    encoding = ENCODINGS[number]
    raw = np.frombuffer(data.draw(st.binary(min_size=encoding.block_bytes, max_size=encoding.block_bytes)), np.uint8)
    np.testing.assert_array_equal(decoded(encoding, raw), reference(number, raw))


def test_one_block_of_q4_1_by_hand() -> None:
    halves = np.array([0.5, -1.0], "<f2").tobytes()  # d, m
    packed = bytes(low | (15 - low) << 4 for low in range(16))
    expected = [0.5 * q - 1.0 for q in range(16)] + [0.5 * (15 - q) - 1.0 for q in range(16)]
    assert QUANTISED[3].decode(np.frombuffer(halves + packed, np.uint8)).tolist() == expected


@pytest.mark.parametrize("number", [0, 1, 28, 30])
def test_plain_numbers_keep_their_bits(number: int) -> None:
    encoding = ENCODINGS[number]
    raw = np.random.default_rng(number).integers(0, 256, 64 * encoding.block_bytes, dtype=np.uint8)
    numbers = encoding.decode(raw)
    assert numbers.dtype == STORAGE[encoding.dtype]
    assert numbers.tobytes() == raw.tobytes()


def test_bfloat16_means_what_the_gguf_package_means_by_it() -> None:
    raw = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    numbers = widen(ENCODINGS[30].decode(raw), "bfloat16")
    np.testing.assert_array_equal(numbers.view(np.uint32), reference(30, raw))
