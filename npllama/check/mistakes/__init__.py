"""The bug dictionary: mistakes that implementations of these architectures really make, as data.

Each entry says what the mistake is, how it shows and how to mend it, where its traces begin, and how to plant it into a
run of the float64 truth. `npllama.check.diagnose` searches it for the mistake behind a difference. What a family does
not have cannot be done wrong in its models: such an entry is no mistake there, and is passed over.

All of them are named in float32 runs. In runs that round every tensor to bfloat16 a few cannot be seen; measured with
the loud models of the tests as the largest squared error of a row in units of the rounding, of which a hundred are
needed:

- ``norm-eps``, 1e-6 or less for 1e-5 and the other way, or outside the root: 2 to 7 (embeddings of size 0.05; smaller
  ones would show it);
- ``norm-variance-unbiased``: 25 at a width of 64, and less at greater ones;
- ``softmax-in-low-precision`` and ``router-in-low-precision``: 1.0 in bfloat16, where it is none, and 1.4 in float16;
- ``weights-narrowed`` to float16: 1.0, since bfloat16 weights of ordinary size fit;
- ``wrong-activation``, exact GELU for the one by tanh: 1.0.

A softmax that rounds is not always recognised in a float32 run without the tap probs: which way a number near the
middle of two went shows nowhere else. By the logits alone ``positions-off-by-one`` cannot be seen in any precision,
since RoPE makes distances of positions; the taps q_rope and k_rope show it. And some entries have the same logits:
``silu-of-up`` is ``w1-w3-swapped`` there, ``bias-missing`` of k is nothing at all in a model without RoPE.
"""

from __future__ import annotations

from npllama.check.mistakes import (
    attention,
    bias,
    block,
    cache,
    experts,
    fused,
    learned,
    longrope,
    norm,
    qk_norm,
    rope,
    weights,
    window,
)
from npllama.check.mistakes.entry import Mistake, Way

__all__ = ["DICTIONARY", "Mistake", "Way"]

DICTIONARY: tuple[Mistake, ...] = (
    *weights.ENTRIES,
    *learned.ENTRIES,
    *norm.ENTRIES,
    *fused.ENTRIES,
    *bias.ENTRIES,
    *qk_norm.ENTRIES,
    *rope.ENTRIES,
    *longrope.ENTRIES,
    *cache.ENTRIES,
    *attention.ENTRIES,
    *window.ENTRIES,
    *block.ENTRIES,
    *experts.ENTRIES,
)
