"""`npllama bench`: the speeds stand beside the limits of the machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npllama.commands import bench as command
from npllama.generation.bench import Limits, Speed
from npllama.kernels.matmul import products

Npllama = Callable[..., Any]

SPEED = Speed(
    prefill_tokens=512,
    decode_tokens=128,
    rounds=3,
    batch=1,
    prefill_tokens_per_s=1234.0,
    decode_tokens_per_s=45.67,
    decode_alone_tokens_per_s=45.67,
    batch_gain=1.0,
    prefill_operations_per_s=200e9,
    bytes_per_token=270_000_000,
    cache_bytes_per_token=30_000_000,
    decode_bytes_per_s=15e9,
    limits=Limits(
        read_bytes_per_s=20e9, multiply_add_per_s=400e9, product_per_s=250e9, arithmetic="the matrix unit, three parts"
    ),
    prefill_share=0.5,
    prefill_share_of_product=0.8,
    decode_share=0.75,
)


@pytest.fixture
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine with little work."""
    for name, value in (("_STREAM", 1 << 12), ("_ROWS", 4), ("_SIDE", 64)):
        monkeypatch.setattr(command, name, value)


@pytest.mark.usefixtures("small_probes")
def test_the_fast_backend_is_held_against_the_machine(npllama: Npllama, store: Path) -> None:
    found = npllama("bench", store, "--prompt", "8", "--decode", "4", "--rounds", "2", "--json").json
    assert found["rounds"] == 2
    assert found["limits"].pop("arithmetic") == "vector registers"
    assert set(found["limits"]) == {"read_bytes_per_s", "multiply_add_per_s", "product_per_s"}
    assert min(found["limits"].values()) > 0
    assert (found["activations"], found["cache_dtype"], found["batch"]) == ("float32", "float32", 1)
    assert found["decode_share"] > 0
    assert found["prefill_share"] > 0
    assert found["cache_bytes_per_token"] > 0


@pytest.mark.usefixtures("small_probes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_the_product_that_stands_for_all_has_weights_as_the_model_has(dtype: str) -> None:
    square = command._square(dtype)
    assert (square.shape, square.dtype, square.numbers().shape) == ((64, 64), dtype, (64, 64))


def test_without_the_kernels_no_limit_is_measured(npllama: Npllama, store: Path) -> None:
    options = ("--prompt", "8", "--decode", "4", "--rounds", "1", "--backend", "numpy")
    found = npllama("bench", store, *options, "--json").json
    assert (found["limits"], found["decode_share"]) == (None, None)
    assert "not measured with this backend" in npllama("bench", store, *options).out


def test_the_table_spells_rates_and_shares(npllama: Npllama, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "bench", lambda model, **options: SPEED)
    lines = npllama("bench", store, "--backend", "numpy").out.splitlines()
    cells = [re.split(r"\s{2,}", line) for line in lines[1:3]]
    prefill, decode = (dict(zip(("phase", "tokens", "speed", "rate", "share"), row, strict=True)) for row in cells)
    assert (prefill["tokens"], prefill["speed"], prefill["rate"]) == ("512", "1234 tokens/s", "200 GFLOP/s")
    assert prefill["share"] == "50% of 400 GFLOP/s in the matrix unit, three parts; 80% of 250 GFLOP/s in products"
    assert (decode["tokens"], decode["speed"], decode["rate"]) == ("128", "45.7 tokens/s", "15 GB/s")
    assert decode["share"] == "75% of 20 GB/s"
    assert lines[-1].endswith("median of 3 rounds")
    assert "sequences" not in "".join(lines)


def test_of_a_batch_the_table_says_what_it_gains(
    npllama: Npllama, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = replace(SPEED, batch=8, decode_alone_tokens_per_s=9.5, batch_gain=4.807)
    monkeypatch.setattr(command, "bench", lambda model, **options: speed)
    lines = npllama("bench", store, "--backend", "numpy").out.splitlines()
    assert re.split(r"\s{2,}", lines[2])[:3] == ["decode", "8 x 128", "45.7 tokens/s"]
    assert lines[3] == "8 sequences together decode 4.81 times the 9.5 tokens/s of one"


def test_sequences_decode_together_and_the_cache_is_as_asked_for(npllama: Npllama, store: Path) -> None:
    options = ("--prompt", "8", "--decode", "4", "--rounds", "1", "--backend", "numpy", "--json")
    one = npllama("bench", store, *options).json
    many = npllama("bench", store, *options, "--batch", "3", "--cache-dtype", "bf16").json
    assert (many["batch"], many["decode_tokens"], many["cache_dtype"]) == (3, 4, "bfloat16")
    assert many["batch_gain"] > 0
    assert many["cache_bytes_per_token"] == one["cache_bytes_per_token"] / 2


@pytest.mark.usefixtures("small_probes")
@pytest.mark.parametrize("activations", ["float32", "bfloat16", "int8"])
def test_products_are_measured_as_the_model_computes_them(
    activations: str, npllama: Npllama, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def product_rate(linear: Any, x: Any, weight: Any) -> float:
        used.append(linear.__self__)
        return 1.0

    monkeypatch.setattr("npllama.kernels.probe.product_rate", product_rate)
    options = ("--prompt", "2", "--decode", "1", "--rounds", "1", "--kernels", "portable", "--activations", activations)
    assert npllama("bench", store, *options, "--json").json["activations"] == activations
    assert set(map(id, used)) == {id(products("portable", activations))}
