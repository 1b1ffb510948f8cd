"""The work of all decoder layers, cut into units that threads take in turn. See `npllama.kernels.through_layers`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from npllama.dtypes import Array
from npllama.kernels import simd
from npllama.kernels.activation import _glu
from npllama.kernels.attend import _TILE as _TILE_OF_QUERIES
from npllama.kernels.attend import _UNLIMITED, _merge, _pieces
from npllama.kernels.attend_piece import _matrix_at
from npllama.kernels.by_address import call_at
from npllama.kernels.jit import compiled, narrowed
from npllama.kernels.layer_rows import (
    ROWS,
    Inputs,
    Part,
    add_residual,
    begin,
    copy_block,
    end,
    fetch,
    inputs_room,
    multiply_part,
    no_part,
    part_of,
    prepare,
)
from npllama.kernels.norm import _rms_norm
from npllama.kernels.rope import _apply_rope
from npllama.kernels.simd_atomic import fetch_add, load_acquire, pause

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
_QKV, _ATTEND, _OUT, _GATE_UP, _DOWN = range(5)
_PHASES = 5
#: Numbers from one counter to the next: none shares its cache lines with another.
APART = 16


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


class Works(NamedTuple):
    """Addresses of what units call: `npllama.kernels.attend` for a piece, `enter_product` and `multiply_unit`."""

    attend: int
    enter: int
    rows: int


class Own(NamedTuple):
    """What one thread has to itself: the input normed and taken apart, and the outputs of one or two blocks."""

    inputs: Inputs
    normed: Array
    block: Array
    second: Array
    sequences: Array


@compiled()
def count_units(plan: Plan, sequences: Array, windows: Array) -> Any:
    """Return the number of the first unit of each phase, behind them that of all units; and the parts of attention."""
    starts = np.empty(_PHASES * plan.n_layers + 1, np.int64)
    tile = _queries_of_a_tile(plan)
    q, kv = _units_of(plan.n_heads * plan.head_dim), _units_of(plan.n_kv_heads * plan.head_dim)
    at = 0
    for layer in range(plan.n_layers):
        phase = _PHASES * layer
        starts[phase + _QKV] = at
        at += q + 2 * kv
        starts[phase + _ATTEND] = at
        at += len(_pieces(sequences, plan.n_kv_heads, tile, windows[layer])[0])
        starts[phase + _OUT] = at
        at += _units_of(plan.dim)
        starts[phase + _GATE_UP] = at
        at += _units_of(plan.hidden_dim)
        starts[phase + _DOWN] = at
        at += _units_of(plan.dim)
    starts[-1] = at
    return starts, _pieces(sequences, plan.n_kv_heads, tile, np.int64(_UNLIMITED))[1]


@compiled(inline=True)
def _units_of(m: int) -> int:
    return (m + ROWS - 1) // ROWS


@compiled(inline=True)
def _queries_of_a_tile(plan: Plan) -> int:
    return max(1, _TILE_OF_QUERIES // (plan.n_heads // plan.n_kv_heads))


@compiled(parallel=True)
def run_units(
    plan: Plan,
    shared: Shared,
    layers: Array,
    windows: Array,
    sequences: Array,
    cos: Array,
    sin: Array,
    shapes: Array,
    starts: Array,
    like: Array,
    stored: Array,
    ways: Any,
    works: Works,
    work: int,
) -> None:
    """Run x through all layers, in place; every thread does what is there to do.

    ``work`` is the address of `take_units`; ``stored`` has the dtype of keys and values.
    """
    for _ in prange(plan.n_threads):
        everything = plan, shared, layers, windows, sequences, cos, sin, shapes, starts, like, stored, ways, works
        call_at(work, everything)


@compiled()
def take_units(
    plan: Plan,
    shared: Shared,
    layers: Array,
    windows: Array,
    sequences: Array,
    cos: Array,
    sin: Array,
    shapes: Array,
    starts: Array,
    like: Array,
    stored: Array,
    ways: Any,
    works: Works,
) -> None:
    """Take units until there are none left."""
    own = own_of(plan, sequences, like)
    pieces = np.empty((0, 8), np.int64)
    tile = _queries_of_a_tile(plan)
    begin(shapes, ways[0])
    entered, phase, later = -1, 0, 0
    unit = fetch_add(shared.counters, 0, 1)
    while unit < starts[-1]:
        phase = _phase_of(unit, phase, starts)
        layer, kind = layers[phase // _PHASES], phase % _PHASES
        following = fetch_add(shared.counters, 0, 1)
        ahead = ahead_too = no_part()
        if following < starts[-1]:
            later = _phase_of(following, later, starts)
            block = _block_of(plan, following, later, starts)
            ahead, ahead_too = _parts_of(plan, layers[later // _PHASES], later % _PHASES, block)
        _await(plan, shared.counters, layer, kind, phase, unit, starts)
        if entered != phase:
            entered = phase
            if kind == _ATTEND:
                pieces = _enter_attention(plan, own, sequences, phase // _PHASES, tile, windows)
            else:
                if kind == _OUT:
                    pieces = _enter_attention(plan, own, sequences, phase // _PHASES, tile, windows)
                    _merge(
                        own.sequences,
                        pieces,
                        plan.n_heads // plan.n_kv_heads,
                        shared.parts,
                        shared.peaks,
                        shared.totals,
                        shared.context,
                    )
                call_at(works.enter, (plan, shared, own, layer, kind, like, ways))
        if kind == _ATTEND:
            line = pieces[_block_of(plan, unit, phase, starts)]
            _append(plan, shared, layer, own.sequences[line[0]], line[1], cos, sin, like, stored)
            group, window = plan.n_heads // plan.n_kv_heads, windows[phase // _PHASES]
            room = shared.parts, shared.peaks, shared.totals, shared.context
            where = shared.turned, own.sequences, line, group, plan.scale, window, stored, None
            call_at(works.attend, (*where, *room))
        else:
            block = _block_of(plan, unit, phase, starts)
            call_at(works.rows, (plan, shared, own, layer, kind, block, ahead, ahead_too, like, ways))
        fetch_add(shared.counters, APART * (phase + 1), 1)
        unit = following
    end(ways[0])


@compiled()
def own_of(plan: Plan, sequences: Array, like: Array) -> Own:
    """Return a thread's room, and its copy of the table of sequences."""
    widest = max(plan.dim, max(plan.hidden_dim, plan.n_heads * plan.head_dim))
    return Own(
        inputs_room(plan.n_new, widest, like, plan.rounds, plan.kind),
        np.empty((plan.n_new, plan.dim), np.float32),
        np.empty(plan.n_new * ROWS, np.float32),
        np.empty(plan.n_new * ROWS, np.float32),
        sequences.copy(),
    )


