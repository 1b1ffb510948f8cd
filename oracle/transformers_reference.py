"""A third opinion: Hugging Face's transformers, with a store's weights, watched by hooks.

It exposes every tap that is a module's input or output, and what goes into and comes out of its attention. ``scores``
and the tensors of single experts stay inside (the float64 variant shows the scores). Its heads are half-split: queries
and keys are turned into interleaved pairs on the way out, so that they compare with everybody else's. transformers
lowers RMSNorm, softmax and router to float32 whatever the dtype; in float64, where it serves as a truth, they are
computed in float64 here instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask
from transformers.utils import logging

from npllama.checkpoint.names import expected
from npllama.checkpoint.spellings import HF
from npllama.errors import UnsupportedError
from npllama.taps import tap_names
from oracle.equations import Tap, untapped
from oracle.hooks import attach
from oracle.transformers_families import family_of
from oracle.weights import Source, to_torch, torch_dtype

_ATTENTION = "npllama_tapped_eager"
_ROTATED = frozenset({"q", "k", "q_norm", "k_norm", "q_rope", "k_rope"})
_OVER_KEYS = frozenset({"scores", "probs"})


class TransformersModel:
    """A family's model of transformers as a reference; the whole of it is in memory.

    Parameters
    ----------
    source : Source
        A `Store`, or anything that has its ``config``, ``tensor`` and ``frequencies``. The RoPE frequencies are the
        stored ones.
    dtype : {"float32", "bfloat16", "float64"}
        Of weights and activations.

    Raises
    ------
    UnsupportedError
        transformers does not have the family, or its class cannot express the configuration.
    """

    producer = "transformers"

    def __init__(self, source: Source, dtype: str = "float32") -> None:
        self.config = source.config
        self.dtype = dtype
        self._family = family_of(self.config)
        self._tap: Tap = untapped
        self._known = frozenset(tap_names(self.config))
        self._n_new = 0
        self._tokens: list[int] = []
        self._model = _build(source, torch_dtype(dtype))
        self._cache = DynamicCache()  # made without the configuration, it keeps keys that have left the window, too
        attach(self._model, self._family.taps, self.config, self._see)
        for name, module in self._model.named_modules():
            if hasattr(module, "layer_idx"):
                module.npllama_see = self._see
            if hasattr(module, "top_k") and hasattr(module, "weight"):
                layer = int(name.split(".layers.")[1].split(".")[0])
                module.register_forward_hook(_routing(self._see, f"layers.{layer}.router_weights"))

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], tap: Tap = untapped) -> torch.Tensor:
        """Run new tokens; return logits (T, V). What the tap returns is not used."""
        before, self._tokens = len(self._tokens), [*self._tokens, *tokens]
        self._tap, self._n_new = tap, len(tokens)
        if not self._family.cached:
            return self._run(self._tokens)
        if before and self.config.is_long(len(self._tokens)) and not self.config.is_long(before):
            self._cache = DynamicCache()  # as transformers' own `generate` does
            return self._run(self._tokens, past_key_values=self._cache)
        return self._run(tokens, past_key_values=self._cache)

    def _run(self, tokens: Sequence[int], **settings: Any) -> torch.Tensor:
        logits: torch.Tensor = self._model(torch.tensor([list(tokens)]), **settings).logits
        return logits[0, -self._n_new :]

    def _see(self, name: str, x: torch.Tensor) -> None:
        if name not in self._known:
            return
        kind = name.rpartition(".")[2]
        if kind in _ROTATED and self.config.positions == "rope":
            x = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        self._tap(name, x[:, -self._n_new :] if kind in _OVER_KEYS else x[-self._n_new :])


# --- the model -------------------------------------------------------------------------------------------------------


def _build(source: Source, dtype: torch.dtype) -> Any:
    """Return the model with the source's weights, in evaluation mode."""
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, eager_mask)
    config, family = source.config, family_of(source.config)
    classes = getattr(transformers, f"{family.name}Config"), getattr(transformers, family.model_class)
    with _quiet():
        settings = classes[0](
            **family.settings(config),
            tie_word_embeddings=False,  # a tied weight is loaded under both names
            attn_implementation=_ATTENTION if family.cached else "eager",
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        model, report = classes[1].from_pretrained(
            None, config=settings, state_dict=dict(_state(source, dtype)), dtype=dtype, output_loading_info=True
        )
    if any(report.values()):
        found = "; ".join(f"{what}: {', '.join(map(str, sorted(names)))}" for what, names in report.items() if names)
        raise UnsupportedError(f"transformers' {family.name} is another model than this {config.family}: {found}")
    if config.positions == "rope":
        short, long = (None if freqs is None else torch.tensor(freqs) for freqs in source.frequencies())
        rope = model.model.rotary_emb
        rope.inv_freq, rope.original_inv_freq, rope.long_inv_freq = short, short, long
    if dtype == torch.float64:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = _norm(module)
            if hasattr(module, "top_k") and hasattr(module, "weight"):
                module.forward = _router(module)
    return model.eval()


def _state(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a store's weights as the family's checkpoints spell and pack them."""
    config, spelling = source.config, HF[source.config.family]
    parts: dict[str, list[torch.Tensor]] = {}
    stacked: dict[str, int] = {}
    for entry in expected(replace(config, tied=False)).values():
        weight = to_torch(source.tensor(entry.name), dtype)
        if entry.heads and spelling.half_split:
            weight = weight.unflatten(0, (entry.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        layer = entry.name.split(".")[1]
        general = entry.name.replace(f"layers.{layer}.", "layers.{i}.")
        name = spelling.names.get(general, entry.hf).replace("{i}", layer)
        parts.setdefault(name, []).append(weight)
        stacked[name] = entry.stacked
    for name, weights in parts.items():
        whole = torch.cat(weights)
        if stacked[name]:
            for expert, one in enumerate(whole.chunk(stacked[name])):
                yield name.format(e=expert), one.clone()
        else:
            yield name.removesuffix("^T"), (whole.T if name.endswith("^T") else whole).contiguous()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing progress bars and from giving advice."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


# --- what is watched, and lifted to float64, inside -------------------------------------------------------------------


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the family's eager attention and show what goes in and out of it. Arrays are (1, H, T, Dh)."""

    def see(tap: str, x: torch.Tensor) -> None:
        module.npllama_see(f"layers.{module.layer_idx}.{tap}", x)

    n_new = query.shape[2]
    see("q_rope", query[0].transpose(0, 1))
    see("k_rope", key[0, :, -n_new:].transpose(0, 1))
    if query.dtype == torch.float64:
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, dim=1).mT * scaling
        if attention_mask is not None:
            # What is added for a masked key is the lowest finite number; a score is -inf there.
            scores = scores.masked_fill(attention_mask < -1, -torch.inf)
        see("scores", scores[0])
        probs = scores.softmax(-1)
        context = (probs @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous()
    else:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        context, probs = eager(module, query, key, value, attention_mask, scaling, **settings)
    see("probs", probs[0])
    return context, probs


def _routing(see: Callable[[str, torch.Tensor], None], name: str) -> Callable[..., None]:
    """Return a hook that shows a router's choice as one weight for each expert, (T, E)."""

    def hook(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        logits, weights, chosen = output
        see(name, torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype)))

    return hook


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward function of an RMSNorm that stays in the dtype of its input."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)
        return scaled * module.weight

    return forward


def _router(module: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return a forward function of a router that stays in the dtype of its input; Mixtral's always renormalises."""

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = linear(x.flatten(0, -2), module.weight)
        weights, chosen = logits.softmax(-1).topk(module.top_k, dim=-1)
        if getattr(module, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, chosen

    return forward
