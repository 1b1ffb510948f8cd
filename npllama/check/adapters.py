"""Traces of other frameworks, brought to the names and layouts of the tap table.

Each convention is a row of data: patterns of names, and the order in which its rotated heads come. Layouts need no
convention: the shape that the reference has at a tap tells a batch axis, flattened heads or heads before tokens apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npllama.check.trace import TapEntry, TraceLike
from npllama.check.trace_format import forward_rank, in_forward_order
from npllama.dtypes import Array
from npllama.errors import TapError
from npllama.taps import spec_of

ShapeOf = Callable[[str, int], tuple[int, ...] | None]

_UNKNOWN = 3  # first part of the rank of a name that is no tap's
_ROTATED = ("q", "k", "q_norm", "k_norm", "q_rope", "k_rope")
_DIMENSIONS = {
    "D": "dim",
    "H": "n_heads",
    "K": "n_kv_heads",
    "Dh": "head_dim",
    "F": "hidden_dim",
    "V": "vocab_size",
}
_DIMENSIONS_OF_EXPERTS = {"E": "count", "A": "active", "Fe": "hidden_dim", "Fs": "shared_dim"}
#: Masks made by adding a huge negative number instead of -inf.
_MASKED_BELOW = -1e30


@dataclass(frozen=True, slots=True)
class Convention:
    """How a framework calls its tensors.

    Attributes
    ----------
    title : str
        For people.
    rope_layout : str
        Order of the numbers of a rotated head, unless the trace says otherwise.
    names : mapping of str to str
        Pattern -> tap. ``{i}`` is the layer on both sides. A second tap after ``|`` is meant when the tensor has an
        axis of heads.
    """

    title: str
    rope_layout: str
    names: Mapping[str, str]


def _table(text: str) -> dict[str, str]:
    return dict(line.split() for line in text.strip().splitlines())


# The names of PyTorch modules, as forward hooks see them; `.input` is what a module was given. MLX has the same ones.
_HUGGING_FACE = _table("""
model.embed_tokens                              tok_embeddings
model.layers.{i}.input_layernorm                layers.{i}.attention_norm
model.layers.{i}.self_attn.q_proj               layers.{i}.q
model.layers.{i}.self_attn.k_proj               layers.{i}.k
model.layers.{i}.self_attn.v_proj               layers.{i}.v
model.layers.{i}.self_attn.q_norm               layers.{i}.q_norm
model.layers.{i}.self_attn.k_norm               layers.{i}.k_norm
model.layers.{i}.self_attn.q_rope               layers.{i}.q_rope
model.layers.{i}.self_attn.k_rope               layers.{i}.k_rope
model.layers.{i}.self_attn.scores               layers.{i}.scores
model.layers.{i}.self_attn.attn_weights         layers.{i}.probs
model.layers.{i}.self_attn.o_proj.input         layers.{i}.context
model.layers.{i}.self_attn.o_proj               layers.{i}.attention_out
model.layers.{i}.self_attn                      layers.{i}.attention_out
model.layers.{i}.post_attention_layernorm.input layers.{i}.resid_mid
model.layers.{i}.post_attention_layernorm       layers.{i}.ffn_norm
model.layers.{i}.mlp.gate_proj                  layers.{i}.gate
model.layers.{i}.mlp.up_proj                    layers.{i}.up
model.layers.{i}.mlp.down_proj.input            layers.{i}.ffn_act
model.layers.{i}.mlp.down_proj                  layers.{i}.ffn_out
model.layers.{i}.mlp.gate                       layers.{i}.router_logits
model.layers.{i}.mlp.shared_expert.gate_proj    layers.{i}.shared_gate
model.layers.{i}.mlp.shared_expert.up_proj      layers.{i}.shared_up
model.layers.{i}.mlp.shared_expert.down_proj.input layers.{i}.shared_act
model.layers.{i}.block_sparse_moe.gate          layers.{i}.router_logits
model.layers.{i}.block_sparse_moe               layers.{i}.ffn_out
model.layers.{i}.mlp                            layers.{i}.ffn_out
model.layers.{i}.post_feedforward_layernorm     layers.{i}.ffn_out_norm
model.layers.{i}                                layers.{i}.resid_post
model.norm                                      norm
lm_head                                         logits
""")

# Modules that mean the same in GPT and GPT-2. Their ln_1, ln_2 and whole layers do not: norms stand at other places.
_GPT = _table("""
transformer.wte                                 tok_embeddings
transformer.tokens_embed                        tok_embeddings
transformer.wpe                                 pos_embeddings
transformer.positions_embed                     pos_embeddings
transformer.drop.input                          embeddings
transformer.h.{i}.attn.c_proj.input             layers.{i}.context
transformer.h.{i}.attn.c_proj                   layers.{i}.attention_out
transformer.h.{i}.attn                          layers.{i}.attention_out
transformer.h.{i}.mlp.c_fc                      layers.{i}.up
transformer.h.{i}.mlp.c_proj.input              layers.{i}.ffn_act
transformer.h.{i}.mlp.c_proj                    layers.{i}.ffn_out
transformer.h.{i}.mlp                           layers.{i}.ffn_out
transformer.ln_f                                norm
""")

_META = _table("""
layers.{i}.attention.wq                         layers.{i}.q
layers.{i}.attention.wk                         layers.{i}.k
layers.{i}.attention.wv                         layers.{i}.v
layers.{i}.attention.wo.input                   layers.{i}.context
layers.{i}.attention.wo                         layers.{i}.attention_out
layers.{i}.attention                            layers.{i}.attention_out
layers.{i}.ffn_norm.input                       layers.{i}.resid_mid
layers.{i}.feed_forward.w1                      layers.{i}.gate
layers.{i}.feed_forward.w3                      layers.{i}.up
layers.{i}.feed_forward.w2.input                layers.{i}.ffn_act
layers.{i}.feed_forward.w2                      layers.{i}.ffn_out
layers.{i}.feed_forward                         layers.{i}.ffn_out
layers.{i}                                      layers.{i}.resid_post
output                                          logits
""")

# The names that llama.cpp's graph gives its nodes. Qcur and Kcur name the projection, a flat tensor, and then again
# what RoPE makes of it, which has heads. Its `kq` is neither scaled nor masked, and so is no tap.
_LLAMA_CPP = _table("""
inp_embd                                        tok_embeddings
embd                                            tok_embeddings
attn_norm-{i}                                   layers.{i}.attention_norm
Qcur-{i}                                        layers.{i}.q|layers.{i}.q_rope
Kcur-{i}                                        layers.{i}.k|layers.{i}.k_rope
Vcur-{i}                                        layers.{i}.v
Qcur_normed-{i}                                 layers.{i}.q_norm
Kcur_normed-{i}                                 layers.{i}.k_norm
kq_soft_max-{i}                                 layers.{i}.probs
kq_soft_max_ext-{i}                             layers.{i}.probs
kqv_out-{i}                                     layers.{i}.context
attn_out-{i}                                    layers.{i}.attention_out
ffn_inp-{i}                                     layers.{i}.resid_mid
ffn_norm-{i}                                    layers.{i}.ffn_norm
ffn_gate-{i}                                    layers.{i}.gate
ffn_up-{i}                                      layers.{i}.up
ffn_moe_logits-{i}                              layers.{i}.router_logits
ffn_moe_probs-{i}                               layers.{i}.router_probs
ffn_gate_par-{i}                                layers.{i}.ffn_act
ffn_swiglu-{i}                                  layers.{i}.ffn_act
ffn_out-{i}                                     layers.{i}.ffn_out
l_out-{i}                                       layers.{i}.resid_post
result_norm                                     norm
result_output                                   logits
""")

CONVENTIONS: tuple[Convention, ...] = (
    Convention("Hugging Face or MLX modules", "half-split", _HUGGING_FACE),
    Convention("GPT modules", "interleaved", _GPT),
    Convention("Meta's modules", "interleaved", _META),
    Convention("llama.cpp graph nodes", "interleaved", _LLAMA_CPP),
)


def canonical(name: str, *, heads: bool = False) -> tuple[str, Convention | None] | None:
    """Translate a name.

    Parameters
    ----------
    name : str
        As the framework spells it.
    heads : bool
        The tensor has an axis of heads.

    Returns
    -------
    tap : str
        Canonical name.
    convention : Convention or None
        Whose name it was; None for a canonical one.

    Returns None for a name that no convention knows.
    """
    if forward_rank(name)[0] != _UNKNOWN:
        return name, None
    for convention in CONVENTIONS:
        for pattern, taps in convention.names.items():
            layer = _layer(pattern, name)
            if layer is not None:
                flat, _, with_heads = taps.partition("|")
                return (with_heads if heads and with_heads else flat).format(i=layer), convention
    return None


def _layer(pattern: str, name: str) -> str | None:
    """Return the layer that makes a pattern a name ("" for one without), or None."""
    expression = re.escape(pattern).replace(re.escape("{i}"), "(0|[1-9][0-9]{0,4})")
    found = re.fullmatch(expression, name)
    return None if found is None else "".join(found.groups())


class Adapted:
    """A trace in canonical names and layouts; reads from the original."""

    def __init__(self, original: TraceLike, names: Mapping[tuple[str, int], TapEntry], taps: Sequence[TapEntry],
                 half_split: frozenset[tuple[str, int]]) -> None:  # fmt: skip
        self._original = original
        self._names = names
        self._half_split = half_split
        self.taps: Sequence[TapEntry] = taps
        self._shapes = {(entry.name, entry.step): entry.shape for entry in taps}
        self.tokens: Sequence[int] = original.tokens
        self.prefill: int = original.prefill
        self.steps: int = original.steps
        self.dtype: str = original.dtype
        self.producer: str = original.producer
        self.model: Mapping[str, Any] = original.model

    def read(self, name: str, step: int = 0) -> NDArray[Any]:
        """Return a tensor in the layout of the tap table; TapError if there is none of that name and step."""
        key = (name, step)
        if key not in self._names:
            raise TapError(f"the trace has no tensor {name!r} of step {step}")
        source = self._names[key]
        x = self._original.read(source.name, step)
        # The entry's shape is the wanted one wherever the array could be brought into it.
        x = _arranged(x, self._shapes[key])
        if key in self._half_split and x.ndim == 3:
            x = _interleaved(x)
        if name.endswith(".scores") and (x < _MASKED_BELOW).any():
            x = np.where(x < _MASKED_BELOW, x.dtype.type(-np.inf), x)
        return x


def guide(traces: Sequence[TraceLike]) -> TraceLike:
    """Return the trace that shows best which shapes its taps should have: the first that knows, else the first."""
    return next((trace for trace in traces if _shapes(trace) is not None), traces[0])


def _shapes(trace: TraceLike) -> ShapeOf | None:
    """Return what answers ``shape_of(name, step)`` for a model, as far as a trace shows it.

    From the model's dimensions, if the trace has them under ``model.config``, else from its tensors, if queries have an
    axis of heads.
    """
    config = trace.model.get("config")
    if isinstance(config, dict) and all(type(config.get(key)) is int for key in _DIMENSIONS.values()):
        axes = {letter: int(config[key]) for letter, key in _DIMENSIONS.items()}
        experts = config.get("experts")
        if isinstance(experts, dict):
            known = {letter: experts.get(key) for letter, key in _DIMENSIONS_OF_EXPERTS.items()}
            axes |= {letter: length for letter, length in known.items() if type(length) is int}
        return partial(_shape_in, axes, trace)
    shapes = {(entry.name, entry.step): entry.shape for entry in trace.taps}
    if any(name.endswith((".q", ".q_rope")) and len(shape) == 3 for (name, _), shape in shapes.items()):
        return partial(_listed, shapes)
    return None


def _shape_in(axes: Mapping[str, int], trace: TraceLike, name: str, step: int) -> tuple[int, ...] | None:
    if forward_rank(name)[0] == _UNKNOWN:
        return None
    lengths = {**axes, "T": trace.prefill if step == 0 else 1, "S": trace.prefill + step, "1": 1}
    wanted = spec_of(name).axes
    return tuple(lengths[axis] for axis in wanted) if lengths.keys() >= set(wanted) else None


def _listed(shapes: Mapping[tuple[str, int], tuple[int, ...]], name: str, step: int) -> tuple[int, ...] | None:
    return shapes.get((name, step))


def adapted(trace: TraceLike, *, like: TraceLike) -> tuple[TraceLike, tuple[str, ...]]:
    """Bring a trace to canonical names and layouts.

    Parameters
    ----------
    trace : TraceLike
        Any names that `CONVENTIONS` has; names that none has stay, and are no tap's.
    like : TraceLike
        A trace with the shapes to aim at, best one that `guide` chose. A tensor that cannot be brought into the shape
        that it asks for keeps its own.

    Returns
    -------
    trace : TraceLike
        The same object when there was nothing to do.
    notes : tuple of str
        What was done, for people.
    """
    shape_of = _shapes(like) or partial(_listed, {})
    names: dict[tuple[str, int], TapEntry] = {}
    taps: list[TapEntry] = []
    half: set[tuple[str, int]] = set()
    used: set[str] = set()
    rearranged = 0
    declared = trace.model.get("rope_layout")
    for entry in trace.taps:
        found = canonical(entry.name, heads=_core(entry.shape) >= 3)
        name, convention = (entry.name, None) if found is None else found
        key = (name, entry.step)
        if key in names:  # one tensor under two names, such as `mlp` and `mlp.down_proj`
            continue
        shape = _reachable(entry.shape, shape_of(*key))
        rearranged += shape != entry.shape
        names[key] = entry
        taps.append(TapEntry(name, entry.step, shape, entry.dtype, entry.file))
        if convention is not None:
            used.add(convention.title)
        layout = declared or (convention.rope_layout if convention is not None else "interleaved")
        if layout == "half-split" and name.rpartition(".")[2] in _ROTATED:
            half.add(key)
    notes = []
    if used:
        notes.append(f"names of {', '.join(sorted(used))} were translated")
    if rearranged:
        notes.append(f"{rearranged} tensors had another layout and were rearranged")
    if half:
        notes.append("half-split heads of q and k were brought into interleaved pairs")
    masks = any(name.endswith(".scores") for name, _ in names)
    if not notes and not masks:
        return trace, ()
    return Adapted(trace, names, in_forward_order(taps), frozenset(half)), tuple(notes)


def _core(shape: tuple[int, ...]) -> int:
    """Axes of a tensor without a batch axis of one in front (a lone token's own axis is kept)."""
    extra = 0
    while len(shape) - extra > 3 and shape[extra] == 1:
        extra += 1
    return len(shape) - extra


def _reachable(shape: tuple[int, ...], wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the wanted shape if a tensor of this shape can be brought into it, else its own."""
    return wanted if wanted is not None and _moves(shape, wanted) is not None else shape


def _moves(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool | None:
    """Tell how to get from one shape to another: False by reshaping, True by swapping tokens and heads; None: not."""
    core = shape
    while len(core) > len(wanted) and core[0] == 1:
        core = core[1:]
    flat = len(core) == 3 and core[0] == 1
    if core == wanted:
        return False
    if len(wanted) == 3 and core == (wanted[0], wanted[1] * wanted[2]):
        return False
    if len(wanted) == 3 and flat and core[1:] == (wanted[0], wanted[1] * wanted[2]):
        return False
    if len(wanted) == 3 and core == (wanted[1], wanted[0], wanted[2]):
        return True
    return None


def _arranged(x: Array, wanted: tuple[int, ...]) -> Array:
    swapped = _moves(x.shape, wanted)
    if swapped is None or x.shape == wanted:
        return x
    if swapped:
        x = x.reshape(x.shape[-3:])
        return np.ascontiguousarray(x.swapaxes(0, 1))
    return np.asarray(x).reshape(wanted)


def _interleaved(x: Array) -> Array:
    """Turn heads whose first and second halves make the pairs into heads of adjacent pairs."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    y[..., 0::2], y[..., 1::2] = x[..., :half], x[..., half:]
    return y
