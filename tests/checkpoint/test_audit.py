"""The audit measures what was lost, against the checkpoint itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoint.audit import audit, measure
from npllama.checkpoint.convert import convert
from npllama.checkpoint.quantize import quantize
from npllama.checkpoint.store import Store
from npllama.dtypes import Tensor, narrow
from npllama.errors import ConfigMismatchError
from tests.checkpoint.tiny import ref
from tests.fixtures.loud import loud_config, loud_tensors, write_hf


def test_measures_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
    data, scales, minima = quantize(values, "int4")
    stored = Tensor(data, "int4", scales, minima, 100)
    error = values - stored.numbers(to=np.float64)
    for block in (1, 700, 1 << 20):
        monkeypatch.setattr("npllama.checkpoint.audit._BLOCK_NUMBERS", block)
        found = measure(ref("w", values), stored).to_json()
        assert found["max_error"] == np.abs(error).max()
        assert found["rms_error"] == pytest.approx(np.sqrt((error**2).mean()))
        assert found["sqnr_db"] == pytest.approx(
            10 * np.log10((values.astype(np.float64) ** 2).mean() / (error**2).mean())
        )
        assert found["bits_per_weight"] == 8 * (40 * 2 * 32 + 40 * 2 * 4) / 4000


def test_bits_are_read_as_the_numbers_that_they_stand_for() -> None:
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    bits = narrow(values, "bfloat16")
    found = measure(ref("w", bits, "bfloat16"), Tensor(bits, "bfloat16"))
    assert (found.largest, found.sqnr, found.bits) == (0, None, 16)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_every_stored_weight_is_in_it_once(tmp_path: Path, dtype: str) -> None:
    config = loud_config()
    source = write_hf(tmp_path / "hf", loud_tensors(config), config)
    found = audit(source, convert(source, tmp_path / "m", dtype=dtype))
    store = Store.open(tmp_path / "m")
    assert list(found.errors) == [name for name in store.entries if not name.startswith("rope.")]
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["total"]["weights"] == sum(error.count for error in found.errors.values())
    worst = min(row["sqnr_db"] for row in document["tensors"] if row["sqnr_db"] is not None)
    assert worst > {"bf16": 50, "int8": 40, "int4": 15}[dtype]
    norms = [row for row in document["tensors"] if len(row["shape"]) == 1]
    assert norms
    assert dtype == "bf16" or all(row["max_error"] == 0 for row in norms)


def test_a_store_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    config = loud_config()
    other = replace(config, hidden_dim=2 * config.hidden_dim)
    source = write_hf(tmp_path / "hf", loud_tensors(config), config)
    another = write_hf(tmp_path / "other", loud_tensors(other), other)
    with pytest.raises(ConfigMismatchError, match="in the checkpoint"):
        audit(another, convert(source, tmp_path / "m"))
