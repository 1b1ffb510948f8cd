"""What a pass costs by its shapes alone: the operations and the positions that no implementation can save."""

from __future__ import annotations

import numpy as np

from npllama.engine import Model


def positions_seen(model: Model, first: int, count: int) -> float:
    """How many keys the tokens at positions first to first + count - 1 look at in all, on average over the layers."""
    config = model.config
    positions = np.arange(first + 1, first + count + 1)
    windows = [config.window(layer) for layer in range(config.n_layers)]
    return sum(int(np.minimum(positions, window or positions).sum()) for window in windows) / config.n_layers


def prefill_operations(model: Model, count: int) -> float:
    """How many float32 operations, two for each multiply-add, a prefill of ``count`` tokens takes.

    The matrix products of the layers for every token, those of attention with the positions that it sees, and the
    output matrix for the last token. Norms, RoPE and activations are thousands of times less.
    """
    config = model.config
    projections = config.n_layers * config.dim * config.head_dim * 2 * (config.n_heads + config.n_kv_heads)
    matrices = 3 if config.gated else 2
    feed_forward = sum(matrices * config.dim * _width(model, layer) for layer in range(config.n_layers))
    products = count * (projections + feed_forward) + config.dim * config.vocab_size
    attention = 2 * config.n_layers * config.n_heads * config.head_dim * positions_seen(model, 0, count)
    return 2 * (products + attention)


def _width(model: Model, layer: int) -> int:
    """Rows of the feed-forward matrices that a token meets in a layer."""
    experts = model.config.experts
    if experts is None or layer in experts.dense_layers:
        return model.config.hidden_dim
    return experts.active * experts.hidden_dim + experts.shared_dim
