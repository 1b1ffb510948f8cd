"""What the units of `npllama.kernels.layer_turns` do: some rows of a layer's matrices, or a piece of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npllama.dtypes import Array
from npllama.kernels import simd
from npllama.kernels.activation import _glu
from npllama.kernels.attend import _pieces
from npllama.kernels.attend_piece import _matrix_at
from npllama.kernels.jit import compiled, narrowed
from npllama.kernels.layer_rows import (
    ROWS,
    Inputs,
    Part,
    add_residual,
    copy_block,
    inputs_room,
    multiply_part,
    no_part,
    part_of,
    prepare,
)
from npllama.kernels.norm import _rms_norm
from npllama.kernels.rope import _apply_rope
from npllama.kernels.simd_quantised import load_floats
from npllama.kernels.subroutines import subroutine

#: The matrices of a layer, in the order of the columns of a table of layers; behind those of
#: `npllama.kernels.layer_rows` come the addresses of their biases, then those of the vectors of the norms.
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")
NORMS = ("attention_norm", "ffn_norm", "q_norm", "k_norm")
_WQ, _WK, _WV, _WO, _W1, _W3, _W2 = range(7)
_BIAS = 28
_ATTENTION_NORM, _FFN_NORM, _Q_NORM, _K_NORM = range(35, 39)

#: Columns of a table of sequences; the first seven are those of `npllama.kernels.attend`.
_KEYS, _VALUES, _STRIDE, _HEAD_STRIDE, _COUNT, _LENGTH, _ROW, _LAYER_STRIDE = range(8)

#: The phases of a layer.
QKV, ATTEND, OUT, GATE_UP, DOWN = range(5)
PHASES = 5


class Plan(NamedTuple):
    """What the layers are, and what is asked of them.

    Attributes
    ----------
    n_new, dim, n_heads, n_kv_heads, head_dim, hidden_dim, n_layers : int
        T, D, H, K, Dh, F, L.
    n_threads : int
        Threads that there are.
    activation : int
        Its number in `npllama.kernels.activation`.
    has_qk_norm, rounds : bool
        Queries and keys are normed, head by head; the inputs of products are rounded to bfloat16.
    kind : int
        How vectors are multiplied, see `npllama.kernels.vector_rows`.
    eps, scale : float32
        That of the norms; what scores are multiplied by, in units of ln 2.
    """

    n_new: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    n_layers: int
    n_threads: int
    activation: int
    has_qk_norm: bool
    rounds: bool
    kind: int
    eps: np.float32
    scale: np.float32


class Shared(NamedTuple):
    """Arrays that all threads work on: float32 (T, n), context (T, H, Dh); parts, peaks and totals as in `attend`."""

    x: Array
    mid: Array
    q: Array
    k: Array
    v: Array
    turned: Array
    context: Array
    act: Array
    parts: Array
    peaks: Array
    totals: Array
    counters: Array


class Own(NamedTuple):
    """What one thread has to itself: the input normed and taken apart, the outputs of one or two blocks, and one gated.

    It is a third array: where an output is an input as well, the compiler leaves vector registers aside.
    """

    inputs: Inputs
    normed: Array
    block: Array
    second: Array
    gated: Array
    sequences: Array


@compiled()
def own_of(plan: Plan, sequences: Array, like: Array) -> Own:
    """Return a thread's room, and its copy of the table of sequences."""
    widest = max(plan.dim, max(plan.hidden_dim, plan.n_heads * plan.head_dim))
    return Own(
        inputs_room(plan.n_new, widest, like, plan.rounds, plan.kind),
        np.empty((plan.n_new, plan.dim), np.float32),
        np.empty(plan.n_new * ROWS, np.float32),
        np.empty(plan.n_new * ROWS, np.float32),
        np.empty(plan.n_new * ROWS, np.float32),
        sequences.copy(),
    )


@subroutine(inline=True)
def _blocks_in(m: int) -> int:
    """Return how many blocks a matrix of M rows is."""
    return (m + ROWS - 1) // ROWS


