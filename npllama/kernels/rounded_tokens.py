"""A few tokens rounded to int8, laid out for rows of int8 and int4 weights (`npllama.kernels.byte_columns`).

The 64 numbers of a token that meet one group of weights are integers times a step of their own, see
`npllama.rounding`. Up to eight tokens are a **party**; parties follow one another, and in each one the groups do. A
group has the integers of each token, behind these the steps of all, what their sums of products begin with (see
`npllama.kernels.simd_blocks.NOTHING`), and the sums of the numbers that their integers stand for.

The integers are a line of int8; two lines of int16 where several tokens meet int8 weights and no instruction
multiplies bytes.
"""

from __future__ import annotations

import numpy as np

from npllama.dtypes import GROUP, Array
from npllama.kernels import simd
from npllama.kernels.jit import compiled
from npllama.kernels.jobs import FORMS
from npllama.kernels.llvm import DOTS
from npllama.kernels.rounded import int8_lanes
from npllama.kernels.simd_blocks import NOTHING
from npllama.kernels.simd_groups import widen_bytes
from npllama.kernels.subroutines import subroutine
from npllama.kernels.vector_rows import tokens_of
from npllama.kernels.vector_squares import LINE, excess

#: Tokens of a party, at most.
PARTY = 8

#: Numbers of each kind behind the integers, at least: what meets columns is loaded four at a time.
_FEW = 4
_INT8, _INT4 = FORMS["int8"], FORMS["int4"]


@subroutine(inline=True)
def integers_bytes(count: int, is_int4: bool) -> int:
    """Return the bytes of the integers of a group of so many tokens; behind them stand the steps."""
    return LINE * count * (2 if not DOTS and not is_int4 and count > 1 else 1)


@subroutine(inline=True)
def numbers_pitch(count: int) -> int:
    """Return the bytes from the steps of so many tokens to what their sums begin with, and from there to their sums."""
    return 4 * max(count, _FEW)


@subroutine(inline=True)
def group_bytes(count: int, is_int4: bool) -> int:
    """Return the bytes of a group of so many tokens, in whole cache lines."""
    return integers_bytes(count, is_int4) + max(LINE, 4 * numbers_pitch(count))


@compiled()
def tokens_bytes(groups: int, is_int4: bool, n_new: int) -> int:
    """Return how many bytes so many tokens take."""
    whole = n_new // PARTY
    rest = n_new - PARTY * whole
    size = whole * group_bytes(PARTY, is_int4)
    return groups * (size + (group_bytes(tokens_of(rest), is_int4) if rest > 0 else 0))


@compiled()
def round_tokens(x: Array, is_int4: bool, room: Array) -> None:
    """Round tokens x (T, N) to int8 for weights of a dtype; ``room`` has as many bytes as `tokens_bytes` says."""
    n_new, width = x.shape
    groups, too_large = (width + GROUP - 1) // GROUP, excess(_INT4 if is_int4 else _INT8)
    padded = np.zeros(GROUP, np.float32)
    numbers, spare = np.int64(x.ctypes.data), np.int64(padded.ctypes.data)
    room[:] = 0
    for t in range(n_new):
        first = t // PARTY * PARTY
        count = tokens_of(min(PARTY, n_new - first))
        place = np.int64(room.ctypes.data) + tokens_bytes(groups, is_int4, first)
        steps, pitch = integers_bytes(count, is_int4), numbers_pitch(count)
        are_shorts = steps > LINE * count
        line, here = steps // count * (t - first), steps + 4 * (t - first)
        for g in range(groups):
            source, n_left = numbers + 4 * (t * width + GROUP * g), width - GROUP * g
            if n_left < GROUP:
                for j in range(n_left):
                    padded[j] = x[t, GROUP * g + j]
                source = spare
            step, total = int8_lanes(source, place + line)
            if are_shorts:
                widen_bytes(place + line)
            simd.store_one(place, here, step)
            simd.store_one(place, here + pitch, np.int32(NOTHING - (0 if are_shorts else too_large * total)))
            simd.store_one(place, here + 2 * pitch, np.float32(total) * step)
            place += group_bytes(count, is_int4)
