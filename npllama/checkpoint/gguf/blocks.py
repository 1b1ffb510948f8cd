"""Tensor encodings of GGUF files, and how the numbers come out of their blocks.

A block-quantised row is a run of blocks; each block holds small integers and the scales that turn them into numbers.
Every formula here is computed in float32 in the order that ggml's reference uses, so that the results agree bit by bit
(https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c, the ``dequantize_row_*`` functions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike, NDArray

from npllama.dtypes import STORAGE, Array

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

#: Numbers decoded at a time: the temporaries then stay in the processor's cache.
_CHUNK = 1 << 17


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a GGUF file stores the numbers of a tensor.

    Attributes
    ----------
    name : str
        ggml's name, for example "Q4_K".
    block_size : int
        Numbers in one block; the last axis of a tensor is a multiple of it.
    layout : numpy dtype
        One block as it lies in the file: a number, or a record with the block's fields.
    dtype : str
        Logical dtype (a key of `npllama.dtypes.STORAGE`) of what `decode` returns.
    unpack : callable or None
        Turns N blocks, a record array of shape (N,), into float32 numbers of shape (N, block_size); None where the
        file holds the numbers themselves.
    """

    name: str
    block_size: int
    layout: np.dtype[np.generic]
    dtype: str
    unpack: Callable[[Array], Floats] | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.layout.itemsize

    def decode(self, raw: Bytes) -> Array:
        """Turn the bytes of N whole blocks into their numbers.

        Parameters
        ----------
        raw : ndarray of shape (N * block_bytes,), uint8

        Returns
        -------
        ndarray of shape (N * block_size,)
            Of the NumPy dtype ``STORAGE[self.dtype]``. Scales that are infinite or NaN yield NaN silently: whoever
            reads the weights counts those.
        """
        blocks = raw.view(self.layout)
        if self.unpack is None:
            return blocks
        numbers = np.empty((len(blocks), self.block_size), np.float32)
        step = _CHUNK // self.block_size
        with np.errstate(invalid="ignore"):
            for start in range(0, len(blocks), step):
                numbers[start : start + step] = self.unpack(blocks[start : start + step])
        return numbers.reshape(-1)


def _scale(halves: Array) -> Floats:
    """Widen one float16 for each block: (N,) -> (N, 1)."""
    return halves.astype(np.float32)[:, None]


def _nibbles(packed: Bytes) -> Bytes:
    """Split bytes into four-bit integers, low halves before high ones: (N, ..., n) -> (N, ..., 2, n)."""
    return np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-2)


