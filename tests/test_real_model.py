"""The main job on a trained model: SmolLM2-135M-Instruct, through every format, against transformers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllama
from npllama.checkpoint.store import Store
from npllama.dtypes import narrow
from tests.fixtures.loud import meta_params, write_meta

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a land far away, there lived 3 dragons and 12 knights. The dragons",
    "水は",
)
N_NEW = 32

WITHOUT_TORCH = f"""
import sys
sys.modules["torch"] = None  # importing it fails
import npllama
source, store, prompt = sys.argv[1:]
npllama.convert(source, store, dtype="bf16")
for step in npllama.generate(npllama.load(store), prompt, max_new_tokens={N_NEW}):
    sys.stdout.buffer.write(step.text.encode())
"""


@pytest.fixture(scope="module")
def stores(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    return {dtype: npllama.convert(smollm2_gguf, folder / dtype, dtype=dtype) for dtype in ("f32", "bf16")}


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Iterator[Any]:
    """transformers' own reading of the same file: its configuration, its dequantisation, its model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    config = transformers.AutoConfig.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    tensors = loading.load_gguf_checkpoint(smollm2_gguf, return_tensors=True, model_to_load=empty)["tensors"]
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    _, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    model.tie_weights()
    with torch.no_grad():
        yield lambda ids: model(torch.tensor(ids)[None]).logits[0].numpy()


def greedy(model: npllama.Model, ids: list[int]) -> list[int]:
    return [step.token for step in npllama.generate(model, ids, max_new_tokens=N_NEW)]


@pytest.mark.torch
@pytest.mark.parametrize("backend", ["fast", "numpy"])
def test_greedy_tokens_and_logits_equal_those_of_transformers(
    stores: dict[str, Path], reference: Any, backend: str
) -> None:
    model = npllama.load(stores["f32"], backend=backend)
    assert model.tokenizer is not None
    for prompt in PROMPTS:
        ids = model.tokenizer.encode(prompt)
        tokens = greedy(model, ids)
        whole = ids + tokens
        logits = reference(whole)  # one pass: the token that transformers would choose behind every position
        chosen = logits[len(ids) - 1 : -1].argmax(-1).tolist()
        assert tokens == chosen[: len(tokens)], prompt
        assert len(tokens) == N_NEW or tokens[-1] in model.tokenizer.stop_ids
        ours = model.forward(whole)
        assert ((ours - logits) ** 2).sum() < 1e-9 * (logits**2).sum(), prompt


@pytest.mark.torch
@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_meta_checkpoint_converts_without_torch_bit_by_bit_and_writes_the_same_text(
    stores: dict[str, Path], tmp_path: Path, n_shards: int
) -> None:
    pytest.importorskip("torch")
    source = Store.open(stores["f32"])
    names = [entry["name"] for entry in source.manifest["tensors"] if entry["name"] != "rope.freqs"]
    tensors = {name: source.tensor(name).numbers() for name in names}
    tensors["output.weight"] = tensors["tok_embeddings.weight"]  # Meta's files have it, tied or not
    folder = write_meta(tmp_path / "meta", tensors, source.config, params=meta_params(source.config), n_shards=n_shards)
    shutil.copytree(stores["f32"] / "tokenizer", folder, dirs_exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(folder), str(tmp_path / "store"), PROMPTS[0]],
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    converted = Store.open(tmp_path / "store")
    assert converted.manifest["tied"] == {"output.weight": "tok_embeddings.weight"}
    for name, values in tensors.items():
        np.testing.assert_array_equal(converted.tensor(name).data, narrow(values, "bfloat16"), err_msg=name)
    np.testing.assert_array_equal(converted.frequencies()[0], source.frequencies()[0])
    model = npllama.load(stores["bf16"])
    assert done.stdout == "".join(step.text for step in npllama.generate(model, PROMPTS[0], max_new_tokens=N_NEW))


@pytest.mark.parametrize("backend", ["fast", "numpy"])
def test_bfloat16_storage_still_writes_sensible_text(stores: dict[str, Path], backend: str) -> None:
    model = npllama.load(stores["bf16"], backend=backend)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    text = "".join(step.text for step in npllama.generate(model, messages, max_new_tokens=N_NEW))
    assert "Paris" in text


@pytest.mark.parametrize("backend", ["fast", "numpy"])
def test_step_by_step_decode_equals_one_shot_and_chunked_prefill_at_every_step(
    stores: dict[str, Path], backend: str
) -> None:
    model = npllama.load(stores["f32"], backend=backend)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(PROMPTS[2])
    whole = model.forward(ids)
    for sizes in ([1] * len(ids), [5, 1, 11, len(ids) - 17]):
        cache = model.new_cache(len(ids))
        parts = np.concatenate([model.forward(part, cache) for part in np.split(np.array(ids), np.cumsum(sizes)[:-1])])
        assert ((parts - whole) ** 2).sum() < 1e-9 * (whole**2).sum()
        assert (parts.argmax(-1) == whole.argmax(-1)).all()


def test_a_store_cut_to_two_layers_keeps_them_exactly_and_says_so(
    smollm2_gguf: Path, stores: dict[str, Path], tmp_path: Path
) -> None:
    cut = npllama.load(npllama.convert(smollm2_gguf, tmp_path / "two", dtype="f32", layers=2), backend="numpy")
    whole = npllama.load(stores["f32"], backend="numpy")
    assert cut.notice is not None
    assert "2 of 30 layers" in cut.notice
    assert "not meaningful" in cut.notice
    with npllama.record(cut) as a, npllama.record(whole) as b:
        cut.forward([1, 2, 3])
        whole.forward([1, 2, 3])
    for name in a:
        if name not in ("norm", "logits"):
            np.testing.assert_array_equal(a[name], b[name])
