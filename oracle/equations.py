"""The equations of the decoders, in PyTorch, in float32, float64 or bfloat16.

In bfloat16 a value is rounded where the family's reference implementation rounds it, which is nearly everywhere: after
each norm, product, activation and sum. What differs between implementations is in `Rounding`. Norms, RoPE and softmax
are computed in float32 in between. In float64 nothing is narrower than float64, but the turns of RoPE: they are
float32 numbers in every implementation, and part of the model.

Axis letters are those of `npllama.taps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F

from oracle.weights import Named

#: ``tap(name, x)`` sees every intermediate tensor and returns what the pass goes on with.
Tap: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True, slots=True)
class Rounding:
    """Where reference implementations round differently, when they compute in bfloat16.

    Attributes
    ----------
    narrow_turns : bool
        RoPE's cosines and sines are rounded, and each product and sum with them; otherwise the result, once.
    wide_norm_weight : bool
        RMSNorm is rounded once, behind its weight; otherwise before it, too.
    """

    narrow_turns: bool
    wide_norm_weight: bool


#: Meta's and Mistral's own code:
#: https://github.com/meta-llama/llama-models/blob/a9c89c471f793423afd4cc3ca8671d6e56fe64cb/models/llama3/model.py
_COMPLEX = Rounding(narrow_turns=False, wide_norm_weight=False)
#: What has its reference in transformers, and differs from this there, is in the table by its own name.
_TRANSFORMERS = Rounding(narrow_turns=True, wide_norm_weight=False)
_ROUNDINGS = {
    "llama": _COMPLEX,
    "mistral": _COMPLEX,
    "olmo2": Rounding(narrow_turns=False, wide_norm_weight=True),
}


def rounding_of(family: str) -> Rounding:
    """Return where a family's reference implementation rounds."""
    return _ROUNDINGS.get(family, _TRANSFORMERS)


def untapped(name: str, x: torch.Tensor) -> torch.Tensor:
    """Pass a tensor on."""
    return x


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unrounded(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``."""
    return x


def rounded_to_int8(x: torch.Tensor) -> torch.Tensor:
    """Round float32 numbers (..., in) to int8 times a step of each 64 of a row; see `npllama.rounding`."""
    groups = F.pad(x, (0, -x.shape[-1] % 64)).unflatten(-1, (-1, 64))  # (..., groups, 64)
    largest = groups.abs().amax(-1, keepdim=True)
    q = torch.round(groups * torch.div(torch.full_like(largest, 127), largest)).to(torch.int8)
    rounded = torch.where(largest < 2.0**-100, 0.0, q * (largest / 127))
    rounded = torch.where(largest.isfinite(), rounded, math.nan)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def linear(x: torch.Tensor, w: Named, place: str) -> torch.Tensor:
    """Multiply rows x (T, in) by the matrix under a name (out, in), add its bias if there is one: (T, out)."""
    return F.linear(x, w[f"{place}weight"], w.get(f"{place}bias"))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    """Normalise x (..., D) along its last axis in float32 at least, and scale it by the weight (D,)."""
    normal = F.rms_norm(wide(x), weight.shape, eps=eps)
    if rounding.wide_norm_weight:
        return (normal * weight).to(x.dtype)
    return normal.to(x.dtype) * weight


def turns(freqs: torch.Tensor, start: int, count: int, scale: float = 1.0) -> torch.Tensor:
    """Return the complex numbers by which RoPE multiplies: (T, Dh/2), complex64, of the positions from start.

    Their length is one, or a longrope model's factor.
    """
    positions = torch.arange(start, start + count, dtype=torch.float32)
    angles = torch.outer(positions, freqs)
    return torch.polar(torch.full_like(angles, scale), angles)


def rotate(x: torch.Tensor, by: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Read the pairs of x (T, H, Dh) as complex numbers and multiply them by the turns (T, Dh/2)."""
    pairs = x.unflatten(-1, (-1, 2))  # (T, H, Dh/2, 2)
    if x.dtype == torch.bfloat16 and rounding.narrow_turns:
        (a, b), cos, sin = pairs.unbind(-1), by.real[:, None].to(x.dtype), by.imag[:, None].to(x.dtype)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    turned = torch.view_as_complex(wide(pairs).contiguous()) * by[:, None].to(torch.promote_types(by.dtype, x.dtype))
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def mask(n_new: int, n_all: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores (T, S): 0 where a query sees a key, -inf elsewhere.

    A query sees its own position and those before it; with a window, so many in all, its own among them.
    """
    ahead = torch.arange(n_all) - torch.arange(n_all - n_new, n_all)[:, None]  # (T, S); 0 is a query's own position
    hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
    return torch.zeros(n_new, n_all, dtype=dtype).masked_fill(hidden, -math.inf)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tap: Tap, *, score_dim: int, window: int | None
) -> torch.Tensor:
    """Let queries q (T, H, Dh) of the last T positions read keys and values (S, K, Dh): -> (T, H, Dh)."""
    n_new, n_heads, _ = q.shape
    n_all, n_kv_heads, _ = keys.shape
    q = q.transpose(0, 1)  # (H, T, Dh)
    keys = keys.repeat_interleave(n_heads // n_kv_heads, dim=1).transpose(0, 1)  # (H, S, Dh)
    values = values.repeat_interleave(n_heads // n_kv_heads, dim=1).transpose(0, 1)  # (H, S, Dh)
    scores = torch.matmul(q, keys.mT) / math.sqrt(score_dim)
    scores = tap("scores", scores + mask(n_new, n_all, window, q.dtype))  # (H, T, S)
    probs = tap("probs", torch.softmax(wide(scores), dim=-1).to(q.dtype))  # (H, T, S)
    return torch.matmul(probs, values).transpose(0, 1)


def route(logits: torch.Tensor, n_active: int, renormalise: bool, tap: Tap) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose A experts for each token and weigh them, in float32 at least.

    Parameters
    ----------
    logits : torch.Tensor of shape (T, E)
    n_active : int
        A, how many are asked. Of equally probable ones those that come first.
    renormalise : bool
        Scale the weights of the chosen ones to a sum of one.
    tap : callable
        Sees ``router_probs`` and ``router_weights``.

    Returns
    -------
    torch.Tensor of shape (T, A), int64
        The chosen experts, in ascending order.
    torch.Tensor of shape (T, A)
        Their weights, in the dtype of the logits.

    Notes
    -----
    The experts are chosen by, and weighed with, probabilities that have not been rounded: the dtype of the pass is
    that of the final weights. So a tap in bfloat16 shows what goes on unrounded.
    """
    probs = torch.softmax(wide(logits), dim=-1)
    rounded = probs.to(logits.dtype)
    shown = tap("router_probs", rounded)
    probs = probs if shown is rounded else wide(shown)
    chosen = probs.sort(dim=-1, descending=True, stable=True).indices[:, :n_active].sort(dim=-1).values
    weights = probs.gather(-1, chosen)
    if renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    every = tap("router_weights", torch.zeros_like(logits).scatter(-1, chosen, weights.to(logits.dtype)))
    return chosen, every.gather(-1, chosen)
