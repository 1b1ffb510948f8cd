"""Models of transformers that hide nothing, and their float64 truth: what a converted checkpoint of them is held to.

transformers lowers norms, softmax and the router to float32 whatever the dtype. Where it serves as a truth, that is
lifted: its code runs, and its lowering finds nothing to lower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from npllama.check.trace import MemoryTrace
from npllama.checkpoint.quantize import quantize
from npllama.config import ModelConfig
from npllama.dtypes import PACKINGS, Tensor

#: Family -> class of its language model, where it is not called ``...ForCausalLM``.
_LANGUAGE_MODELS = {"GPT2": "GPT2LMHeadModel", "OpenAIGPT": "OpenAIGPTLMHeadModel"}


def build(family: str, settings: Mapping[str, Any], seed: int = 0) -> Any:
    """Return a loud model in float32: ``family`` as transformers spells its classes."""
    config = getattr(transformers, f"{family}Config")(
        **settings, attn_implementation="eager", experts_implementation="eager"
    )
    model = getattr(transformers, _LANGUAGE_MODELS.get(family, f"{family}ForCausalLM"))(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_loud(name, parameter, model.config, generator))
    return model.eval()


def _loud(name: str, like: torch.Tensor, config: Any, generator: torch.Generator) -> torch.Tensor:
    """Return numbers for a parameter that let every mistake show."""
    normal = torch.randn(like.shape, generator=generator)
    if name.endswith("bias"):
        return 0.5 * normal
    if like.ndim == 1:  # the weight of a norm
        return torch.rand(like.shape, generator=generator) + 0.5
    if any(part in name for part in ("embed", "wte", "wpe")):
        return 0.05 * normal
    values = normal / like.shape[-2 if _is_transposed(name) else -1] ** 0.5
    if any(part in name for part in ("q_proj", "k_proj", "gate.weight")):
        values *= 2
    elif "qkv_proj" in name:
        values[: -config.num_key_value_heads * config.hidden_size // config.num_attention_heads] *= 2
    elif "c_attn" in name:
        values[:, : 2 * config.n_embd] *= 2
    return values


def _is_transposed(name: str) -> bool:
    """Tell whether a parameter is of a Conv1D, which keeps its matrix transposed."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def rounded(model: Any, dtype: str) -> Any:
    """Return a copy of a model with the numbers that a store of ``dtype`` keeps of its weights, in float32.

    Integers share scales along the rows of a matrix, so it does not matter that a store has other rows together.
    """
    model = deepcopy(model)
    if dtype == "bf16":
        return model.to(torch.bfloat16).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if dtype in PACKINGS and parameter.ndim > 1 and not name.endswith("gate.weight"):  # routers stay exact
                rows = parameter.mT if _is_transposed(name) else parameter
                rows.copy_(_as_integers(rows, dtype))
    return model


def _as_integers(rows: torch.Tensor, dtype: str) -> torch.Tensor:
    values = np.ascontiguousarray(rows.numpy())
    data, *rest = quantize(values.reshape(-1, values.shape[-1]), dtype)
    scales, minima = (*rest, None)[:2]
    found = Tensor(data, dtype, scales, minima, values.shape[-1]).numbers()
    return torch.from_numpy(found.reshape(values.shape))


