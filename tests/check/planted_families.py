"""Mistakes that only other families than Llama show, planted in the engine; see `tests.check.planted`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import ml_dtypes
import numpy as np

from npllama import ops
from npllama.cache import KVCache
from npllama.config import ModelConfig
from npllama.dtypes import Array, Tensor
from npllama.model import attend, feed_forward, mixture
from npllama.taps import Tap
from npllama.weights import LayerWeights
from tests.check.pieces import config_of, halves_to_pairs, head_by_head, only, operation
from tests.check.wrong_engine import Build, frequencies
from tests.fixtures.loud import half_split

Planter = Callable[[Build], Build]

# --- from other files -----------------------------------------------------------------------------------------------


def without(*parts: str) -> Planter:
    """Leave out the tensors whose names contain one of these parts."""
    return lambda b: replace(
        b, tensors={name: x for name, x in b.tensors.items() if not any(part in name for part in parts)}
    )


def refused(cut: Callable[[Array, Build], Sequence[Array]]) -> Planter:
    """Fuse q, k and v of every layer as Hugging Face does, and cut the rows again; ``cut(rows, build)``."""

    def plant(b: Build) -> Build:
        def halves(x: Array) -> Array:
            return half_split(x, b.config.head_dim) if b.config.positions == "rope" else x

        def pairs(x: Array) -> Array:
            return halves_to_pairs(x, b) if b.config.positions == "rope" else x

        tensors = dict(b.tensors)
        for name in b.tensors:
            if ".attention.wq." in name:
                names = [name.replace("wq", other) for other in ("wq", "wk", "wv")]
                q, k, v = (b.tensors[each] for each in names)
                q, k, v = cut(np.concatenate([halves(q), halves(k), v]), b)
                tensors |= dict(zip(names, (pairs(q), pairs(k), v), strict=True))
        return replace(b, tensors=tensors)

    return plant


def as_if(order: str) -> Planter:
    """Cut the rows of q, k and v as if they stood in another order."""

    def cut(rows: Array, b: Build) -> Sequence[Array]:
        q, k = b.config.n_heads * b.config.head_dim, b.config.n_kv_heads * b.config.head_dim
        sizes = [{"q": q, "k": k, "v": k}[name] for name in order.split()]
        parts = dict(zip(order.split(), np.split(rows, np.cumsum(sizes)[:-1]), strict=True))
        return [parts[name] for name in "qkv"]

    return refused(cut)


def grouped(rows: Array, b: Build) -> Sequence[Array]:
    """Deal the heads out in turn: R for q, one for k, one for v."""
    group, size = b.config.n_heads // b.config.n_kv_heads, b.config.head_dim
    heads = np.split(rows, len(rows) // size)
    dealt: dict[str, list[Array]] = {"q": [], "k": [], "v": []}
    for head, name in zip(heads, cycle(["q"] * group + ["k", "v"]), strict=False):
        dealt[name].append(head)
    return [np.concatenate(dealt[name]) for name in "qkv"]


def every_second(b: Build) -> Build:
    tensors = dict(b.tensors)
    for name in b.tensors:
        if ".feed_forward.w1.weight" in name:
            fused = np.concatenate([b.tensors[name], b.tensors[name.replace("w1", "w3")]])
            tensors[name], tensors[name.replace("w1", "w3")] = fused[::2].copy(), fused[1::2].copy()
    return replace(b, tensors=tensors)


def zeros(x: Array, b: Build) -> Array:
    return np.zeros_like(x)


def in_halves(x: Array, b: Build) -> Array:
    return half_split(x, b.config.head_dim)


# --- other operations -----------------------------------------------------------------------------------------------


def layer_norm_of(rows: Callable[[Array, float], Array]) -> Planter:
    return operation(
        layer_norm=lambda b: (
            lambda x, weight, bias, eps: (rows(x.astype(np.float64), eps) * weight.numbers() + bias.numbers()).astype(
                np.float32
            )
        )
    )


def qk_norms(*norms: Callable[[Array, Tensor, float, int], Array] | None) -> Planter:
    """Use other norms for queries and keys in turn: ``norm(x, weight, eps, heads)``; None for the right one."""

    def make(b: Build) -> Callable[..., Array]:
        turns = cycle(zip(cycle(norms), (b.config.n_heads, b.config.n_kv_heads), strict=False))

        def rms_norm(x: Array, weight: Tensor, eps: float) -> Array:
            if weight.shape == (b.config.dim,):
                return b.base.rms_norm(x, weight, eps)
            norm, heads = next(turns)
            return b.base.rms_norm(x, weight, eps) if norm is None else norm(x, weight, eps, heads)

        return rms_norm

    return operation(rms_norm=make)


def untouched(x: Array, weight: Tensor, eps: float, heads: int) -> Array:
    return x.copy()


def all_heads(x: Array, weight: Tensor, eps: float, heads: int) -> Array:
    """Normalise (T * heads, Dh) by tokens; the weight is that of one head."""
    rows = x.reshape(-1, heads * x.shape[1])
    return ops.rms_norm(rows, Tensor(np.tile(weight.numbers(), heads), "float32"), eps).reshape(x.shape)


def single_heads(x: Array, weight: Tensor, eps: float, heads: int) -> Array:
    """Normalise (T, heads * Dh) head by head; the weight is that of all."""
    one = Tensor(np.ones(x.shape[1] // heads, np.float32), "float32")
    return ops.rms_norm(x.reshape(len(x) * heads, -1), one, eps).reshape(x.shape) * weight.numbers()


def positions_at(place: Callable[[Array], Array]) -> Planter:
    """Look other positions up; the table of positions is told from that of tokens by its length."""

    def make(b: Build) -> Callable[..., Array]:
        def embed(ids: Array, table: Tensor, dtype: Any) -> Array:
            return table.numbers()[place(ids) if table.shape[0] == b.config.max_seq_len else ids]

        return embed

    return operation(embed=make)


def seeing(rule: Callable[[int, int, int], bool], order: Callable[[list[int]], list[int]] = list) -> Planter:
    """Use other windows: ``rule(t, s, W)`` with each layer's W in turn, and 0 for none; ``order`` exchanges them."""

    def make(b: Build) -> Callable[..., Array]:
        turns = cycle(order(list(b.config.windows)))

        def attention(*arrays: Any, **how: Any) -> Array:
            width = next(turns)
            return head_by_head(visible=lambda t, s: s <= t and rule(t, s, width))(b)(*arrays, **how)

        return attention

    return operation(attention=make)


