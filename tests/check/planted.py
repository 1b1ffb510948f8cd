"""The mistakes of the bug dictionary, made once more: in the engine, and by other means than the dictionary's.

The dictionary changes a run of the textbook in float64, mostly at its taps and operations. Here a float32 engine is
built wrong: from other files, with another configuration, with operations of its own, with an altered copy of the
decoder block. What both make of a model must be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np

from npllama.cache import KVCache
from npllama.config import ModelConfig, RopeScaling
from npllama.dtypes import Array, Tensor, narrow
from npllama.taps import Tap
from npllama.weights import LayerWeights
from tests.check.pieces import config_of, halves_to_pairs, head_by_head, only, operation, tensors
from tests.check.planted_families import PLANTED_IN_FAMILIES
from tests.check.wrong_engine import Build, frequencies
from tests.fixtures.loud import LOUD_TOKENS, half_split

# --- pieces of wrong engines ----------------------------------------------------------------------------------------


def scaled_by(factor: float) -> Callable[[Build], Build]:
    def plant(b: Build) -> Build:
        own = b.config.rope_scaling or RopeScaling("llama3", original_max_seq_len=8192)
        return config_of(rope_scaling=replace(own, factor=factor))(b)

    return plant


def renamed(name_of: Callable[[str], str]) -> Callable[[Build], Build]:
    """Read each tensor from under another one's name."""
    return lambda b: replace(b, tensors={name: b.tensors[name_of(name)] for name in b.tensors})


def swapped(first: str, second: str) -> Callable[[Build], Build]:
    def other(name: str) -> str:
        here, there = (first, second) if f".{first}." in name else (second, first)
        return name.replace(f".{here}.", f".{there}.")

    return renamed(other)


def layer_from(source: Callable[[int, int], int]) -> Callable[[Build], Build]:
    """Let layer i hold what the file has of layer ``source(i, L)``."""

    def plant(b: Build) -> Build:
        def other(name: str) -> str:
            parts = name.split(".")
            if parts[0] == "layers":
                parts[1] = str(source(int(parts[1]), b.config.n_layers))
            return ".".join(parts)

        return renamed(other)(b)

    return plant


def turned(angles: Callable[[Array, Array], Array], pairs: str = "adjacent") -> Callable[..., Array]:
    """Return an ``apply_rope`` by complex numbers: ``angles(cos, sin)`` are unit numbers (T, Dh/2)."""

    def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        parts = (x[..., ::2], x[..., 1::2]) if pairs == "adjacent" else (x[..., :half], x[..., half:])
        z = (parts[0] + 1j * parts[1]).astype(np.complex64) * angles(cos, sin).astype(np.complex64)[:, None]
        if pairs == "halves":
            return np.concatenate([z.real, z.imag], -1)
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    return apply_rope


def alternating(*turn: bool) -> Callable[[Build], Callable[..., Array]]:
    """Return an ``apply_rope`` that works for queries and keys in turn, as they are called for."""

    def make(b: Build) -> Callable[..., Array]:
        turns = cycle(turn)
        rope = b.base.apply_rope
        return lambda x, cos, sin: rope(x, cos, sin) if next(turns) else x.copy()

    return make


def table_at(place: Callable[[int], int]) -> Callable[[Build], Callable[..., Any]]:
    """Return a ``rope_tables`` that reads a long table in the wrong place."""

    def make(b: Build) -> Callable[..., Any]:
        def rope_tables(freqs: Array, start: int, count: int) -> tuple[Array, Array]:
            angles = np.arange(-1, 200, dtype=np.float32)[:, None] * freqs[None]
            first = place(start) + 1
            return np.cos(angles[first : first + count]), np.sin(angles[first : first + count])

        return rope_tables

    return make


def values_turned(b: Build) -> Callable[..., Array]:
    def attention(q: Array, keys: Array, values: Array, tap: Tap, **how: Any) -> Array:
        angles = np.arange(len(values), dtype=np.float32)[:, None] * frequencies(b.config)[None]
        rotate = turned(lambda cos, sin: cos + 1j * sin)
        return b.base.attention(q, keys, rotate(values, np.cos(angles), np.sin(angles)), tap, **how)

    return attention


