"""The bug dictionary: mistakes that implementations of this architecture really make, as data.

Each entry says what the mistake is, how it shows and how to mend it, where its traces begin, and how to plant it into a
run of the float64 truth. `npllama.check.diagnose` searches it for the mistake behind a difference. A bias of Q, K and V
that was dropped is not in it: no supported family has one.

All of them are named in float32 runs. In runs that round every tensor to bfloat16 three cannot be seen; measured with
the loud models of the tests, over four seeds, as the largest squared error of a row in units of the rounding:

- ``norm-eps``, 1e-6 or less for 1e-5 and the other way: 3 to 7 (embeddings of size 0.05; smaller ones would show it);
- ``softmax-in-low-precision``: 1.0 in bfloat16, where it is none, and 1.4 in float16;
- ``weights-narrowed`` to float16: 1.0, since bfloat16 weights of ordinary size fit.

A softmax that rounds is not always recognised in a float32 run without the tap probs: which way a number near the
middle of two went shows nowhere else. By the logits alone ``positions-off-by-one`` cannot be seen in any precision,
since RoPE makes distances of positions; the taps q_rope and k_rope show it. And some entries have the same logits:
``silu-of-up`` is ``w1-w3-swapped`` there.
"""

from __future__ import annotations

from npllama.check.mistakes import attention, block, cache, norm, rope, weights
from npllama.check.mistakes.entry import Mistake, Way

__all__ = ["DICTIONARY", "Mistake", "Way"]

DICTIONARY: tuple[Mistake, ...] = (
    *weights.ENTRIES,
    *norm.ENTRIES,
    *rope.ENTRIES,
    *cache.ENTRIES,
    *attention.ENTRIES,
    *block.ENTRIES,
)