def inside(t: int, s: int, width: int) -> bool:
    return not width or t - s < width


def weighed(change: Callable[[Array], Array]) -> Planter:
    """Change what a router makes of its probabilities, expert by expert and token by token."""

    def make(b: Build) -> Callable[..., Array]:
        def route(probs: Array, n_active: int, renormalise: bool) -> Array:
            found = np.zeros_like(probs)
            for row, out in zip(probs, found, strict=True):
                best = sorted(range(len(row)), key=lambda e: -row[e])[:n_active]
                out[best] = change(row[best])
            return found

        return route

    return operation(route=make)


def asking(more: int) -> Planter:
    def plant(b: Build) -> Build:
        experts = b.config.experts
        assert experts is not None
        return config_of(experts=replace(experts, active=experts.active + more))(b)

    return plant


def router_in(dtype: Any) -> Planter:
    def make(b: Build) -> Callable[..., Array]:
        def linear(x: Array, weight: Tensor, bias: Tensor | None = None) -> Array:
            y = b.base.linear(x, weight, bias)
            assert b.config.experts is not None
            return y.astype(dtype).astype(np.float32) if weight.shape[0] == b.config.experts.count else y

        return linear

    return operation(linear=make)


def tables_with(factors: Callable[[float], tuple[float, float]]) -> Planter:
    """Multiply cosines and sines by ``factors(attention factor)``."""

    def rope_tables(freqs: Array, start: int, count: int, scale: float = 1.0) -> tuple[Array, Array]:
        angles = np.arange(start, start + count, dtype=np.float32)[:, None] * freqs[None]
        cos, sin = (np.float32(factor) for factor in factors(scale))
        return np.cos(angles) * cos, np.sin(angles) * sin

    return operation(rope_tables=lambda b: rope_tables)


def keep_the_cache(cache: KVCache) -> None:
    """Let a text that is being decoded have been long from the beginning."""
    if cache.length:
        cache.horizon = 1000


# --- another block --------------------------------------------------------------------------------------------------