def block_with(*, merge: str = "T H Dh", cached: str = "turned") -> Callable[[Build], Build]:
    """Use a decoder block that was copied and changed by hand.

    ``merge`` is the order in which heads are written out, ``cached`` says which keys are kept.
    """

    def block(
        x: Array,
        w: LayerWeights,
        i: int,
        rope: tuple[Array, Array],
        cache: KVCache,
        config: ModelConfig,
        ops: Any,
        tap: Tap,
    ) -> Array:
        t = x.shape[0]
        h = tap("attention_norm", ops.rms_norm(x, w.attention_norm, config.norm_eps))
        q = tap("q", ops.linear(h, w.wq).reshape(t, config.n_heads, -1))
        k = tap("k", ops.linear(h, w.wk).reshape(t, config.n_kv_heads, -1))
        v = tap("v", ops.linear(h, w.wv).reshape(t, config.n_kv_heads, -1))
        q = tap("q_rope", ops.apply_rope(q, *rope))
        new = tap("k_rope", ops.apply_rope(k, *rope))
        keys, values = cache.append(i, k if cached == "raw" else new, v)
        keys = np.concatenate([keys[: len(keys) - t], new])
        context = tap("context", ops.attention(q, keys, values, tap))
        context = context if merge == "T H Dh" else np.ascontiguousarray(context.transpose(1, 0, 2))
        out = tap("attention_out", ops.linear(context.reshape(t, -1), w.wo))
        x = tap("resid_mid", x + out)
        h = tap("ffn_norm", ops.rms_norm(x, w.ffn_norm, config.norm_eps))
        gate, up = tap("gate", ops.linear(h, w.w1)), tap("up", ops.linear(h, w.w3))
        out = tap("ffn_out", ops.linear(tap("ffn_act", ops.glu(gate, up, "silu")), w.w2))
        return tap("resid_post", x + out)

    return lambda b: replace(b, block=block)


class LateWrites(KVCache):
    """A cache whose newest slot still holds zeros when it is read, but for the prompt."""

    def append(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        keys, values = super().append(layer, k, v)
        if self.length == 0:
            return keys, values
        keys, values = keys.copy(), values.copy()
        keys[self.length :], values[self.length :] = 0, 0
        return keys, values


def skip_a_slot(n_prompt: int) -> Callable[[KVCache], None]:
    """Let decoding begin one position further on."""

    def before(cache: KVCache) -> None:
        if cache.length == n_prompt:
            cache.advance(1)

    return before


def acting(function: Callable[[Array], Array]) -> Callable[[Build], Build]:
    """Use another activation, with a gate or without."""
    return operation(
        glu=lambda b: lambda gate, up, activation: function(gate).astype(np.float32) * up,
        activate=lambda b: lambda x, activation: function(x).astype(np.float32),
    )


def erf_gelu(x: Array) -> Array:
    return np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.ravel().tolist()]).reshape(x.shape)


def tanh_gelu(x: Array) -> Array:
    return x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x.astype(np.float64) + 0.044715 * x.astype(np.float64) ** 3)))


def layer_norm(x: Array, weight: Tensor, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + np.float32(eps)) * weight.numbers()


def bare_norm(x: Array, weight: Tensor, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))


def without_final_norm(b: Build) -> Build:
    """Skip the norm of the weight that is the model's last."""
    last = b.tensors["norm.weight"]

    def rms_norm(x: Array, weight: Tensor, eps: float) -> Array:
        if np.array_equal(weight.numbers(), Tensor(narrow(last, b.dtype), b.dtype).numbers()):
            return x.copy()
        return b.base.rms_norm(x, weight, eps)

    return b.with_ops(rms_norm=rms_norm)