@compiled(inline=True)
def _phase_of(unit: int, phase: int, starts: Array) -> int:
    """Return the phase of a unit, looked for from an earlier phase on."""
    while starts[phase + 1] <= unit:
        phase += 1
    return phase


@compiled()
def _block_of(plan: Plan, unit: int, phase: int, starts: Array) -> Any:
    """Return which rows a unit of a phase has, counted in units.

    Each thread in turn begins with the rows of a part of its own, and the next unit's rows come behind those: so what a
    thread reads is one stream, as long as all are equally fast.
    """
    here, n_units = unit - starts[phase], starts[phase + 1] - starts[phase]
    part, place = here % plan.n_threads, here // plan.n_threads
    return part * (n_units // plan.n_threads) + min(part, n_units % plan.n_threads) + place


@compiled()
def _place(plan: Plan, kind: int, block: int) -> Any:
    """Return of a unit of rows: its matrix, N, its first row, and how many rows from there belong to the unit before.

    The last block of a matrix ends where the matrix does.
    """
    matrix, m, n = _W1, plan.dim, plan.dim
    if kind == _QKV:
        matrix, m = _WQ, plan.n_heads * plan.head_dim
        if block >= _units_of(m):
            block -= _units_of(m)
            matrix, m = _WK, plan.n_kv_heads * plan.head_dim
            if block >= _units_of(m):
                block -= _units_of(m)
                matrix = _WV
    elif kind == _OUT:
        matrix, n = _WO, plan.n_heads * plan.head_dim
    elif kind == _GATE_UP:
        m = plan.hidden_dim
    else:
        matrix, n = _W2, plan.hidden_dim
    row = min(ROWS * block, m - ROWS)
    return matrix, n, row, ROWS * block - row


@compiled()
def _parts_of(plan: Plan, layer: Array, kind: int, block: int) -> Any:
    """Return the parts of matrices that a unit multiplies: one, two or none."""
    if kind == _ATTEND:
        return no_part(), no_part()
    matrix, n, row, _ = _place(plan, kind, block)
    return part_of(layer, matrix, row, n), part_of(layer, _W3, row, n) if kind == _GATE_UP else no_part()


@compiled()
def _await(plan: Plan, counters: Array, layer: Array, kind: int, phase: int, unit: int, starts: Array) -> None:
    """Wait until the phase before a unit's is finished; meanwhile fetch the unit's weights from memory."""
    if phase == 0 or load_acquire(counters, APART * phase) == starts[phase] - starts[phase - 1]:
        return
    first, second = _parts_of(plan, layer, kind, _block_of(plan, unit, phase, starts))
    fetch(first)
    fetch(second)
    while load_acquire(counters, APART * phase) < starts[phase] - starts[phase - 1]:
        pause()


@compiled()
def _enter_attention(plan: Plan, own: Own, sequences: Array, layer: int, tile: int, windows: Array) -> Array:
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
    ways: Any,
) -> None:
    """Take apart what the rows of a phase are multiplied by."""
    inputs = own.inputs
    if kind == _QKV:
        _rms_norm(shared.x, _vector(layer[_ATTENTION_NORM], plan.dim, like), plan.eps, own.normed)
        prepare(own.normed, layer, np.int64(_WQ), np.int64(_WO), inputs, ways)
    elif kind == _OUT:
        context = shared.context.reshape(plan.n_new, plan.n_heads * plan.head_dim)
        prepare(context, layer, np.int64(_WO), np.int64(_W1), inputs, ways)
    elif kind == _GATE_UP:
        _rms_norm(shared.mid, _vector(layer[_FFN_NORM], plan.dim, like), plan.eps, own.normed)
        prepare(own.normed, layer, np.int64(_W1), np.int64(_W2), inputs, ways)
    else:
        prepare(shared.act, layer, np.int64(_W2), np.int64(_W2 + 1), inputs, ways)


