"""`npllama bench`: how fast a model runs, and what the machine would allow."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from npllama.checkpoint.quantize import quantize
from npllama.commands.console import Progress, human, per_second, print_json, print_table
from npllama.commands.engine import load_model, prepared
from npllama.dtypes import PACKINGS, Tensor, narrow
from npllama.engine import Model
from npllama.generation.bench import Limits, Speed, bench

#: Numbers to read, 1 GiB: there are caches of hundreds of MB.
_STREAM = 1 << 28
#: Rows, and side of the square matrix, of the product that stands for all products.
_ROWS, _SIDE = 512, 2048


def run(options: argparse.Namespace) -> int:
    """Measure, and print the speeds of prefill and decode with their shares of what the machine can do."""
    model = prepared(load_model(options))
    limits = _limits(model, options.kernels) if model.backend == "fast" else None
    with Progress() as progress:
        speed = bench(
            model,
            prompt=options.prompt,
            decode=options.decode,
            rounds=options.rounds,
            batch=options.batch,
            limits=limits,
            progress=progress,
        )
    engine = {"threads": model.threads, "backend": model.backend, "activations": model.activations}
    if options.json:
        print_json({**asdict(speed), **engine, "cache_dtype": model.cache_dtype})
        return 0
    print_table(("phase", "tokens", "speed", "rate", "share of the limit"), _rows(speed))
    if speed.batch > 1:
        alone = per_second(speed.decode_alone_tokens_per_s)
        print(f"{speed.batch} sequences together decode {speed.batch_gain:.3g} times the {alone} of one")
    print(
        f"backend {model.backend}, {model.threads} threads, activations in {model.activations}, "
        f"median of {speed.rounds} rounds"
    )
    return 0


def _limits(model: Model, kernels: str | None) -> Callable[[], Limits]:
    """Return what measures the machine with the operations of a model and weights of its dtype."""
    from npllama.kernels import probe
    from npllama.kernels.matmul import products

    product, dtype = products(kernels, model.activations), model.weights.output.dtype
    unit = probe.arithmetic(product.path, model.activations, dtype)
    numbers = np.ones(_STREAM, np.float32)
    x = np.random.default_rng(0).standard_normal((_ROWS, _SIDE), np.float32)
    square = _square(dtype)
    return lambda: Limits(
        read_bytes_per_s=probe.read_rate(numbers),
        multiply_add_per_s=unit.limit(),
        product_per_s=probe.product_rate(product.linear, x, square),
        arithmetic=unit.name,
    )


def _square(dtype: str) -> Tensor:
    """Return a random square matrix as a weight is stored."""
    values = np.random.default_rng(1).standard_normal((_SIDE, _SIDE), np.float32)
    if dtype not in PACKINGS:
        return Tensor(narrow(values, dtype), dtype)
    data, scales, *minima = quantize(values, dtype)
    return Tensor(data, dtype, scales, minima[0] if minima else None, _SIDE)


def _rows(speed: Speed) -> list[tuple[str, ...]]:
    """Spell the two phases as rows of the table."""
    prefill = human(speed.prefill_operations_per_s, "FLOP/s")
    decode = human(speed.decode_bytes_per_s, "B/s")
    decoded = f"{speed.batch} x {speed.decode_tokens}" if speed.batch > 1 else str(speed.decode_tokens)
    prefill_share = decode_share = "not measured with this backend"
    if speed.limits is not None:
        prefill_share = (
            f"{_percent(speed.prefill_share)} of {human(speed.limits.multiply_add_per_s, 'FLOP/s')} "
            f"in {speed.limits.arithmetic}; "
            f"{_percent(speed.prefill_share_of_product)} of {human(speed.limits.product_per_s, 'FLOP/s')} in products"
        )
        decode_share = f"{_percent(speed.decode_share)} of {human(speed.limits.read_bytes_per_s, 'B/s')}"
    return [
        ("prefill", str(speed.prefill_tokens), per_second(speed.prefill_tokens_per_s), prefill, prefill_share),
        ("decode", decoded, per_second(speed.decode_tokens_per_s), decode, decode_share),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
