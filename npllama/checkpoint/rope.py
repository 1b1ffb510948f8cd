"""RoPE at conversion: the frequencies that become part of the model, and the one layout that every store has."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from npllama.checkpoint.tensor import TensorRef
from npllama.config import ModelConfig, RopeScaling
from npllama.dtypes import Array
from npllama.errors import CorruptDataError


def inverse_frequencies(config: ModelConfig, factors: Array | None = None) -> NDArray[np.float32]:
    """Angle per position by which each pair of a head turns.

    Parameters
    ----------
    config : ModelConfig
        Gives ``rope_theta``, ``head_dim`` and the scaling.
    factors : ndarray of shape (Dh/2,), optional
        Divisors that the checkpoint brings (scaling of kind "factors").

    Returns
    -------
    ndarray of shape (Dh/2,), float32
        Radians per position, computed in float64 and rounded once.

    Notes
    -----
    ``f[j] = theta ** (-2 j / Dh)`` (Su et al., RoFormer, https://arxiv.org/abs/2104.09864). Llama 3.1 then treats each
    by its wavelength ``2 pi / f``: shorter than ``original / high`` stays, longer than ``original / low`` is divided by
    ``factor``, and between them ``(1 - s) f / factor + s f`` with ``s = (original / wavelength - low) / (high - low)``
    (https://github.com/meta-llama/llama-models/blob/a9c89c471f793423afd4cc3ca8671d6e56fe64cb/models/llama3/model.py#L45).
    """
    half = config.head_dim // 2
    freqs = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        pass
    elif scaling.kind == "factors":
        if factors is None or factors.shape != (half,) or not (np.isfinite(factors) & (factors > 0)).all():
            raise CorruptDataError(f"the RoPE frequency factors are not {half} positive numbers")
        freqs = freqs / factors.astype(np.float64)
    elif scaling.kind == "linear":
        freqs = freqs / scaling.factor
    else:
        original, low, high = scaling.original_max_seq_len, scaling.low_freq_factor, scaling.high_freq_factor
        turns = original * freqs / (2 * math.pi)  # how often a pair turns within the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        freqs = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return freqs.astype(np.float32)


def frequencies(
    config: ModelConfig, factors: Array | None = None
) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
    """Angles per position for texts within the original context, and for longer ones.

    Parameters
    ----------
    config, factors
        As for `inverse_frequencies`.

    Returns
    -------
    ndarray of shape (Dh/2,), float32, or None
        None in a model that has learned positions.
    ndarray of shape (Dh/2,), float32, or None
        Longrope's second set; None for every other model.

    Notes
    -----
    Longrope divides each frequency by a factor of its own: ``f[j] / short[j]`` within the original context,
    ``f[j] / long[j]`` beyond it (Ding et al., https://arxiv.org/abs/2402.13753).
    """
    if config.positions != "rope":
        return None, None
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return inverse_frequencies(config, factors), None
    plain = replace(config, rope_scaling=RopeScaling("factors"))
    # In single precision, as every implementation has them: checkpoints spell them with more digits or with fewer.
    short, long = (np.array(each, np.float32) for each in (scaling.short_factors, scaling.long_factors))
    return inverse_frequencies(plain, short), inverse_frequencies(plain, long)


def interleaved(ref: TensorRef, n_heads: int, head_dim: int) -> TensorRef:
    """Bring half-split rows of a query or key projection into interleaved pairs.

    A half-split head keeps the first numbers of all its pairs and then the second ones:
    ``[x0 x1 .. | y0 y1 ..]``; interleaved it is ``[x0 y0 x1 y1 ..]``.

    Parameters
    ----------
    ref : TensorRef
        Shape (heads * Dh, ...), half-split.
    n_heads : int
        Heads in it: H for queries, K for keys.
    head_dim : int
        Dh.

    Returns
    -------
    TensorRef
        Same shape; rows are read by whole heads and reordered.
    """

    def read_rows(start: int, stop: int) -> Array:
        first, last = start // head_dim, -(-stop // head_dim)
        rows = ref.read_rows(first * head_dim, last * head_dim)
        tail = rows.shape[1:]
        rows = rows.reshape(last - first, 2, head_dim // 2, *tail).swapaxes(1, 2).reshape(-1, *tail)
        return np.ascontiguousarray(rows[start - first * head_dim : stop - first * head_dim])

    if ref.shape[0] != n_heads * head_dim:
        raise CorruptDataError(f"{ref.shape[0]} rows are not {n_heads} heads of {head_dim}", file=ref.where)
    return replace(ref, read_rows=read_rows)