def _bit_planes(packed: Bytes, width: int) -> Bytes:
    """Split bytes into integers of ``width`` bits, lowest plane first: (N, ..., n) -> (N, ..., 8 // width, n)."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    planes: Bytes = (packed[..., None, :] >> shifts) & np.uint8((1 << width) - 1)
    return planes


def _fifth_bits(blocks: Array) -> Bytes:
    """Top bits of 32 five-bit integers, where they belong: (N,) -> (N, 32), each 0 or 16."""
    bits: Bytes = np.unpackbits(blocks["high"], axis=-1, bitorder="little") << np.uint8(4)
    return bits


def _scaled(integers: Array, scale: Floats) -> Floats:
    """Multiply the n integers of each block, in equal groups, by a factor for each: (N, groups) -> (N, n)."""
    groups = scale.shape[1]
    numbers = integers.reshape(len(integers), groups, -1).astype(np.float32)
    numbers *= scale[:, :, None]
    return numbers.reshape(len(integers), -1)


def _q4_0(blocks: Array) -> Floats:
    """``d (q - 8)``, 0 <= q < 16."""
    return _scaled(_nibbles(blocks["q"]).view(np.int8) - np.int8(8), _scale(blocks["d"]))


def _q4_1(blocks: Array) -> Floats:
    """``d q + m``, 0 <= q < 16."""
    numbers = _scaled(_nibbles(blocks["q"]), _scale(blocks["d"]))
    numbers += _scale(blocks["m"])
    return numbers


def _q5_0(blocks: Array) -> Floats:
    """``d (q - 16)``, 0 <= q < 32."""
    integers = _nibbles(blocks["q"]).reshape(-1, 32) | _fifth_bits(blocks)
    return _scaled(integers.view(np.int8) - np.int8(16), _scale(blocks["d"]))


def _q5_1(blocks: Array) -> Floats:
    """``d q + m``, 0 <= q < 32."""
    numbers = _scaled(_nibbles(blocks["q"]).reshape(-1, 32) | _fifth_bits(blocks), _scale(blocks["d"]))
    numbers += _scale(blocks["m"])
    return numbers


def _q8_0(blocks: Array) -> Floats:
    """``d q``, -128 <= q < 128."""
    return _scaled(blocks["q"], _scale(blocks["d"]))


def _affine_k(integers: Bytes, blocks: Array) -> Floats:
    """``(d s_g) q - (m t_g)`` for the eight groups g of 32 numbers, the six-bit s and t packed into 12 bytes.

    Bytes 0-3 hold s of groups 0-3 and bytes 4-7 t of groups 0-3 in their lower six bits; their upper two bits are
    the top of s and t of groups 4-7, whose lower four bits are the halves of bytes 8-11.
    """
    packed = blocks["scales"]  # (N, 3, 4)
    first, second, third = packed[:, 0], packed[:, 1], packed[:, 2]
    six, two = np.uint8(0x3F), np.uint8(0x30)
    scales = np.concatenate((first & six, (third & np.uint8(15)) | ((first >> np.uint8(2)) & two)), axis=1)
    offsets = np.concatenate((second & six, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & two)), axis=1)
    numbers = _scaled(integers, _scale(blocks["d"]) * scales.astype(np.float32)).reshape(-1, 8, 32)
    numbers -= (_scale(blocks["m"]) * offsets.astype(np.float32))[:, :, None]
    return numbers.reshape(-1, 256)


def _q4_k(blocks: Array) -> Floats:
    """Affine groups of 32, 0 <= q < 16; bytes 32j to 32j+31 hold group 2j in their low halves, 2j+1 in the high."""
    return _affine_k(_nibbles(blocks["q"]), blocks)


def _q5_k(blocks: Array) -> Floats:
    """As Q4_K with a fifth bit: that of group g is bit g of the 32 bytes of ``high``."""
    high = _bit_planes(blocks["high"], 1) << np.uint8(4)
    return _affine_k(_nibbles(blocks["q"]).reshape(-1, 8, 32) | high, blocks)


def _q6_k(blocks: Array) -> Floats:
    """``(d s_g) (q - 32)`` for 16 groups of 16 numbers, -128 <= s < 128, 0 <= q < 64.

    Each half of the block has 64 bytes of low four bits and 32 bytes of high bits, two for each of 128 numbers.
    """
    high = _bit_planes(blocks["high"], 2) << np.uint8(4)  # (N, 2, 4, 32)
    integers = _nibbles(blocks["q"]).reshape(-1, 2, 4, 32) | high
    return _scaled(integers.view(np.int8) - np.int8(32), _scale(blocks["d"]) * blocks["scales"].astype(np.float32))


def _plain(name: str, dtype: str) -> Encoding:
    return Encoding(name, 1, STORAGE[dtype], dtype)


def _blocks(
    name: str, block_size: int, unpack: Callable[[Array], Floats], *fields: tuple[str, DTypeLike, tuple[int, ...]]
) -> Encoding:
    return Encoding(name, block_size, np.dtype([*fields]), "float32", unpack)


_D = ("d", "<f2", ())
_M = ("m", "<f2", ())
_Q4 = ("q", "u1", (16,))
_Q4K = ("q", "u1", (4, 32))
_HIGH5 = ("high", "u1", (4,))
_SCALES = ("scales", "u1", (3, 4))

#: ggml's type number -> encoding, for those that npllama reads.
ENCODINGS: dict[int, Encoding] = {
    0: _plain("F32", "float32"),
    1: _plain("F16", "float16"),
    2: _blocks("Q4_0", 32, _q4_0, _D, _Q4),
    3: _blocks("Q4_1", 32, _q4_1, _D, _M, _Q4),
    6: _blocks("Q5_0", 32, _q5_0, _D, _HIGH5, _Q4),
    7: _blocks("Q5_1", 32, _q5_1, _D, _M, _HIGH5, _Q4),
    8: _blocks("Q8_0", 32, _q8_0, _D, ("q", "i1", (32,))),
    12: _blocks("Q4_K", 256, _q4_k, _D, _M, _SCALES, _Q4K),
    13: _blocks("Q5_K", 256, _q5_k, _D, _M, _SCALES, ("high", "u1", (32,)), _Q4K),
    14: _blocks("Q6_K", 256, _q6_k, ("q", "u1", (2, 64)), ("high", "u1", (2, 32)), ("scales", "i1", (16,)), _D),
    28: _plain("F64", "float64"),
    30: _plain("BF16", "bfloat16"),
}

#: ggml's type number -> name, for those that npllama knows and does not read.
UNREAD: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