def block_of(
    *, before: bool, behind: bool, inside: bool, skip: str = "", residual: tuple[int, int] = (1, 1)
) -> Planter:
    """Use a decoder block with norms before its steps, behind its sums, or at the output of its steps.

    ``skip`` names the norms that do nothing, with spaces; ``residual`` says how often the stream is added in attention
    and in feed-forward.
    """

    def block(
        x: Array,
        w: LayerWeights,
        i: int,
        rope: tuple[Array, Array] | None,
        cache: KVCache,
        config: ModelConfig,
        ops: Any,
        tap: Tap,
    ) -> Array:
        def norm(which: str, name: str, y: Array) -> Array:
            if which in skip.split():
                return tap(name, y.copy())
            weight, bias = getattr(w, which), getattr(w, f"{which}_bias")
            if bias is None:
                return tap(name, ops.rms_norm(y, weight, config.norm_eps))
            return tap(name, ops.layer_norm(y, weight, bias, config.norm_eps))

        def step(which: str, stem: str, middle: str, x: Array, times: int, run: Callable[[Array], Array]) -> Array:
            y = run(norm(which, which, x) if before else x)
            y = norm(which, f"{stem}_norm", y) if inside else y
            x = tap(middle, sum([x] * times, y))
            return norm(which, f"{middle}_norm", x) if behind else x

        def think(h: Array) -> Array:
            if w.router is not None:
                return mixture(h, w, config.experts, config, ops, tap)
            return feed_forward(h, w, config, ops, tap)

        def look(h: Array) -> Array:
            return attend(h, w, i, rope, cache, config, ops, tap)

        x = step("attention_norm", "attention_out", "resid_mid", x, residual[0], look)
        return step("ffn_norm", "ffn_out", "resid_post", x, residual[1], think)

    return lambda b: replace(b, block=block)


PRE = {"before": True, "behind": False, "inside": False}
POST = {"before": False, "behind": True, "inside": False}
OUTPUT = {"before": False, "behind": False, "inside": True}


def block_like_its_own(**changes: Any) -> Planter:
    """Use a block with the norms where the model has them, and with changes."""
    places = {"pre": PRE, "post": POST, "output": OUTPUT}
    return lambda b: block_of(**{**places[b.config.norm_order], **changes})(b)


def turned_before_norm(b: Build) -> Build:
    """Use an attention in which queries and keys are turned and then normalised."""

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
        def heads(kind: str, weight: Tensor, h: Array) -> Array:
            y = ops.linear(h, weight, getattr(w, f"w{kind}_bias")).reshape(len(h), -1, config.head_dim)
            return tap(kind, y)

        def prepared(kind: str, y: Array, weight: Tensor) -> Array:
            y = tap(f"{kind}_rope", ops.apply_rope(y, *rope))
            flat = y.reshape(-1, weight.shape[0])
            return tap(f"{kind}_norm", ops.rms_norm(flat, weight, config.norm_eps).reshape(y.shape))

        h = tap("attention_norm", ops.rms_norm(x, w.attention_norm, config.norm_eps))
        q, k, v = heads("q", w.wq, h), heads("k", w.wk, h), heads("v", w.wv, h)
        keys, values = cache.append(i, prepared("k", k, w.k_norm), v)
        how = {"divisor": config.head_dim**0.5, "window": None}
        context = tap("context", ops.attention(prepared("q", q, w.q_norm), keys, values, tap, **how))
        x = tap("resid_mid", x + tap("attention_out", ops.linear(context.reshape(len(x), -1), w.wo)))
        h = tap("ffn_norm", ops.rms_norm(x, w.ffn_norm, config.norm_eps))
        return tap("resid_post", x + feed_forward(h, w, config, ops, tap))

    return replace(b, block=block)