@contextmanager
def lifted(model: Any) -> Iterator[None]:
    """Let a float64 model compute in float64 throughout."""

    def softmax(x: torch.Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
        return torch.softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    def to_float(x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.float64 else x.to(torch.float32)

    with (
        mock.patch("torch.nn.functional.softmax", softmax),
        mock.patch("torch.Tensor.float", to_float),
    ):
        norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
        for module in norms:
            module.forward = _rms_norm(module)
        try:
            yield
        finally:
            for module in norms:
                del module.forward


def _rms_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight

    return forward


@dataclass(frozen=True, slots=True)
class Rope:
    """How a model of transformers turns queries and keys.

    Attributes
    ----------
    short, long : ndarray of shape (Dh/2,)
        Radians per position for texts within the original context, and for longer ones; one of them is enough for most.
    factor : float
        What cosines and sines are multiplied by.
    """

    short: NDArray[np.float32]
    long: NDArray[np.float32] | None
    factor: float


def rope_of(model: Any) -> Rope | None:
    """Return a model's frequencies as transformers computes them; None for learned positions."""
    rope = getattr(model.base_model, "rotary_emb", None)
    if rope is None:
        return None
    long = None
    if rope.rope_type == "longrope":
        beyond = model.config.rope_parameters["original_max_position_embeddings"] + 1
        long = ROPE_INIT_FUNCTIONS["longrope"](model.config, "cpu", seq_len=beyond)[0].numpy()
    return Rope(rope.original_inv_freq.numpy().copy(), long, rope.attention_scaling)


def use_frequencies(model: Any, short: NDArray[np.float32] | None, long: NDArray[np.float32] | None) -> None:
    """Let a model turn its queries and keys by the store's frequencies."""
    rope = getattr(model.base_model, "rotary_emb", None)
    if rope is None or short is None:
        assert rope is None
        assert short is None
        return
    rope.inv_freq = torch.tensor(short)
    rope.original_inv_freq = torch.tensor(short)
    if long is not None:
        rope.long_inv_freq = torch.tensor(long)


# --- what hooks see ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where tensors of a layer, or of the whole model, can be seen.

    Attributes
    ----------
    module : str
        Path of a submodule; empty for the layer itself.
    side : str
        "in" or "out".
    taps : tuple of str
        What is seen there; several are the columns of one tensor, one behind another.
    """

    module: str
    side: str
    taps: tuple[str, ...]


def _places(table: str) -> tuple[Place, ...]:
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(Place("" if module == "." else module, side, tuple(taps)) for module, side, *taps in rows)


# Submodules that a model lacks are passed over; which taps must be seen is counted elsewhere.
_COMMON_LAYER = _places("""
self_attn.q_proj               out  q
self_attn.k_proj               out  k
self_attn.v_proj               out  v
self_attn.qkv_proj             out  q k v
self_attn.q_norm               out  q_norm
self_attn.k_norm               out  k_norm
self_attn                      out  attention_out probs
self_attn.o_proj               in   context
mlp.gate_proj                  out  gate
mlp.up_proj                    out  up
mlp.gate_up_proj               out  gate up
mlp.down_proj                  in   ffn_act
mlp.gate                       out  router_logits router_weights
mlp.shared_expert.gate_proj    out  shared_gate
mlp.shared_expert.up_proj      out  shared_up
mlp.shared_expert.down_proj    in   shared_act
mlp.shared_expert_gate         out  shared_weight
mlp                            out  ffn_out
.                              out  resid_post
""")

_LLAMA_NORMS = _places("""
input_layernorm                out  attention_norm
post_attention_layernorm       in   resid_mid
post_attention_layernorm       out  ffn_norm
""")

_OLMO2_NORMS = _places("""
post_attention_layernorm       out  attention_out_norm
mlp                            in   resid_mid
post_feedforward_layernorm     out  ffn_out_norm
""")

_GPT_LAYER = _places("""
attn.c_attn                    out  q k v
attn.c_proj                    in   context
attn.c_proj                    out  attention_out
mlp.c_fc                       out  up
mlp.c_proj                     in   ffn_act
mlp                            out  ffn_out
""")

_GPT2_LAYER = _places("""
ln_1                           out  attention_norm
attn                           out  attention_out probs
ln_2                           in   resid_mid
ln_2                           out  ffn_norm
.                              out  resid_post
""")

_GPT1_LAYER = _places("""
ln_1                           in   resid_mid
ln_1                           out  resid_mid_norm
ln_2                           in   resid_post
ln_2                           out  resid_post_norm
""")

_ENDS = _places("""
model.embed_tokens             out  tok_embeddings
transformer.wte                out  tok_embeddings
transformer.tokens_embed       out  tok_embeddings
transformer.wpe                out  pos_embeddings
transformer.positions_embed    out  pos_embeddings
transformer.drop               in   embeddings
model.norm                     out  norm
transformer.ln_f               out  norm
lm_head                        out  logits
""")

#: Taps that no module shows: they are inside of attention functions and of experts.
UNSEEN = frozenset("scores q_rope k_rope router_probs expert_gate expert_up expert_act expert_out shared_out".split())

_LAYERS = {
    "Olmo2": ("model.layers", _COMMON_LAYER + _OLMO2_NORMS),
    "GPT2": ("transformer.h", _GPT_LAYER + _GPT2_LAYER),
    "OpenAIGPT": ("transformer.h", _GPT_LAYER + _GPT1_LAYER),
}


@dataclass(slots=True)
class Watch:
    """Keeps the latest tensors that hooks have seen, in the layout of the tap table.

    Attributes
    ----------
    seen : dict of str to ndarray
        Full tap name -> tensor.
    """

    config: ModelConfig
    family: str
    seen: dict[str, NDArray[Any]] = field(default_factory=dict)

    def attach(self, model: Any) -> list[Any]:
        """Put hooks on a model; return their handles."""
        path, places = _LAYERS.get(self.family, ("model.layers", _COMMON_LAYER + _LLAMA_NORMS))
        handles = self._hook(model, _ENDS, "")
        for i, layer in enumerate(model.get_submodule(path)):
            handles += self._hook(layer, places, f"layers.{i}.")
        return handles

    def _hook(self, parent: Any, places: Sequence[Place], prefix: str) -> list[Any]:
        there = dict(parent.named_modules())
        handles = []
        for place in places:
            module = there.get(place.module)
            if module is None:
                continue
            if place.side == "in":
                handles.append(module.register_forward_pre_hook(lambda _, x, p=place: self._keep(prefix, p.taps, x)))
            else:
                handles.append(module.register_forward_hook(lambda _, __, y, p=place: self._keep(prefix, p.taps, y)))
        return handles

    def _keep(self, prefix: str, taps: tuple[str, ...], values: Any) -> None:
        parts = list(values) if isinstance(values, tuple) else [values]
        if taps[0] == "router_logits" and len(parts) == 3:
            logits, weights, chosen = parts
            parts = [logits, torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype))]
        elif len(taps) > 1 and len(parts) == 1:
            parts = list(parts[0].split([self._width(tap) for tap in taps], -1))
        for tap, x in zip(taps, parts, strict=False):
            if x is not None:
                self.seen[prefix + tap] = self._arranged(tap, x.detach())

    def _width(self, tap: str) -> int:
        config = self.config
        heads = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
        return heads[tap] * config.head_dim if tap in heads else config.hidden_dim

    def _arranged(self, tap: str, x: torch.Tensor) -> NDArray[Any]:
        """Take the batch axis away, split heads, and turn half-split heads into interleaved pairs."""
        config = self.config
        if tap == "probs":
            return np.array(x[0].numpy())
        if tap == "shared_weight":
            x = x.sigmoid()
        if tap in ("q", "k", "v", "q_norm", "k_norm", "context"):
            x = x.reshape(-1, config.n_kv_heads if tap[0] in "kv" else config.n_heads, config.head_dim)
            if config.positions == "rope" and tap[0] in "qk":
                x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            return np.array(x.numpy())
        return np.array(x.reshape(-1, x.shape[-1]).numpy())


def trace(model: Any, family: str, config: ModelConfig, tokens: Sequence[int], prefill: int) -> MemoryTrace:
    """Run a model in its own dtype, and record what hooks see: the prefill, then each further token by itself.

    A decode step is a run of the whole text so far without a cache, of which the last row counts: what a cache must not
    change.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    recorded = MemoryTrace(tokens=tokens, prefill=prefill, dtype=dtype, producer="oracle: transformers", config=config)
    watch = Watch(config, family)
    handles = watch.attach(model)
    options = {} if family == "OpenAIGPT" else {"use_cache": False}
    try:
        for step in range(len(tokens) - prefill + 1):
            watch.seen.clear()
            with torch.inference_mode():
                model(torch.tensor([tokens[: prefill + step]]), **options)
            for name, x in watch.seen.items():
                if step:
                    x = x[:, -1:] if name.endswith("probs") else x[-1:]
                recorded.add(step, name, x)
    finally:
        for handle in handles:
            handle.remove()
    return recorded