@subroutine(inline=True)
def blocks_of(plan: Plan, kind: int) -> int:
    """Return how many blocks of rows a phase has; those of two matrices that are multiplied together count once."""
    if kind == QKV:
        return _blocks_in(plan.n_heads * plan.head_dim) + 2 * _blocks_in(plan.n_kv_heads * plan.head_dim)
    return _blocks_in(plan.hidden_dim if kind == GATE_UP else plan.dim)


@subroutine()
def _place(plan: Plan, kind: int, block: int) -> Any:
    """Return of a block of rows: its matrix, N, its first row, and how many rows from there belong to the block before.

    The last block of a matrix ends where the matrix does.
    """
    matrix, m, n = _W1, plan.dim, plan.dim
    if kind == QKV:
        matrix, m = _WQ, plan.n_heads * plan.head_dim
        if block >= _blocks_in(m):
            block -= _blocks_in(m)
            matrix, m = _WK, plan.n_kv_heads * plan.head_dim
            if block >= _blocks_in(m):
                block -= _blocks_in(m)
                matrix = _WV
    elif kind == OUT:
        matrix, n = _WO, plan.n_heads * plan.head_dim
    elif kind == GATE_UP:
        m = plan.hidden_dim
    else:
        matrix, n = _W2, plan.hidden_dim
    row = min(ROWS * block, m - ROWS)
    return matrix, n, row, ROWS * block - row


@subroutine()
def parts_of(plan: Plan, layer: Array, kind: int, block: int) -> Any:
    """Return the parts of matrices that a block of a phase is: one, two or none."""
    if kind == ATTEND:
        return no_part(), no_part()
    matrix, n, row, _ = _place(plan, kind, block)
    return part_of(layer, matrix, row, n), part_of(layer, _W3, row, n) if kind == GATE_UP else no_part()


@subroutine(counted=True)
def enter_attention(plan: Plan, own: Own, sequences: Array, layer: int, tile: int, windows: Array) -> Array:
    """Bring the thread's table of sequences to a layer, and return the pieces of attention there."""
    for i in range(len(sequences)):
        own.sequences[i, _KEYS] = sequences[i, _KEYS] + layer * sequences[i, _LAYER_STRIDE]
        own.sequences[i, _VALUES] = sequences[i, _VALUES] + layer * sequences[i, _LAYER_STRIDE]
    pieces: Array = _pieces(own.sequences, plan.n_kv_heads, tile, windows[layer])[0]
    return pieces


@compiled()
def enter_product(
    plan: Plan,
    shared: Shared,
    own: Own,
    layer: Array,
    kind: int,
    like: Array,
    ways: Array,
) -> None:
    """Take apart what the rows of a phase are multiplied by."""
    inputs = own.inputs
    if kind == QKV:
        _rms_norm(shared.x, _vector(layer[_ATTENTION_NORM], plan.dim, like), plan.eps, own.normed)
        prepare(own.normed, layer, _WQ, _WO, inputs, ways)
    elif kind == OUT:
        context = shared.context.reshape(plan.n_new, plan.n_heads * plan.head_dim)
        prepare(context, layer, _WO, _W1, inputs, ways)
    elif kind == GATE_UP:
        _rms_norm(shared.mid, _vector(layer[_FFN_NORM], plan.dim, like), plan.eps, own.normed)
        prepare(own.normed, layer, _W1, _W2, inputs, ways)
    else:
        prepare(shared.act, layer, _W2, _W2 + 1, inputs, ways)


@subroutine(inline=True, counted=True)
def _vector(address: int, size: int, like: Array) -> Any:
    return _matrix_at(address, like, 1, size)[0]


@compiled(counted=False)
def multiply_rows(
    plan: Plan,
    shared: Shared,
    own: Own,
    layer: Array,
    kind: int,
    first: int,
    stop: int,
    ahead: Part,
    ahead_too: Part,
    ways: Array,
) -> None:
    """Do the blocks of rows of a unit, and fetch two parts for the next one."""
    for block in range(first, stop):
        coming, coming_too = ahead, ahead_too
        if block + 1 < stop:
            coming, coming_too = parts_of(plan, layer, kind, block + 1)
        _multiply_block(plan, shared, own, layer, kind, block, coming, coming_too, ways)


