"""Mistakes at loading, and in the tokens that are fed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat

import numpy as np

from npllama.check.mistakes.entry import Altered, Array, Mistake, Plant, Way, layers, rounded, shown
from npllama.check.rerun import Rerun
from npllama.dtypes import Tensor
from npllama.weights import LayerWeights

_BLOCK_ROWS = 1 << 13


def layer_order(order: Callable[[int], Sequence[int]]) -> Plant:
    """Run the layers in the order that ``order(L)`` gives, or fewer of them; no mistake when it is the right one."""

    def plant(run: Rerun) -> Rerun | None:
        count = len(run.weights.layers)
        chosen = tuple(order(count))
        changed = tuple(run.weights.layers[i] for i in chosen)
        wrong = changed and chosen != tuple(range(count))
        return replace(run, weights=replace(run.weights, layers=changed)) if wrong else None

    return plant


def transposed(name: str) -> Plant:
    """Use a square matrix the wrong way round in every layer."""

    def flip(layer: LayerWeights) -> LayerWeights:
        weight: Tensor = getattr(layer, name)
        return replace(layer, **{name: Tensor(weight.data.T, weight.dtype)})

    def plant(run: Rerun) -> Rerun | None:
        rows, columns = getattr(run.weights.layers[0], name).shape
        return layers(flip)(run) if rows == columns else None

    return plant


def narrowed(dtype: str) -> Plant:
    """Round every weight to a narrower dtype as it is used, a block of rows at a time."""

    def plant(run: Rerun) -> Rerun | None:
        clean = run.ops

        def part(weight: Tensor, rows: slice) -> Tensor:
            return Tensor(rounded(weight.numbers(rows), dtype), "float32")

        def whole(weight: Tensor) -> Tensor:
            return part(weight, slice(None))

        def linear(x: Array, weight: Tensor, bias: Tensor | None = None) -> Array:
            starts = range(0, weight.shape[0], _BLOCK_ROWS)
            blocks = [clean.linear(x, part(weight, slice(i, i + _BLOCK_ROWS))) for i in starts]
            y = np.concatenate(blocks, axis=1)
            return y if bias is None else y + whole(bias).numbers(to=x.dtype)

        def expert_linear(x: Array, chosen: Array, stack: Tensor, n_experts: int) -> Array:
            mapped = Altered(stack, rows=lambda start, stop: part(stack, slice(start, stop)))
            y: Array = clean.expert_linear(x, chosen, mapped, n_experts)
            return y

        changed = run.with_ops(
            embed=lambda tokens, table, to: rounded(clean.embed(tokens, table, to), dtype),
            rms_norm=lambda x, weight, eps: clean.rms_norm(x, whole(weight), eps),
            layer_norm=lambda x, weight, bias, eps: clean.layer_norm(x, whole(weight), whole(bias), eps),
            linear=linear,
            linears=lambda x, weights, biases: tuple(map(linear, repeat(x), weights, biases)),
            expert_linear=expert_linear,
        )
        return None if run.weights.tok_embeddings.dtype == dtype else changed

    return plant


def keys_for_values(layer: LayerWeights) -> LayerWeights:
    """Exchange what makes keys and what makes values."""
    return replace(layer, wk=layer.wv, wv=layer.wk, wk_bias=layer.wv_bias, wv_bias=layer.wk_bias)


def embedding_as_output(run: Rerun) -> Rerun | None:
    """Use the embedding as output matrix, although the model has one of its own."""
    weights = replace(run.weights, output=run.weights.tok_embeddings)
    return None if run.config.tied else replace(run, weights=weights)


def output_zero(run: Rerun) -> Rerun:
    """Use an output matrix that was never filled."""
    nothing = Tensor(np.broadcast_to(np.float32(0), run.weights.output.shape), "float32")
    return replace(run, weights=replace(run.weights, output=nothing))


def first_token_missing(run: Rerun) -> Rerun | None:
    """Leave out the first token."""
    return replace(run, tokens=run.tokens[1:], prefill=run.prefill - 1) if run.prefill > 1 else None


def first_token_doubled(run: Rerun) -> Rerun | None:
    """Feed the first token twice."""
    changed = replace(run, tokens=(run.tokens[0], *run.tokens), prefill=run.prefill + 1)
    return changed if len(changed.tokens) <= run.config.max_seq_len else None


def by_name(count: int) -> list[int]:
    """Sort the numbers of layers as texts: 0, 1, 10, 11, 2 ..."""
    return sorted(range(count), key=str)


EMBEDDING, FIRST = "tok_embeddings", "layers.0.attention_norm"

ENTRIES = (
    Mistake(
        "bos-missing",
        "The first token is not fed.",
        "The tokens are one fewer; every tensor differs from the embedding on.",
        "Add BOS where the checkpoint's tokenizer says so, once, in one place.",
        (Way("", EMBEDDING, first_token_missing),),
    ),
    Mistake(
        "bos-doubled",
        "The first token is fed twice.",
        "The tokens are one more; every tensor differs from the embedding on.",
        "The chat template and the tokenizer both add BOS: let only one of them.",
        (Way("", EMBEDDING, first_token_doubled),),
    ),
    Mistake(
        "embedding-scaled",
        "The embeddings are multiplied by the square root of the model's width.",
        "tok_embeddings is too large by a constant factor.",
        "Use the embeddings as they are; the factor is another family's (Gemma).",
        (Way("", EMBEDDING, shown(tok_embeddings=lambda x, seen: x * math.sqrt(x.shape[-1]))),),
    ),
    Mistake(
        "weights-narrowed",
        "The weights went through a narrower type than the checkpoint's.",
        "Every tensor is off by that type's rounding, the embedding included.",
        "Keep bfloat16 weights in bfloat16 or float32: float16 loses small and large ones.",
        tuple(Way(dtype, EMBEDDING, narrowed(dtype)) for dtype in ("float16", "bfloat16")),
    ),
    Mistake(
        "wrong-layer-order",
        "The layers run in another order.",
        "The first layer that is in the wrong place differs at its attention_norm already.",
        "Sort layers by number, not by name: 2 comes before 10.",
        (
            Way("sorted by name", "layers.2.attention_norm", layer_order(by_name)),
            Way("last first", FIRST, layer_order(lambda count: range(count)[::-1])),
        ),
    ),
    Mistake(
        "last-layer-missing",
        "The last layer is not run.",
        "Its taps are missing; the final norm is that of the layer before.",
        "Run all n_layers layers.",
        (Way("", "norm", layer_order(lambda count: range(count - 1))),),
    ),
    Mistake(
        "weight-transposed",
        "A square matrix is used the wrong way round.",
        "The product with it differs at every position, its input is right.",
        "Checkpoints store (outputs, inputs): y = x · Wᵀ.",
        (
            Way("wq", "layers.0.q", transposed("wq")),
            Way("wk", "layers.0.k", transposed("wk")),
            Way("wv", "layers.0.v", transposed("wv")),
            Way("wo", "layers.0.attention_out", transposed("wo")),
        ),
    ),
    Mistake(
        "k-v-swapped",
        "The matrices of keys and values are exchanged.",
        "k holds what v should before RoPE, and the other way round.",
        "wk is k_proj, wv is v_proj; a fused projection is split in the order q, k, v.",
        (Way("", "layers.0.k", layers(keys_for_values)),),
    ),
    Mistake(
        "wrong-output-matrix",
        "The logits are computed with another matrix than the model's.",
        "Everything up to the final norm is right, the logits are not.",
        "Use output.weight; use the embedding if and only if the model is tied.",
        (Way("the embedding", "logits", embedding_as_output), Way("zeros", "logits", output_zero)),
    ),
)