def heads_inside_out(rows: Array, b: Build) -> Array:
    """Take row d*H + h for the row of head h, number d."""
    dim = b.config.head_dim
    order = [d * (len(rows) // dim) + h for h in range(len(rows) // dim) for d in range(dim)]
    return rows[order]


def through(dtype: Any) -> Callable[[Array, Build], Array]:
    return lambda x, b: x.astype(dtype).astype(np.float32)


def flipped(name: str) -> Callable[[Build], Build]:
    return only(f".{name}.", change=lambda x, b: np.ascontiguousarray(x.T))


def as_text(i: int, n_layers: int) -> int:
    return int(sorted(str(n) for n in range(n_layers))[i])


def tied_output(b: Build) -> Build:
    return replace(b, tensors={**b.tensors, "output.weight": b.tensors["tok_embeddings.weight"]})


def zero_output(b: Build) -> Build:
    return replace(b, tensors={**b.tensors, "output.weight": np.zeros_like(b.tensors["tok_embeddings.weight"])})


def fewer_layers(b: Build) -> Build:
    return replace(b, config=replace(b.config, n_layers=b.config.n_layers - 1))


#: What is in the order of RoPE.
TURNED = ("wq", "wk", "q_norm", "k_norm")
ones = lambda x, b: np.ones_like(x)

#: (mistake, way) -> how it is made in an engine whose prompt has `LOUD_TOKENS` tokens.
PLANTED: dict[tuple[str, str], Callable[[Build], Build]] = {
    ("bos-missing", ""): lambda b: replace(b, prompt=lambda tokens: tokens[1:]),
    ("bos-doubled", ""): lambda b: replace(b, prompt=lambda tokens: np.r_[tokens[0], tokens]),
    ("embedding-scaled", ""): operation(
        embed=lambda b: lambda tokens, table, dtype: table.numbers()[tokens] * np.float32(b.config.dim**0.5)
    ),
    ("weights-narrowed", "float16"): tensors(lambda name, x, b: through(np.float16)(x, b)),
    ("weights-narrowed", "bfloat16"): tensors(lambda name, x, b: through(ml_dtypes.bfloat16)(x, b)),
    ("wrong-layer-order", "sorted by name"): layer_from(as_text),
    ("wrong-layer-order", "last first"): layer_from(lambda i, n: n - 1 - i),
    ("last-layer-missing", ""): fewer_layers,
    **{("weight-transposed", name): flipped(name) for name in ("wq", "wk", "wv", "wo")},
    ("k-v-swapped", ""): swapped("wk", "wv"),
    ("wrong-output-matrix", "the embedding"): tied_output,
    ("wrong-output-matrix", "zeros"): zero_output,
    ("norm-eps", "1e-05"): config_of(norm_eps=1e-5),
    ("norm-eps", "1e-06"): config_of(norm_eps=1e-6),
    ("norm-eps", "1e-08"): config_of(norm_eps=1e-8),
    ("norm-eps", "0"): operation(rms_norm=lambda b: lambda x, weight, eps: bare_norm(x, weight, 0) * weight.numbers()),
    ("norm-eps", "outside the root"): operation(
        rms_norm=lambda b: (
            lambda x, weight, eps: weight.numbers() * x / (np.sqrt((x * x).mean(-1, keepdims=True)) + eps)
        )
    ),
    ("norm-weight-ignored", "all"): operation(rms_norm=lambda b: bare_norm),
    ("norm-weight-ignored", "attention_norm"): only("attention_norm.weight", change=ones),
    ("norm-weight-ignored", "ffn_norm"): only("ffn_norm.weight", change=ones),
    ("norm-weight-ignored", "norm"): tensors(lambda name, x, b: np.ones_like(x) if name == "norm.weight" else x),
    ("norm-weight-plus-one", ""): operation(
        rms_norm=lambda b: lambda x, weight, eps: bare_norm(x, weight, eps) * (weight.numbers() + 1)
    ),
    ("norm-subtracts-mean", ""): operation(rms_norm=lambda b: layer_norm),
    ("norm-weights-swapped", ""): swapped("attention_norm", "ffn_norm"),
    ("final-norm-missing", ""): without_final_norm,
    **{("rope-theta", f"{value:.0f}"): config_of(rope_theta=value) for value in (1e4, 1e5, 5e5, 1e6)},
    ("rope-scaling-missing", ""): config_of(rope_scaling=None),
    ("rope-scaling-factor", "8"): scaled_by(8.0),
    ("rope-scaling-factor", "32"): scaled_by(32.0),
    ("rope-on-halves", ""): operation(apply_rope=lambda b: turned(lambda cos, sin: cos + 1j * sin, "halves")),
    ("rope-row-order", "left in halves"): only(*TURNED, change=lambda x, b: half_split(x, b.config.head_dim)),
    ("rope-row-order", "permuted twice"): only(*TURNED, change=halves_to_pairs),
    ("rope-backwards", ""): operation(apply_rope=lambda b: turned(lambda cos, sin: cos - 1j * sin)),
    ("rope-missing", "queries and keys"): operation(apply_rope=alternating(False)),
    ("rope-missing", "queries"): operation(apply_rope=alternating(False, True)),
    ("rope-missing", "keys"): operation(apply_rope=alternating(True, False)),
    ("rope-on-values", ""): operation(attention=values_turned),
    ("positions-off-by-one", "one ahead"): operation(rope_tables=table_at(lambda start: start + 1)),
    ("positions-off-by-one", "one behind"): operation(rope_tables=table_at(lambda start: start - 1)),
    ("positions-at-decode", "one ahead"): operation(rope_tables=table_at(lambda start: start + 1 if start else 0)),
    ("positions-at-decode", "one behind"): operation(rope_tables=table_at(lambda start: start - 1 if start else 0)),
    ("positions-at-decode", "from zero again"): operation(rope_tables=table_at(lambda start: 0)),
    ("keys-cached-before-rope", ""): block_with(cached="raw"),
    ("cache-hole", "slot behind the prompt skipped"): lambda b: replace(b, before=skip_a_slot(LOUD_TOKENS)),
    ("cache-hole", "row of the positions skipped, too"): lambda b: replace(b, before=skip_a_slot(LOUD_TOKENS)),
    ("cache-hole", "newest slot read before it is written"): lambda b: replace(b, cache=LateWrites),
    ("kv-heads-tiled", ""): operation(attention=head_by_head(kv_head=lambda h, b: h % b.config.n_kv_heads)),
    ("heads-split-wrongly", "q"): only(".wq.", change=heads_inside_out),
    ("heads-split-wrongly", "q, k and v"): only(".wq.", ".wk.", ".wv.", change=heads_inside_out),
    ("heads-merged-wrongly", ""): block_with(merge="H T Dh"),
    ("mask-off-by-one", "sees one token ahead"): operation(attention=head_by_head(visible=lambda t, s: s <= t + 1)),
    ("mask-off-by-one", "does not see itself"): operation(
        attention=head_by_head(visible=lambda t, s: s < t or t == s == 0)
    ),
    ("mask-missing", ""): operation(attention=head_by_head(visible=lambda t, s: True)),
    ("scores-not-scaled", ""): operation(attention=head_by_head(scale=lambda config: 1.0)),
    ("scores-scaled-wrongly", "by Dh"): operation(attention=head_by_head(scale=lambda config: 1 / config.head_dim)),
    ("scores-scaled-wrongly", "by sqrt(D)"): operation(attention=head_by_head(scale=lambda config: config.dim**-0.5)),
    ("softmax-in-low-precision", "bfloat16"): operation(attention=head_by_head(dtype=ml_dtypes.bfloat16)),
    ("softmax-in-low-precision", "float16"): operation(attention=head_by_head(dtype=np.float16)),
    ("w1-w3-swapped", ""): swapped("w1", "w3"),
    ("silu-of-up", ""): operation(glu=lambda b: lambda gate, up, activation: gate * (up / (1 + np.exp(-up)))),
    ("wrong-activation", "SiLU"): acting(lambda x: x * (1 / (1 + np.exp(-x)))),
    ("wrong-activation", "GELU, by tanh"): acting(tanh_gelu),
    ("wrong-activation", "GELU, exact"): acting(erf_gelu),
    ("wrong-activation", "ReLU"): acting(lambda x: np.where(x > 0, x, 0)),
    ("wrong-activation", "none"): acting(lambda x: x),
    **PLANTED_IN_FAMILIES,
}
