"""SentencePiece tokenizers all the way: from every kind of checkpoint through a store to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import npllama
from npllama.checkpoint.gguf import tokenizer_files
from npllama.text.tokenizer import Tokenizer
from tests.fixtures.loud import loud_config, loud_tensors, write_gguf, write_hf, write_meta
from tests.generation.fakes import VOCABULARY, FakeModel, one_hot
from tests.text.pieces import added, dump, gguf_metadata, json_document, made_up, processor, train

N = 700
CONFIG = loud_config(vocab_size=N + 64)  # padded, as Phi-3's is
TEXT = "def  the text\n  é🤗 <|end|>"


def companions(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(dump({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "generation_config.json").write_bytes(dump({"eos_token_id": [2, N + 7]}))


def hf_with_model(folder: Path) -> Path:
    write_hf(folder, loud_tensors(CONFIG), CONFIG)
    (folder / "tokenizer.model").write_bytes(train())
    (folder / "added_tokens.json").write_bytes(dump({"<|end|>": N + 7}))
    companions(folder)
    return folder


def hf_with_json(folder: Path) -> Path:
    write_hf(folder, loud_tensors(CONFIG), CONFIG)
    (folder / "tokenizer.json").write_bytes(dump(json_document(train(), "legacy", [added(N + 7, "<|end|>")])))
    companions(folder)
    return folder


def meta(folder: Path) -> Path:
    write_meta(folder, loud_tensors(CONFIG), CONFIG)
    (folder / "tokenizer.model").write_bytes(train())
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir()
    metadata = gguf_metadata(train())
    tokens = [*metadata["tokenizer.ggml.tokens"], *(f"[PAD{n}]" for n in range(N, N + 64))]
    tokens[N + 7] = "<|end|>"
    kinds = [*metadata["tokenizer.ggml.token_type"].tolist(), *[5] * 64]
    kinds[N + 7] = 4
    metadata |= {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [*metadata["tokenizer.ggml.scores"].tolist(), *[-1000.0] * 64],
        "tokenizer.ggml.eot_token_id": N + 7,
    }
    return write_gguf(folder / "m.gguf", loud_tensors(CONFIG), CONFIG, metadata=metadata)


@pytest.mark.parametrize(
    ("write", "file", "stops"),
    [
        (hf_with_model, "tokenizer.model", {2, N + 7}),
        (hf_with_json, "tokenizer.json", {2, N + 7}),
        pytest.param(meta, "tokenizer.model", {2}, marks=pytest.mark.torch),
        (gguf, "tokenizer.model", {2, N + 7}),
    ],
)
def test_a_store_has_the_tokenizer_of_its_checkpoint(
    tmp_path: Path, write: Callable[[Path], Path], file: str, stops: set[int]
) -> None:
    store = npllama.convert(write(tmp_path / "checkpoint"), tmp_path / "store")
    assert (store / "tokenizer" / file).is_file()
    model = npllama.load(store, backend="numpy", special_tokens=["<|mine|>"])
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = [1, *processor(train()).encode(TEXT)]
    assert (tokenizer.encode(TEXT), tokenizer.stop_ids) == (ids, stops)
    assert tokenizer.decode(ids) == f"<s>{TEXT}"
    assert tokenizer.special_tokens["<|mine|>"] == (N if write is meta else N + 8)
    steps = list(npllama.generate(model, TEXT, max_new_tokens=4))
    assert (
        "".join(step.text for step in steps)
        == tokenizer.decode([*ids, *(step.token for step in steps)])[len(TEXT) + 3 :]
    )
    assert npllama.Tokenizer.from_path(store).encode(TEXT) == ids


# --- generation -----------------------------------------------------------------------------------------------------

SMALL = Tokenizer.from_files(
    tokenizer_files(made_up([("▁", -2.0), ("a", -3.0), ("▁a", -1.0)], add_bos_token=True), "m.gguf")
)
A = 261


def writing(ids: list[int], prompt: int) -> FakeModel:
    """Return a model that writes given ids behind a prompt of so many tokens."""
    return FakeModel(lambda tokens: one_hot(ids[len(tokens) - prompt]), tokenizer=SMALL)


def test_generated_text_goes_on_behind_the_prompt() -> None:
    assert SMALL.encode("a a") == [1, A, A]
    model = writing([A, A, 2], 2)
    assert [step.text for step in npllama.generate(model, "a")] == [" a", " a", ""]
    model = writing([A, A, 2], 1)
    assert [step.text for step in npllama.generate(model, "")] == ["a", " a", ""]


def test_rows_without_a_token_can_be_generated() -> None:
    assert SMALL.n_vocab < VOCABULARY
    padding = np.arange(SMALL.n_vocab, VOCABULARY)
    model = writing([*padding.tolist(), A, *padding.tolist(), 3 + 0xC3, VOCABULARY - 1, 3 + 0xA9, 2], 2)
    steps = list(npllama.generate(model, "a"))
    assert "".join(step.text for step in steps) == " aé"
    assert [SMALL.token_piece(step.token) for step in steps[: len(padding)]] == [""] * len(padding)
