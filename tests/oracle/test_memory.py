"""The oracle's memory: one layer, whatever the depth of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from npllama.checkpoint.store import Store
from tests.fixtures.loud import loud_config
from tests.oracle.sources import loud_store
from tools.environment import ROOT

_MEASURE = """
import json, re, sys
from pathlib import Path
from npllama.checkpoint.store import Store
from oracle.decoder import TorchDecoder

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

small, large = map(Store.open, sys.argv[1:])
TorchDecoder(small).forward([1, 2, 3])  # what torch needs for itself
before = peak()
TorchDecoder(large).forward(list(range(16)))
print(json.dumps(peak() - before))
"""


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_a_deep_model_takes_the_memory_of_one_layer(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    large = loud_config(dim=512, n_layers=12, n_heads=8, n_kv_heads=8, head_dim=64, hidden_dim=2048)
    stores = [loud_store(tmp_path / name, config) for name, config in (("small", loud_config()), ("large", large))]
    command = [sys.executable, "-c", _MEASURE, *map(str, stores)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    entries = Store.open(stores[1]).entries
    layer = sum(entry.data_bytes for name, entry in entries.items() if name.startswith("layers.0."))
    assert json.loads(done.stdout) < 4 * layer, f"one of {large.n_layers} layers has {layer} bytes"
