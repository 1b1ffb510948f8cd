"""A third opinion: Meta's own reference implementation, with a store's weights, watched by hooks.

It is ``llama_models.llama3.model`` of the package ``llama-models==0.3.0``, which needs fairscale. It exposes every tap
that is the input or output of one of its modules, and the rotated keys in its cache; ``q_rope``, ``scores`` and
``probs`` stay inside its attention. Its RoPE scaling has a factor of 8 built in, wrong for the small models of Llama
3.2 (https://github.com/meta-llama/llama-models/issues/241): the table is replaced by one of the stored frequencies.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import torch

from npllama.checkpoint.names import expected
from npllama.config import ModelConfig
from npllama.errors import BackendError, UnsupportedError
from oracle.equations import Tap, untapped
from oracle.hooks import attach
from oracle.weights import Source, to_torch, torch_dtype

_TAPS = """
tok_embeddings              out  tok_embeddings
layers.{i}.attention_norm   out  layers.{i}.attention_norm
layers.{i}.attention.wq     out  layers.{i}.q
layers.{i}.attention.wk     out  layers.{i}.k
layers.{i}.attention.wv     out  layers.{i}.v
layers.{i}.attention.wo     in   layers.{i}.context
layers.{i}.attention.wo     out  layers.{i}.attention_out
layers.{i}.ffn_norm         in   layers.{i}.resid_mid
layers.{i}.ffn_norm         out  layers.{i}.ffn_norm
layers.{i}.feed_forward.w1  out  layers.{i}.gate
layers.{i}.feed_forward.w3  out  layers.{i}.up
layers.{i}.feed_forward.w2  in   layers.{i}.ffn_act
layers.{i}.feed_forward.w2  out  layers.{i}.ffn_out
layers.{i}                  out  layers.{i}.resid_post
norm                        out  norm
output                      out  logits
"""


class MetaLlama:
    """Meta's ``Transformer`` as a reference; the whole model is in memory. Use it inside `single_process`.

    Parameters
    ----------
    source : Source
        A `Store`, or anything that has its ``config``, ``tensor`` and ``frequencies``.
    dtype : {"float32", "bfloat16"}
        Of weights and activations. (In float64 its norms, RoPE and softmax would still be float32.)
    capacity : int
        Positions that its cache holds.

    Raises
    ------
    UnsupportedError
        float64, or a model that the implementation cannot express: not a Llama, or heads not D / H wide.
    """

    producer = "llama-models"

    def __init__(self, source: Source, dtype: str = "float32", *, capacity: int = 2048) -> None:
        if dtype == "float64":
            raise UnsupportedError("Meta's reference lowers its norms to float32, so it cannot run in float64")
        self.config = source.config
        self.dtype = dtype
        self.length = 0
        self._tap: Tap = untapped
        self._model = _build(source, torch_dtype(dtype), capacity)
        attach(self._model, _TAPS, self.config, self._see)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], tap: Tap = untapped) -> torch.Tensor:
        """Run new tokens; return logits (T, V). What the tap returns is not used."""
        self._tap = tap
        logits: torch.Tensor = self._model(torch.tensor([list(tokens)]), self.length)
        end = self.length + len(tokens)
        for i, layer in enumerate(self._model.layers):
            tap(f"layers.{i}.k_rope", layer.attention.cache_k[0, self.length : end])
        self.length = end
        return logits[0]

    def _see(self, name: str, x: torch.Tensor) -> None:
        self._tap(name, x)


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Make the process group of one that fairscale's layers ask for, and take it away again.

    Raises
    ------
    BackendError
        fairscale is not installed.
    """
    try:
        from fairscale.nn.model_parallel import initialize
    except ImportError as problem:
        raise _missing(problem) from None
    group = torch.distributed
    group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            initialize.initialize_model_parallel(1)
        yield
    finally:
        initialize.destroy_model_parallel()
        group.destroy_process_group()


def _build(source: Source, dtype: torch.dtype, capacity: int) -> Any:
    try:
        from llama_models.llama3.model import ModelArgs, Transformer
    except ImportError as problem:
        raise _missing(problem) from None
    model = Transformer(ModelArgs(**_arguments(source.config, capacity)))
    names = list(expected(replace(source.config, tied=False)))
    model.to(dtype)
    model.load_state_dict({name: to_torch(source.tensor(name), dtype) for name in names})
    angles = torch.outer(torch.arange(capacity, dtype=torch.float32), torch.tensor(source.frequencies()[0]))
    model.freqs_cis = torch.polar(torch.ones_like(angles), angles)
    return model.eval()


def _arguments(config: ModelConfig, capacity: int) -> dict[str, Any]:
    options = [entry.name for entry in fields(config) if entry.default not in (MISSING, getattr(config, entry.name))]
    if options:
        raise UnsupportedError(f"the model has its own {', '.join(options)}, and Meta's reference is a Llama")
    if config.head_dim * config.n_heads != config.dim:
        raise UnsupportedError(
            f"{config.n_heads} heads of {config.head_dim} in a model of width {config.dim}: Meta's reference knows "
            "only heads that divide the width"
        )
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        # It rounds int(multiplier * int(8 D / 3)) up to a multiple: made to end at F, whatever F is.
        "multiple_of": config.hidden_dim,
        "ffn_dim_multiplier": min(1.0, config.hidden_dim / int(8 * config.dim / 3)),
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_batch_size": 1,
        "max_seq_len": capacity,
    }


def _missing(problem: ImportError) -> BackendError:
    return BackendError(
        f"Meta's reference cannot be imported: {problem}",
        remedy="Install it with `pip install --no-deps llama-models==0.3.0 fairscale==0.4.13`.",
    )
