"""Threads take the work of all decoder layers in turn, unit by unit. See `npllama.kernels.through_layers`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from npllama.dtypes import Array
from npllama.kernels.attend import _UNLIMITED, _merge, _pieces, rows_of_tile
from npllama.kernels.by_address import call_at
from npllama.kernels.jit import compiled
from npllama.kernels.layer_rows import fetch, no_part
from npllama.kernels.layer_units import (
    ATTEND,
    OUT,
    PHASES,
    Plan,
    Shared,
    append,
    blocks_of,
    enter_attention,
    own_of,
    parts_of,
)
from npllama.kernels.simd_atomic import APART, fetch_add, load_acquire, pause
from npllama.kernels.subroutines import subroutine

#: Blocks of rows that are a unit at most; units of a phase for each thread at least. To take a unit, call what does it
#: and tell other cores of it takes as long as a block of a small matrix.
_MOST_BLOCKS, _LEAST_UNITS = 4, 2


class Works(NamedTuple):
    """Addresses of what threads call.

    Attributes
    ----------
    attend, enter, rows : int
        For a unit: a piece of attention, `npllama.kernels.attend`; `npllama.kernels.layer_units.enter_product` and
        `multiply_rows`.
    begin, end : int
        Before the first unit, with the shapes of tiles, and behind the last one; 0 where nothing is to be done.
    ways : ndarray, int64
        See `npllama.kernels.layer_rows.table_of`.
    """

    attend: int
    enter: int
    rows: int
    begin: int
    end: int
    ways: Array


@compiled()
def count_units(plan: Plan, sequences: Array, windows: Array) -> Any:
    """Return the number of the first unit of each phase, behind them that of all units; and the parts of attention."""
    starts = np.empty(PHASES * plan.n_layers + 1, np.int64)
    tile = _queries_of_a_tile(plan)
    at = 0
    for phase in range(PHASES * plan.n_layers):
        starts[phase] = at
        kind, per_unit = phase % PHASES, _blocks_of_unit(plan, phase % PHASES)
        if kind == ATTEND:
            at += len(_pieces(sequences, plan.n_kv_heads, tile, windows[phase // PHASES])[0])
        else:
            at += (blocks_of(plan, kind) + per_unit - 1) // per_unit
    starts[-1] = at
    return starts, _pieces(sequences, plan.n_kv_heads, tile, _UNLIMITED)[1]


@subroutine(inline=True)
def _blocks_of_unit(plan: Plan, kind: int) -> int:
    """Return how many blocks of rows are a unit of a phase; a piece of attention is one by itself."""
    return max(1, min(_MOST_BLOCKS, blocks_of(plan, kind) // (_LEAST_UNITS * plan.n_threads)))


@subroutine(inline=True)
def _queries_of_a_tile(plan: Plan) -> int:
    return rows_of_tile(plan.n_heads // plan.n_kv_heads)


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
    works: Works,
    work: int,
) -> None:
    """Run x through all layers, in place; every thread does what is there to do.

    ``work`` is the address of `take_units`; ``stored`` has the dtype of keys and values.
    """
    for _ in prange(plan.n_threads):
        everything = plan, shared, layers, windows, sequences, cos, sin, shapes, starts, like, stored, works
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
    works: Works,
) -> None:
    """Take units until there are none left."""
    own = own_of(plan, sequences, like)
    pieces = np.empty((0, 8), np.int64)
    tile = _queries_of_a_tile(plan)
    if works.begin != 0:
        call_at(works.begin, (shapes,))
    entered, appended, phase, later = -1, -1, 0, 0
    unit = fetch_add(shared.counters, 0, 1)
    while unit < starts[-1]:
        phase = _phase_of(unit, phase, starts)
        layer, kind = layers[phase // PHASES], phase % PHASES
        following = fetch_add(shared.counters, 0, 1)
        ahead = ahead_too = no_part()
        if following < starts[-1]:
            later = _phase_of(following, later, starts)
            first, _ = _blocks_at(plan, following, later, starts)
            ahead, ahead_too = parts_of(plan, layers[later // PHASES], later % PHASES, first)
        _await(plan, shared.counters, layer, kind, phase, unit, starts)
        if entered != phase:
            entered, appended = phase, -1
            if kind == ATTEND:
                pieces = enter_attention(plan, own, sequences, phase // PHASES, tile, windows)
            else:
                if kind == OUT:
                    pieces = enter_attention(plan, own, sequences, phase // PHASES, tile, windows)
                    _merge(
                        own.sequences,
                        pieces,
                        plan.n_heads // plan.n_kv_heads,
                        shared.parts,
                        shared.peaks,
                        shared.totals,
                        shared.context,
                    )
                call_at(works.enter, (plan, shared, own, layer, kind, like, works.ways))
        if kind == ATTEND:
            line = pieces[_blocks_at(plan, unit, phase, starts)[0]]
            sequence, head = line[0], line[1]
            if appended != plan.n_kv_heads * sequence + head:
                appended = plan.n_kv_heads * sequence + head
                append(plan, shared, layer, own.sequences[sequence], head, cos, sin, like, stored)
            group, window = plan.n_heads // plan.n_kv_heads, windows[phase // PHASES]
            room = shared.parts, shared.peaks, shared.totals, shared.context
            where = shared.turned, own.sequences, line, group, plan.scale, window, stored, None
            call_at(works.attend, (*where, *room))
        else:
            first, stop = _blocks_at(plan, unit, phase, starts)
            call_at(works.rows, (plan, shared, own, layer, kind, first, stop, ahead, ahead_too, works.ways))
        fetch_add(shared.counters, APART * (phase + 1), 1)
        unit = following
    if works.end != 0:
        call_at(works.end, ())


@subroutine(inline=True)
def _phase_of(unit: int, phase: int, starts: Array) -> int:
    """Return the phase of a unit, looked for from an earlier phase on."""
    while starts[phase + 1] <= unit:
        phase += 1
    return phase


@subroutine()
def _blocks_at(plan: Plan, unit: int, phase: int, starts: Array) -> Any:
    """Return which blocks of rows a unit has, the first and what is behind the last; or which piece of attention.

    Each thread in turn begins with the rows of a part of its own, and the next unit's rows come behind those: so what a
    thread reads is one stream, as long as all are equally fast.
    """
    here, n_units = unit - starts[phase], starts[phase + 1] - starts[phase]
    part, place = here % plan.n_threads, here // plan.n_threads
    place += part * (n_units // plan.n_threads) + min(part, n_units % plan.n_threads)
    kind = phase % PHASES
    if kind == ATTEND:
        return place, place + 1
    per_unit = _blocks_of_unit(plan, kind)
    return place * per_unit, min((place + 1) * per_unit, blocks_of(plan, kind))


@subroutine()
def _await(plan: Plan, counters: Array, layer: Array, kind: int, phase: int, unit: int, starts: Array) -> None:
    """Wait until the phase before a unit's is finished; meanwhile fetch the unit's weights from memory."""
    if phase == 0 or load_acquire(counters, APART * phase) == starts[phase] - starts[phase - 1]:
        return
    block, _ = _blocks_at(plan, unit, phase, starts)
    first, second = parts_of(plan, layer, kind, block)
    fetch(first)
    fetch(second)
    while load_acquire(counters, APART * phase) < starts[phase] - starts[phase - 1]:
        pause()