@compiled(inline=True)
def _vector(address: int, size: int, like: Array) -> Any:
    return _matrix_at(address, like, 1, size)[0]


@compiled()
def multiply_unit(
    plan: Plan,
    shared: Shared,
    own: Own,
    layer: Array,
    kind: int,
    block: int,
    ahead: Part,
    ahead_too: Part,
    like: Array,
    ways: Any,
) -> None:
    """Do a unit of rows, and fetch two parts for the next one."""
    matrix, n, row, skipped = _place(plan, kind, block)
    multiply_part(plan.n_new, part_of(layer, matrix, row, n), ahead, own.inputs, own.block, ways)
    _add_bias(own.block, layer[_BIAS + matrix] + 4 * row, like)
    if kind == _QKV:
        copy_block(own.block, shared.q if matrix == _WQ else shared.k if matrix == _WK else shared.v, row, skipped)
    elif kind == _GATE_UP:
        multiply_part(plan.n_new, part_of(layer, _W3, row, n), ahead_too, own.inputs, own.second, ways)
        _add_bias(own.second, layer[_BIAS + _W3] + 4 * row, like)
        _glu(own.block, own.second, own.block, plan.activation)
        copy_block(own.block, shared.act, row, skipped)
    elif kind == _OUT:
        add_residual(own.block, shared.x, row)
        copy_block(own.block, shared.mid, row, skipped)
    else:
        add_residual(own.block, shared.mid, row)
        copy_block(own.block, shared.x, row, skipped)


@compiled()
def _add_bias(block: Array, bias: int, like: Array) -> None:
    numbers = _vector(bias, ROWS, like)
    for at in range(0, block.shape[0], 16):
        simd.store(block, at, simd.add(simd.load(block, at), simd.load(numbers, at % ROWS)))


@compiled()
def _append(
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

    Where keys are split into spans, several units of a phase do this, and write the same.
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