#: (mistake, way) -> how it is made in an engine.
PLANTED_IN_FAMILIES: dict[tuple[str, str], Planter] = {
    ("learned-positions-missing", ""): without("pos_embeddings"),
    ("learned-positions-shifted", "one ahead"): only("pos_embeddings", change=lambda x, b: np.roll(x, -1, axis=0)),
    ("learned-positions-shifted", "one ahead while decoding"): positions_at(lambda p: p + (len(p) == 1)),
    ("learned-positions-shifted", "one behind while decoding"): positions_at(lambda p: p - (len(p) == 1)),
    ("learned-positions-shifted", "from zero again while decoding"): positions_at(lambda p: np.arange(len(p))),
    ("norm-keeps-mean", "divided by the root mean square"): layer_norm_of(
        lambda x, eps: x / np.sqrt(np.einsum("td,td->t", x, x)[:, None] / x.shape[1] + eps)
    ),
    ("norm-keeps-mean", "divided by the deviation"): layer_norm_of(
        lambda x, eps: x / np.hypot(x.std(1, keepdims=True), eps**0.5)
    ),
    ("norm-variance-unbiased", ""): layer_norm_of(
        lambda x, eps: (x - x.mean(1, keepdims=True)) / np.hypot(x.std(1, ddof=1, keepdims=True), eps**0.5)
    ),
    ("norm-order", "pre"): block_of(**PRE),
    ("norm-order", "post"): block_of(**POST),
    ("norm-order", "output"): block_of(**OUTPUT),
    ("norm-missing", "attention"): block_like_its_own(skip="attention_norm"),
    ("norm-missing", "feed-forward"): block_like_its_own(skip="ffn_norm"),
    ("norm-missing", "both"): block_like_its_own(skip="attention_norm ffn_norm"),
    **{("qkv-split-order", order): as_if(order) for order in ("k q v", "k v q", "v q k", "v k q", "q v k")},
    ("qkv-split-order", "by key/value heads"): refused(grouped),
    ("gate-up-alternating", ""): every_second,
    ("bias-missing", "q, k and v"): without(".wq.bias", ".wk.bias", ".wv.bias"),
    **{("bias-missing", name): without(f".w{name}.bias") for name in "qkv"},
    ("bias-missing", "attention output"): without(".wo.bias"),
    ("bias-missing", "feed-forward"): without(".w1.bias", ".w2.bias", ".w3.bias"),
    ("bias-missing", "norms"): only("norm.bias", change=zeros),
    ("bias-missing", "output"): without("output.bias"),
    ("bias-doubled", "q, k and v"): only(".wq.bias", ".wk.bias", ".wv.bias", change=lambda x, b: x + x),
    ("bias-doubled", "attention output"): only(".wo.bias", change=lambda x, b: x + x),
    ("bias-doubled", "feed-forward"): only(".w1.bias", ".w2.bias", ".w3.bias", change=lambda x, b: x + x),
    ("bias-row-order", "q and k"): only(".wq.bias", ".wk.bias", change=in_halves),
    ("bias-row-order", "k"): only(".wk.bias", change=in_halves),
    ("qk-norm-missing", "queries and keys"): without("q_norm", "k_norm"),
    ("qk-norm-missing", "queries"): qk_norms(untouched, None),
    ("qk-norm-missing", "keys"): qk_norms(None, untouched),
    ("qk-norm-after-rope", ""): turned_before_norm,
    ("qk-norm-axes", "all heads together"): qk_norms(all_heads),
    ("qk-norm-axes", "each head by itself"): qk_norms(single_heads),
    ("qk-norm-row-order", ""): only("q_norm", "k_norm", change=in_halves),
    ("longrope-switch", "short factors always"): lambda b: replace(b, freqs_long=frequencies(b.config)),
    ("longrope-switch", "long factors always"): lambda b: replace(b, freqs=frequencies(b.config, long=True)),
    ("longrope-cache-kept", ""): lambda b: replace(b, before=keep_the_cache),
    ("longrope-attention-factor", "missing"): tables_with(lambda factor: (1.0, 1.0)),
    ("longrope-attention-factor", "on the cosines only"): tables_with(lambda factor: (factor, 1.0)),
    ("scores-scaled-wrongly", "by sqrt(Dh)"): operation(attention=head_by_head()),
    ("window-off-by-one", "too wide"): seeing(lambda t, s, width: not width or s >= t - width),
    ("window-off-by-one", "too narrow"): seeing(lambda t, s, width: not width or s > t - width + 1),
    ("window-missing", ""): seeing(lambda t, s, width: True),
    ("window-on-wrong-layers", "the next layer's"): seeing(inside, lambda widths: [*widths[1:], widths[0]]),
    ("window-on-wrong-layers", "on every layer"): seeing(inside, lambda widths: [max(widths)] * len(widths)),
    ("residual-missing", "attention"): block_like_its_own(residual=(0, 1)),
    ("residual-missing", "feed-forward"): block_like_its_own(residual=(1, 0)),
    ("residual-missing", "both"): block_like_its_own(residual=(0, 0)),
    ("residual-doubled", "attention"): block_like_its_own(residual=(2, 1)),
    ("residual-doubled", "feed-forward"): block_like_its_own(residual=(1, 2)),
    ("residual-doubled", "both"): block_like_its_own(residual=(2, 2)),
    ("experts-renormalised-wrongly", "left as they are"): weighed(lambda kept: kept),
    ("experts-renormalised-wrongly", "scaled to a sum of one"): weighed(lambda kept: kept / kept.sum()),
    ("experts-active", "one too few"): asking(-1),
    ("experts-active", "one too many"): asking(1),
    ("shared-expert-missing", ""): without(".shared."),
    ("shared-expert-gate", "missing"): operation(sigmoid=lambda b: np.ones_like),
    ("shared-expert-gate", "without sigmoid"): operation(sigmoid=lambda b: np.copy),
    ("router-in-low-precision", "bfloat16"): router_in(ml_dtypes.bfloat16),
    ("router-in-low-precision", "float16"): router_in(np.float16),
}
