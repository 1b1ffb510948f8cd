"""The forward pass in PyTorch, from the equations, in float32, float64 or bfloat16.

In bfloat16 every value is rounded where Meta's reference rounds it
(https://github.com/meta-llama/llama-models/blob/a9c89c471f793423afd4cc3ca8671d6e56fe64cb/models/llama3/model.py):
after the norm and again after its weight, after each product, once after RoPE, after the scores and again after their
division, after the mask, after the softmax, after SiLU and again after the gate, after each residual sum. Norm, RoPE
and softmax are computed in float32 in between. In float64 nothing is narrower than float64, but the turns of RoPE:
they are float32 numbers in every implementation, and part of the model.

Axis letters are those of `npllama.taps`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F

from npllama.config import ModelConfig
from oracle.weights import Layer, Source, read_layer, to_torch, torch_dtype

#: ``tap(name, x)`` sees every intermediate tensor and returns what the pass goes on with.
Tap: TypeAlias = Callable[[str, torch.Tensor], torch.Tensor]


def untapped(name: str, x: torch.Tensor) -> torch.Tensor:
    """Pass a tensor on."""
    return x


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise rows x (T, D) in float32 at least, round, then scale by the weight (D,)."""
    return F.rms_norm(wide(x), weight.shape, eps=eps).to(x.dtype) * weight


def turns(freqs: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return the unit complex numbers by which RoPE multiplies: (T, Dh/2), complex64, of the positions from start."""
    positions = torch.arange(start, start + count, dtype=torch.float32)
    angles = torch.outer(positions, freqs)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Read the pairs of x (T, H, Dh) as complex numbers and multiply them by the turns (T, Dh/2); round once."""
    pairs = torch.view_as_complex(wide(x).unflatten(-1, (-1, 2)))  # (T, H, Dh/2)
    return torch.view_as_real(pairs * by[:, None].to(pairs.dtype)).flatten(-2).to(x.dtype)


def causal_mask(n_new: int, n_all: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to scores (T, S): -inf where a key lies behind its query, 0 elsewhere."""
    return torch.full((n_new, n_all), -math.inf, dtype=dtype).triu(n_all - n_new + 1)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tap: Tap) -> torch.Tensor:
    """Let queries q (T, H, Dh) of the last T positions read keys and values (S, K, Dh): -> (T, H, Dh)."""
    n_new, n_heads, head_dim = q.shape
    n_all, n_kv_heads, _ = keys.shape
    q = q.transpose(0, 1)  # (H, T, Dh)
    keys = keys.repeat_interleave(n_heads // n_kv_heads, dim=1).transpose(0, 1)  # (H, S, Dh)
    values = values.repeat_interleave(n_heads // n_kv_heads, dim=1).transpose(0, 1)  # (H, S, Dh)
    scores = torch.matmul(q, keys.mT) / math.sqrt(head_dim)
    scores = tap("scores", scores + causal_mask(n_new, n_all, q.dtype))  # (H, T, S)
    probs = tap("probs", torch.softmax(wide(scores), dim=-1).to(q.dtype))  # (H, T, S)
    return torch.matmul(probs, values).transpose(0, 1)


class TorchLlama:
    """A Llama-family model in PyTorch that keeps one layer of weights in memory at a time.

    Parameters
    ----------
    source : Source
        A `Store`, or anything that has its ``config``, ``tensor`` and ``rope_freqs``.
    dtype : {"float32", "bfloat16", "float64"}
        Of weights and activations.

    Attributes
    ----------
    config : ModelConfig
    dtype : str
    length : int
        Positions that have been seen.
    """

    producer = "oracle"

    def __init__(self, source: Source, dtype: str = "float32") -> None:
        self.config: ModelConfig = source.config
        self.dtype = dtype
        self.length = 0
        self._source = source
        self._torch_dtype = torch_dtype(dtype)
        empty = torch.empty(0, self.config.n_kv_heads, self.config.head_dim, dtype=self._torch_dtype)
        self._keys = [empty] * self.config.n_layers
        self._values = [empty] * self.config.n_layers

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], tap: Tap = untapped) -> torch.Tensor:
        """Run the model on new tokens behind those it has seen.

        Parameters
        ----------
        tokens : sequence of int, length T
            Valid token ids.
        tap : callable
            Sees every tap of `npllama.taps`, in the dtype of the pass.

        Returns
        -------
        torch.Tensor of shape (T, V)
            Logits.
        """
        n_new, eps = len(tokens), self.config.norm_eps
        by = turns(torch.tensor(self._source.rope_freqs()), self.length, n_new)  # (T, Dh/2)
        x = tap("tok_embeddings", self._weight("tok_embeddings.weight", list(tokens)))  # (T, D)
        for i in range(self.config.n_layers):
            x = self._block(x, read_layer(self._source, i, self._torch_dtype), i, by, _at_layer(tap, i))
        self.length += n_new
        x = tap("norm", rms_norm(x, self._weight("norm.weight"), eps))  # (T, D)
        return tap("logits", F.linear(x, self._weight("output.weight")))  # (T, V)

    def _block(self, x: torch.Tensor, w: Layer, i: int, by: torch.Tensor, tap: Tap) -> torch.Tensor:
        """Run decoder layer ``i``: x (T, D) -> (T, D)."""
        eps, heads = self.config.norm_eps, (-1, self.config.head_dim)
        h = tap("attention_norm", rms_norm(x, w.attention_norm, eps))
        q = tap("q", F.linear(h, w.wq).unflatten(-1, heads))  # (T, H, Dh)
        k = tap("k", F.linear(h, w.wk).unflatten(-1, heads))  # (T, K, Dh)
        v = tap("v", F.linear(h, w.wv).unflatten(-1, heads))  # (T, K, Dh)
        q = tap("q_rope", rotate(q, by))
        k = tap("k_rope", rotate(k, by))
        self._keys[i] = torch.cat([self._keys[i], k])  # (S, K, Dh)
        self._values[i] = torch.cat([self._values[i], v])
        context = tap("context", attention(q, self._keys[i], self._values[i], tap))  # (T, H, Dh)
        x = tap("resid_mid", x + tap("attention_out", F.linear(context.flatten(1), w.wo)))

        h = tap("ffn_norm", rms_norm(x, w.ffn_norm, eps))
        gate, up = tap("gate", F.linear(h, w.w1)), tap("up", F.linear(h, w.w3))  # (T, F)
        act = tap("ffn_act", F.silu(gate) * up)
        return tap("resid_post", x + tap("ffn_out", F.linear(act, w.w2)))

    def _weight(self, name: str, rows: list[int] | None = None) -> torch.Tensor:
        return to_torch(self._source.tensor(name), self._torch_dtype, ... if rows is None else rows)


def _at_layer(tap: Tap, i: int) -> Tap:
    """Return a tap that puts ``layers.i.`` before each name."""
    return lambda name, x: tap(f"layers.{i}.{name}", x)
