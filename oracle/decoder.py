"""The forward pass of every family in PyTorch, written from its equations (`oracle.equations`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from npllama.config import Experts, ModelConfig
from oracle.equations import (
    ACTIVATIONS,
    Tap,
    attention,
    linear,
    rms_norm,
    rotate,
    rounded_to_int8,
    rounding_of,
    route,
    turns,
    unrounded,
    untapped,
)
from oracle.weights import Named, Source, WeightReader, torch_dtype


class TorchDecoder:
    """A decoder-only model in PyTorch that keeps one layer of weights in memory at a time, and of experts one matrix.

    Parameters
    ----------
    source : Source
        A `Store`, or anything that has its ``config``, ``tensor`` and ``frequencies``.
    dtype : {"float32", "bfloat16", "float64", "int8"}
        Of weights and activations. "int8" is float32, but what goes into a product with weights is rounded to int8, see
        `oracle.equations.rounded_to_int8`.

    Attributes
    ----------
    config : ModelConfig
    dtype : str
    tokens : list of int
        What has been seen.
    """

    producer = "oracle"

    def __init__(self, source: Source, dtype: str = "float32") -> None:
        self.config: ModelConfig = source.config
        self.dtype = dtype
        self.tokens: list[int] = []
        self._torch_dtype = torch_dtype("float32" if dtype == "int8" else dtype)
        self._round = rounded_to_int8 if dtype == "int8" else unrounded
        self._weights = WeightReader(source, self._torch_dtype)
        self._freqs = tuple(None if freqs is None else torch.tensor(freqs) for freqs in source.frequencies())
        self._activation = ACTIVATIONS[self.config.activation]
        self._rounding = rounding_of(self.config.family)
        self._forget()

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], tap: Tap = untapped) -> torch.Tensor:
        """Run the model on new tokens behind those it has seen.

        A longrope model has other frequencies for texts longer than its original context. When a text outgrows that,
        all that was seen is computed anew with them, as transformers does, before the new tokens are; no tap shows it.

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
        before, after = len(self.tokens), len(self.tokens) + len(tokens)
        if before and self.config.is_long(after) and not self.config.is_long(before):
            seen = self.tokens
            self._forget()
            self._run(seen, after, untapped)
        return self._run(tokens, after, tap)

    def _forget(self) -> None:
        empty = torch.empty(0, self.config.n_kv_heads, self.config.head_dim, dtype=self._torch_dtype)
        self.tokens = []
        self._keys = [empty] * self.config.n_layers
        self._values = [empty] * self.config.n_layers

    def _turns(self, start: int, count: int, n_all: int) -> torch.Tensor | None:
        """Return the turns of positions from ``start`` on in a text of ``n_all``, (T, Dh/2); None without RoPE."""
        freqs, scaling = self._freqs[self.config.is_long(n_all)], self.config.rope_scaling
        if freqs is None:
            return None
        return turns(freqs, start, count, 1.0 if scaling is None else scaling.attention_factor)

    def _run(self, tokens: Sequence[int], n_all: int, tap: Tap) -> torch.Tensor:
        """Run new tokens of a text of ``n_all``: -> (T, V)."""
        start, n_new = len(self.tokens), len(tokens)
        x = tap("tok_embeddings", self._weights.rows("tok_embeddings.weight", list(tokens)))  # (T, D)
        if self.config.positions == "learned":
            x = x + tap("pos_embeddings", self._weights.rows("pos_embeddings.weight", slice(start, start + n_new)))
            x = tap("embeddings", x)
        by = self._turns(start, n_new, n_all)  # (T, Dh/2)
        for i in range(self.config.n_layers):
            x = self._block(x, self._weights.under(f"layers.{i}."), i, by, _at_layer(tap, i))
        self.tokens = [*self.tokens, *tokens]
        if self.config.final_norm:
            x = tap("norm", self._norm(x, self._weights.under("norm."), ""))  # (T, D)
        return tap("logits", self._linear(x, self._weights.under("output."), ""))  # (T, V)

    def _block(self, x: torch.Tensor, w: Named, i: int, by: torch.Tensor | None, tap: Tap) -> torch.Tensor:
        """Run decoder layer ``i``: x (T, D) -> (T, D)."""
        order = self.config.norm_order
        h = tap("attention_norm", self._norm(x, w, "attention_norm.")) if order == "pre" else x
        out = self._attention(h, w, i, by, tap)
        if order == "output":
            out = tap("attention_out_norm", self._norm(out, w, "attention_norm."))
        x = tap("resid_mid", x + out)
        if order == "post":
            x = tap("resid_mid_norm", self._norm(x, w, "attention_norm."))

        h = tap("ffn_norm", self._norm(x, w, "ffn_norm.")) if order == "pre" else x
        experts = self.config.experts
        if experts is None or i in experts.dense_layers:
            out = self._feed_forward(h, w, tap)
        else:
            out = self._mixture(h, w, i, experts, tap)
        if order == "output":
            out = tap("ffn_out_norm", self._norm(out, w, "ffn_norm."))
        x = tap("resid_post", x + out)
        return tap("resid_post_norm", self._norm(x, w, "ffn_norm.")) if order == "post" else x

    def _attention(self, h: torch.Tensor, w: Named, i: int, by: torch.Tensor | None, tap: Tap) -> torch.Tensor:
        """Let positions read one another: h (T, D) -> (T, D)."""
        heads = (-1, self.config.head_dim)
        q = tap("q", self._linear(h, w, "attention.wq.").unflatten(-1, heads))  # (T, H, Dh)
        k = tap("k", self._linear(h, w, "attention.wk.").unflatten(-1, heads))  # (T, K, Dh)
        v = tap("v", self._linear(h, w, "attention.wv.").unflatten(-1, heads))  # (T, K, Dh)
        if self.config.qk_norm != "none":
            q = tap("q_norm", self._qk_norm(q, w["attention.q_norm.weight"]))
            k = tap("k_norm", self._qk_norm(k, w["attention.k_norm.weight"]))
        if by is not None:
            q = tap("q_rope", rotate(q, by, self._rounding))
            k = tap("k_rope", rotate(k, by, self._rounding))
        self._keys[i] = torch.cat([self._keys[i], k])  # (S, K, Dh)
        self._values[i] = torch.cat([self._values[i], v])
        score_dim = self.config.score_dim or self.config.head_dim
        window = self.config.window(i)
        context = attention(q, self._keys[i], self._values[i], tap, score_dim=score_dim, window=window)
        context = tap("context", context)  # (T, H, Dh)
        return tap("attention_out", self._linear(context.flatten(1), w, "attention.wo."))

    def _feed_forward(self, h: torch.Tensor, w: Named, tap: Tap) -> torch.Tensor:
        """Run an ordinary feed-forward layer: h (T, D) -> (T, D)."""
        if self.config.gated:
            gate = tap("gate", self._linear(h, w, "feed_forward.w1."))  # (T, F)
            up = tap("up", self._linear(h, w, "feed_forward.w3."))
            act = tap("ffn_act", self._activation(gate) * up)
        else:
            up = tap("up", self._linear(h, w, "feed_forward.w3."))  # (T, F)
            act = tap("ffn_act", self._activation(up))
        return tap("ffn_out", self._linear(act, w, "feed_forward.w2."))

    def _mixture(self, h: torch.Tensor, w: Named, i: int, experts: Experts, tap: Tap) -> torch.Tensor:
        """Run a mixture of experts: h (T, D) -> (T, D)."""
        logits = tap("router_logits", self._linear(h, w, "feed_forward.router."))  # (T, E)
        chosen, weights = route(logits, experts.active, experts.renormalise, tap)  # (T, A)
        each = h[:, None].expand(-1, experts.active, -1)  # (T, A, D)
        gate = tap("expert_gate", self._ask(each, chosen, i, "w1", experts.hidden_dim))  # (T, A, Fe)
        up = tap("expert_up", self._ask(each, chosen, i, "w3", experts.hidden_dim))  # (T, A, Fe)
        act = tap("expert_act", self._activation(gate) * up)
        answers = tap("expert_out", self._ask(act, chosen, i, "w2", self.config.dim))  # (T, A, D)
        out = torch.zeros_like(h)
        for place in range(experts.active):  # one after another, because every sum is rounded
            out = out + answers[:, place] * weights[:, place, None]
        if experts.shared_dim:
            gate = tap("shared_gate", self._linear(h, w, "feed_forward.shared.w1."))  # (T, Fs)
            up = tap("shared_up", self._linear(h, w, "feed_forward.shared.w3."))
            act = tap("shared_act", self._activation(gate) * up)
            share = tap("shared_weight", torch.sigmoid(self._linear(h, w, "feed_forward.shared.router.")))  # (T, 1)
            out = out + tap("shared_out", share * self._linear(act, w, "feed_forward.shared.w2."))
        return tap("ffn_out", out)

    def _ask(self, x: torch.Tensor, chosen: torch.Tensor, i: int, place: str, width: int) -> torch.Tensor:
        """Multiply each token's rows x (T, A, in) by the matrices (width, in) of its chosen experts (T, A)."""
        out = x.new_empty(*chosen.shape, width)
        for expert in chosen.unique().tolist():
            rows = slice(expert * width, (expert + 1) * width)
            where = chosen == expert
            weight = self._weights.rows(f"layers.{i}.feed_forward.{place}.weight", rows)
            out[where] = F.linear(self._round(x[where]), weight)
        return out

    def _linear(self, x: torch.Tensor, w: Named, place: str) -> torch.Tensor:
        """Multiply rows x (T, in) by the matrix under a name, as the dtype has it: (T, out)."""
        return linear(self._round(x), w, place)

    def _norm(self, x: torch.Tensor, w: Named, place: str) -> torch.Tensor:
        """Apply the kind of norm that the model has: x (T, D) -> (T, D)."""
        weight = w[f"{place}weight"]
        if self.config.norm == "layer":
            return F.layer_norm(x, weight.shape, weight, w[f"{place}bias"], self.config.norm_eps)
        return rms_norm(x, weight, self.config.norm_eps, self._rounding)

    def _qk_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Normalise queries or keys (T, H, Dh), each head (Dh,) or all of them together (H*Dh,) as the weight says."""
        rows = x.unflatten(1, (-1, weight.numel() // x.shape[-1])).flatten(2)  # (T, 1, H*Dh) or (T, H, Dh)
        return rms_norm(rows, weight, self.config.norm_eps, self._rounding).reshape(x.shape)


def _at_layer(tap: Tap, i: int) -> Tap:
    """Return a tap that puts ``layers.i.`` before each name."""
    return lambda name, x: tap(f"layers.{i}.{name}", x)
