"""All decoder layers of a plain model for a few new tokens, in one parallel region.

A token of a small model is hundreds of short kernels, between which memory stands idle. Here the work of all layers is
one sequence of **units**: some rows of a matrix, or a piece of attention. Units of one kind in one layer are a
**phase**; each layer has five::

    norm; rows of wq, wk, wv -> q, k, v            norm; rows of w1 and w3; gate -> act
    turn, append to the cache; attention           rows of w2; + mid -> x
    rows of wo; + x -> mid

Threads take units in their order, from one counter. A unit begins when the phase before its own is finished, which a
counter for each phase tells; a thread that waits for that fetches the unit's weights from memory. It takes its next
unit before it begins with one, so that the weights of the next are on their way while it multiplies.

Since every thread does its units in order, the first one that is not done can always be done: the work ends with as
many threads as come, even one. What a phase needs prepared (the input normed and packed) each thread prepares for
itself, while it holds a unit of the phase. Nobody is a phase further then, so what it reads stays as it is.

The numbers are those of the kernels for single operations, bit by bit: the same functions compute them, and an output
is one sum in one order, whoever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from npllama.dtypes import PACKINGS, Array
from npllama.kernels import byte_columns, byte_rows, vector_rows
from npllama.kernels.activation import KINDS
from npllama.kernels.attend import _UNLIMITED, few_for, rows_of_tile
from npllama.kernels.by_address import address_of
from npllama.kernels.byte_rows import Rows
from npllama.kernels.features import choose, host_features
from npllama.kernels.jobs import FORMS
from npllama.kernels.layer_rows import ROWS, Part, configure, release, table_of
from npllama.kernels.layer_turns import Works, count_units, run_units, take_units
from npllama.kernels.layer_units import MATRICES, NORMS, Plan, Shared, enter_product, multiply_rows, own_of
from npllama.kernels.memory import aligned
from npllama.kernels.simd_atomic import APART
from npllama.kernels.tiles import _STEP, _shapes
from npllama.kernels.tiles import _TILE as _TILE_OF_TOKENS

#: Bytes of a row of D numbers from which on going layer by layer is faster in tiles, by 10 % where D is 2048; where D
#: is 576 it is 30 % slower. A page of memory: from then on the processor foresees by itself what will be read.
_WIDE = 4096
_NUMBERS = np.empty(0, np.float32)  # only its dtype matters: that of vectors
#: dtypes of keys and values -> an array of the dtype that kernels see.
_STORED: dict[str, Array] = {"float32": _NUMBERS, "bfloat16": np.empty(0, np.uint16)}
#: Ways to multiply (`npllama.kernels.layer_rows`) -> the tokens of a pass.
_MOST_TOKENS = {
    "tiles": _TILE_OF_TOKENS,
    "vectors": vector_rows.FEW,
    "exact": byte_rows.FEW,
    "rounded": byte_columns.FEW,
}


class ThroughLayers:
    """The decoder layers of one model, ready to be run through at once.

    Parameters
    ----------
    weights : Weights
        Those of a model that `through_layers` knows.
    config : ModelConfig
    ways : mapping of str to str
        How matrices of a storage type are multiplied: see `npllama.kernels.layer_rows`.
    path, activations : str
        See `npllama.kernels.features` and `npllama.rounding`.
    """

    def __init__(self, weights: Any, config: Any, ways: Mapping[str, str], path: str, activations: str) -> None:
        self._config = config
        self._path = path
        self._rounds = activations == "bfloat16"
        pairs = self._rounds and path == "avx512bf16"  # as in `npllama.kernels.matmul.ROUNDED`
        self._kind = vector_rows.PAIRS if pairs else vector_rows.HALVES
        widest = max(config.dim, config.hidden_dim, config.n_heads * config.head_dim)
        # Adding -0 changes no number, not even a zero: it stands for a bias that is not there.
        self._nothing = np.full(widest, -0.0, np.float32)
        self._vectors: list[Array] = []  # whatever the table points to must live
        self._weights = weights
        self._layers = np.array([self._addresses(layer) for layer in weights.layers], np.int64)
        self._ways = dict(ways)
        self._most_tokens = min(_MOST_TOKENS[way] for way in ways.values())
        if path == "amx" and "exact" in ways.values():
            self._most_tokens = 1  # several go faster in tiles, see `npllama.kernels.matmul.PRODUCTS`
        self._works: dict[str, tuple[Works, int]] = {}
        self._windows = np.array([config.window(i) or _UNLIMITED for i in range(config.n_layers)], np.int64)

    def _addresses(self, layer: Any) -> list[int]:
        """Return a line of the table of layers; see `npllama.kernels.layer_units.MATRICES`."""
        matrices = [getattr(layer, name) for name in MATRICES]
        vectors = [getattr(layer, f"{name}_bias") for name in MATRICES] + [getattr(layer, name) for name in NORMS]
        numbers = [self._nothing if vector is None else vector.numbers() for vector in vectors]
        self._vectors += numbers
        arrays = (
            [matrix.data for matrix in matrices]
            + [matrix.data if matrix.scales is None else matrix.scales for matrix in matrices]
            + [matrix.data if matrix.minima is None else matrix.minima for matrix in matrices]
        )
        forms = [FORMS[matrix.dtype] for matrix in matrices]
        return [array.ctypes.data for array in arrays] + forms + [row.ctypes.data for row in numbers]

    def __call__(self, x: Array, rope: tuple[Array, Array], cache: Any) -> Array | None:
        """Run all layers, and write the new positions to the cache.

        Parameters
        ----------
        x : ndarray of shape (T, D), float32
            Embeddings.
        rope : (cos, sin), ndarrays of shape (T, Dh/2), float32
        cache : KVCache or Lanes
            Has room for the new positions, which it does not count yet.

        Returns
        -------
        ndarray of shape (T, D), float32, or None
            None where nothing was done: for many tokens, or caches that are neither all float32 nor all bfloat16.
        """
        caches, counts = getattr(cache, "caches", (cache,)), getattr(cache, "counts", (len(x),))
        if len(x) > self._most_tokens:
            return None
        rooms = [own.room() for own in caches]
        dtype = rooms[0].dtype.name
        if dtype not in _STORED or any(room.dtype.name != dtype for room in rooms):
            return None
        sequences = _table(rooms, counts, [own.length for own in caches])
        plan = self._plan(len(x))
        starts, n_parts = count_units(plan, sequences, self._windows)
        shared = self._shared(x, n_parts, max(counts), len(starts))
        cos, sin = (np.ascontiguousarray(table, np.float32) for table in rope)
        shapes = _shapes(len(x))
        arguments = (
            *(plan, shared, self._layers, self._windows, sequences, cos, sin),
            *(shapes, starts, _NUMBERS, _STORED[dtype]),
        )
        if dtype not in self._works:  # other types are always the same
            works = self._find_works(plan, shared, sequences, shapes, dtype)
            self._works[dtype] = works, address_of(take_units, *arguments, works)
        run_units(*arguments, *self._works[dtype])
        return shared.x

    def _find_works(self, plan: Plan, shared: Shared, sequences: NDArray[np.int64], shapes: Array, dtype: str) -> Works:
        """Compile what units call, and return where it is."""
        own, part = own_of(plan, sequences, _NUMBERS), Part(1, 1, Rows(1, 1, 1))
        entering = plan, shared, own, self._layers[0], 1
        has_tiles = "tiles" in self._ways.values()
        ways = table_of(self._ways, own.normed, own.inputs, own.block)
        enter = address_of(enter_product, *entering, _NUMBERS, ways)
        multiply = address_of(multiply_rows, *entering, 1, 1, part, part, ways)
        # Last: of the two processes that compile for a model, the other one begins with attention.
        attend = few_for(_STORED[dtype].dtype.name, self._path)
        tiles = (address_of(configure, shapes), address_of(release)) if has_tiles else (0, 0)
        return Works(attend, enter, multiply, *tiles, ways)

    def _plan(self, n_new: int) -> Plan:
        config = self._config
        return Plan(
            n_new,
            config.dim,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
            config.hidden_dim,
            config.n_layers,
            numba.get_num_threads(),
            KINDS[config.activation],
            config.qk_norm == "head",
            self._rounds,
            self._kind,
            np.float32(config.norm_eps),
            np.float32(math.log2(math.e) / math.sqrt(config.score_dim or config.head_dim)),
        )

    def _shared(self, x: Array, n_parts: int, most: int, n_counters: int) -> Shared:
        config, n_new = self._config, len(x)
        group = config.n_heads // config.n_kv_heads
        part_rows = min(most, rows_of_tile(group))
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

        def rows(*shape: int) -> Array:
            numbers: Array = aligned(math.prod(shape), _NUMBERS).reshape(shape)
            return numbers

        shared = Shared(
            x=rows(n_new, config.dim),
            mid=rows(n_new, config.dim),
            q=rows(n_new, width),
            k=rows(n_new, kv_width),
            v=rows(n_new, kv_width),
            turned=rows(n_new, config.n_heads, config.head_dim),
            context=rows(n_new, config.n_heads, config.head_dim),
            act=rows(n_new, config.hidden_dim),
            parts=rows(n_parts * part_rows, group, config.head_dim),
            peaks=rows(n_parts, part_rows * group),
            totals=rows(n_parts, part_rows * group),
            counters=np.zeros(APART * (n_counters + 1), np.int64),
        )
        shared.x[:] = x
        return shared


def through_layers(weights: Any, config: Any) -> ThroughLayers | None:
    """Return what runs a model's layers as one operation, or None for a model that goes layer by layer.

    Parameters
    ----------
    weights : Weights
    config : ModelConfig
        Known are models with RMSNorm before each step, RoPE, a gated feed-forward layer and no experts, with matrices
        in bfloat16, int8 and int4, on a processor with AVX-512 or AVX2 (with a matrix unit, D below 2048).
    """
    return through_layers_by(choose(host_features()), weights, config)


def through_layers_by(path: str, weights: Any, config: Any, *, activations: str = "float32") -> ThroughLayers | None:
    """Do `through_layers` with the kernels of one path, and the inputs of products rounded to ``activations``.

    See `npllama.kernels.features` and `npllama.rounding`.
    """
    plain = config.norm == "rms" and config.norm_order == "pre" and config.gated and config.experts is None
    if path == "portable" or not plain or config.positions != "rope" or config.qk_norm == "projection":
        return None
    matrices = [getattr(layer, name) for layer in weights.layers for name in MATRICES]
    fits = all(
        matrix.shape[0] >= ROWS and matrix.shape[1] >= _STEP and all(part.flags.c_contiguous for part in matrix.parts)
        for matrix in matrices
    )
    found = {matrix.dtype: _way(path, activations, matrix.dtype) for matrix in matrices}
    ways = {dtype: way for dtype, way in found.items() if way is not None}
    if len(ways) < len(found) or not fits or ("tiles" in ways.values() and 2 * config.dim >= _WIDE):
        return None
    return ThroughLayers(weights, config, ways, path, activations)


def _way(path: str, activations: str, dtype: str) -> str | None:
    """Return how a storage type is multiplied, or None where all layers at once can't do it."""
    if dtype == "bfloat16":
        return None if activations == "int8" else "tiles" if path == "amx" else "vectors"
    if dtype not in PACKINGS:
        return None
    return "rounded" if activations == "int8" else "exact"


def _table(rooms: list[Array], counts: Any, lengths: list[int]) -> NDArray[np.int64]:
    """Return a line for each sequence: see `npllama.kernels.layer_units`."""
    table = np.empty((len(rooms), 8), np.int64)
    row = 0
    for i, (room, count, length) in enumerate(zip(rooms, counts, lengths, strict=True)):
        values, layer, head, position, _ = room.strides
        keys = room.ctypes.data
        table[i] = keys, keys + values, position, head, count, length + count, row, layer
        row += count
    return table