@subroutine(inline=True)
def _multiply_block(
    plan: Plan,
    shared: Shared,
    own: Own,
    layer: Array,
    kind: int,
    block: int,
    ahead: Part,
    ahead_too: Part,
    ways: Array,
) -> None:
    """Do a block of rows, and fetch two parts for the next one."""
    matrix, n, row, skipped = _place(plan, kind, block)
    multiply_part(plan.n_new, part_of(layer, matrix, row, n), ahead, own.inputs, own.block, ways)
    _add_bias(own.block, layer[_BIAS + matrix] + 4 * row)
    if kind == QKV:
        copy_block(own.block, shared.q if matrix == _WQ else shared.k if matrix == _WK else shared.v, row, skipped)
    elif kind == GATE_UP:
        multiply_part(plan.n_new, part_of(layer, _W3, row, n), ahead_too, own.inputs, own.second, ways)
        _add_bias(own.second, layer[_BIAS + _W3] + 4 * row)
        _glu(own.block, own.second, own.gated, plan.activation)
        copy_block(own.gated, shared.act, row, skipped)
    elif kind == OUT:
        add_residual(own.block, shared.x, row)
        copy_block(own.block, shared.mid, row, skipped)
    else:
        add_residual(own.block, shared.mid, row)
        copy_block(own.block, shared.x, row, skipped)


@subroutine()
def _add_bias(block: Array, bias: int) -> None:
    for at in range(0, block.shape[0], 16):
        simd.store(block, at, simd.add(simd.load(block, at), load_floats(bias, 4 * (at % ROWS))))


@subroutine(counted=True)
def append(
    plan: Plan,
    shared: Shared,
    layer: Array,
    sequence: Array,
    head: int,
    cos: Array,
    sin: Array,
    like: Array,
    stored: Array,
) -> None:
    """Norm and turn a key/value head's queries and keys of one sequence; write keys and values to the cache.

    Where keys are split into spans, each thread does this before its first one, and all write the same.
    """
    first, count, size = sequence[_ROW], sequence[_COUNT], plan.head_dim
    group = plan.n_heads // plan.n_kv_heads
    queries, key = np.empty((count, group, size), np.float32), np.empty((count, 1, size), np.float32)
    for t in range(count):
        for d in range(group * size):
            queries[t, d // size, d % size] = shared.q[first + t, head * group * size + d]
        for d in range(size):
            key[t, 0, d] = shared.k[first + t, head * size + d]
    turned, turned_key = np.empty_like(queries), np.empty_like(key)
    if plan.has_qk_norm:
        for t in range(count):
            _rms_norm(queries[t], _vector(layer[_Q_NORM], size, like), plan.eps, turned[t])
            _rms_norm(key[t], _vector(layer[_K_NORM], size, like), plan.eps, turned_key[t])
        queries, turned, key, turned_key = turned, queries, turned_key, key
    _apply_rope(queries, cos[first : first + count], sin[first : first + count], turned)
    _apply_rope(key, cos[first : first + count], sin[first : first + count], turned_key)
    offset = head * sequence[_HEAD_STRIDE] + (sequence[_LENGTH] - count) * sequence[_STRIDE]
    width = sequence[_STRIDE] // stored.itemsize
    keys = _matrix_at(sequence[_KEYS] + offset, stored, count, width)
    values = _matrix_at(sequence[_VALUES] + offset, stored, count, width)
    for t in range(count):
        for h in range(group):
            for d in range(size):
                shared.turned[first + t, head * group + h, d] = turned[t, h, d]
        for d in range(size):
            keys[t, d] = narrowed(turned_key[t, 0, d], stored)
            values[t, d] = narrowed(shared.v[first + t, head * size + d], stored)
