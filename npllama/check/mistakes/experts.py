"""Mistakes in mixtures of experts.

A softmax over the logits of the chosen experts alone is the same as renormalising, and no mistake where that is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from npllama.check.mistakes.entry import Mistake, Plant, Way, passed_on, rounded, shown, where, with_config
from npllama.config import Experts, ModelConfig

WEIGHTS = "layers.0.router_weights"


def experts_with(change: Callable[[Experts], Experts | None]) -> Plant:
    """Ask other experts, or weigh them in another way; no mistake where that is None, or what the model does."""

    def changed(config: ModelConfig) -> ModelConfig | None:
        experts = None if config.experts is None else change(config.experts)
        return None if experts is None else replace(config, experts=experts)

    return with_config(changed)


def renormalised(wanted: bool) -> Plant:
    """Scale the weights to a sum of one, or leave them; the same where all experts are asked."""
    return experts_with(
        lambda experts: replace(experts, renormalise=wanted) if experts.active < experts.count else None
    )


def rounded_logits(dtype: str) -> Plant:
    """Round the router's logits."""
    return where("experts", shown(router_logits=lambda x, seen: rounded(x, dtype)))


def asked(more: int) -> Plant:
    """Ask so many experts more for each token; no mistake where there are not as many."""
    return experts_with(
        lambda experts: (
            replace(experts, active=experts.active + more) if 1 <= experts.active + more <= experts.count else None
        )
    )


ENTRIES = (
    Mistake(
        "experts-renormalised-wrongly",
        "The weights of the chosen experts are scaled to a sum of one where the model leaves them, or the other way.",
        "router_probs is right, router_weights differs by a factor for each token.",
        "Mixtral's sum to one; Qwen's do where norm_topk_prob says so. A softmax over the chosen alone sums to one.",
        (
            Way("left as they are", WEIGHTS, renormalised(False)),
            Way("scaled to a sum of one", WEIGHTS, renormalised(True)),
        ),
    ),
    Mistake(
        "experts-active",
        "Another number of experts is asked for each token.",
        "router_weights has other zeros than it should, at every token.",
        "Read num_experts_per_tok from the checkpoint.",
        (Way("one too few", WEIGHTS, asked(-1)), Way("one too many", WEIGHTS, asked(1))),
    ),
    Mistake(
        "shared-expert-missing",
        "The answer of the shared expert is not added.",
        "ffn_out lacks shared_out; the chosen experts' answers are right.",
        "The shared expert answers for every token, on top of those that the router chooses.",
        (Way("", "layers.0.ffn_out", where("shared", passed_on(shared_out=lambda x, seen: np.zeros_like(x)))),),
    ),
    Mistake(
        "shared-expert-gate",
        "The answer of the shared expert does not pass its gate, or a gate without its sigmoid.",
        "shared_weight is not a number between zero and one, or is one everywhere; shared_out is too large.",
        "Multiply by sigmoid(x · routerᵀ), one number for each token.",
        (
            Way("missing", "layers.0.shared_weight", where("shared", shown(shared_weight=lambda x, seen: x * 0 + 1))),
            Way(
                "without sigmoid",
                "layers.0.shared_weight",
                where("shared", lambda run: run.with_ops(sigmoid=lambda x: x)),
            ),
        ),
    ),
    Mistake(
        "router-in-low-precision",
        "The router's logits are numbers of 16 bits in a run that is otherwise more exact.",
        "router_logits is off by a thousandth of its size; now and then a token is sent to another expert.",
        "Compute the router's logits and their softmax in float32.",
        tuple(
            Way(dtype, "layers.0.router_logits", rounded_logits(dtype), rounds=dtype)
            for dtype in ("bfloat16", "float16")
        ),
    ),
)
