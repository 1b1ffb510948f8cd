"""A mixture of experts touches the pages of the experts that it asks, and of no others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from npllama.checkpoint.convert import convert_checkpoint
from npllama.config import Experts
from tests.checkpoint.tiny import checkpoint
from tests.fixtures.loud import loud_config
from tools.environment import ROOT

COUNT, ACTIVE = 64, 2
#: An expert's matrix has 16 pages of 4 KiB.
CONFIG = loud_config(
    n_layers=2, dim=64, head_dim=16, hidden_dim=64, vocab_size=32, experts=Experts(COUNT, ACTIVE, hidden_dim=256)
)

#: Runs a token, takes every page away from all experts that it did not ask, and runs it again. Whoever touches a page
#: of theirs is killed. With a fourth argument, tokens that ask others are run.
SCRIPT = """
import ctypes, json, mmap, sys
import numpy as np
import npllama

store, backend, count, *others = sys.argv[1:]
model = npllama.load(store, backend=backend)
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

def forbid(matrix, expert):
    size = matrix.nbytes // int(count)
    begin = matrix.ctypes.data + expert * size
    first, last = -(-begin // mmap.PAGESIZE), (begin + size) // mmap.PAGESIZE
    assert last > first and not mprotect(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, 0)
    return last - first

with npllama.record(model, "*.router_weights") as rec:
    before = model.forward([7])
asked, pages = [], 0
for i, layer in enumerate(model.weights.layers):
    weights = rec[f"layers.{i}.router_weights"][0]
    asked.append(int((weights > 0).sum()))
    for expert in np.flatnonzero(weights == 0):
        pages += sum(forbid(matrix.data, int(expert)) for matrix in (layer.w1, layer.w3, layer.w2))
after = model.forward(list(range(32)))[7:8] if others else model.forward([7])
print(json.dumps({"asked": asked, "pages": pages, "same": bool((before == after).all())}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = checkpoint(config=CONFIG, tokenizer={})
    return convert_checkpoint(made, tmp_path_factory.mktemp("mixture") / "store", dtype="f32")


def run(store: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, str(store), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes pages away as Linux does")


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_a_token_touches_no_page_of_an_expert_that_it_did_not_ask(store: Path, backend: str) -> None:
    done = run(store, backend, str(COUNT))
    assert done.returncode == 0, done.stderr or f"killed by signal {-done.returncode}"
    found = json.loads(done.stdout)
    assert found["asked"] == [ACTIVE] * CONFIG.n_layers
    assert found["same"]
    assert found["pages"] >= 3 * (COUNT - ACTIVE) * 15 * CONFIG.n_layers


def test_tokens_that_ask_other_experts_do_not_survive_it(store: Path) -> None:
    assert run(store, "numpy", str(COUNT), "others").returncode == -signal.SIGSEGV
