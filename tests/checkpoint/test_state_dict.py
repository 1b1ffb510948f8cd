"""A tutorial's decoder, saved by torch alone, against the class itself, written here from its equations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllama
from npllama.checkpoint.open import open_checkpoint
from npllama.cli import main
from npllama.errors import (
    ConfigError,
    ConfigMismatchError,
    CorruptDataError,
    NpllamaError,
    ParameterError,
    UnsupportedError,
)

torch = pytest.importorskip("torch")
nn = torch.nn
pytestmark = pytest.mark.torch

VOCAB, POSITIONS, LAYERS = 61, 32, 3


class Attention(nn.Module):  # type: ignore[misc, name-defined]
    """Heads are split off before they are projected; scores are divided by the root of the whole width."""

    def __init__(self, dim: int, heads: int, projected: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        for name in ("values", "keys", "queries"):
            setattr(self, name, nn.Linear(dim // heads, projected, bias=False))
        self.fc_out = nn.Linear(dim, dim)

    def forward(self, x: Any, mask: Any) -> Any:
        parts = x.reshape(*x.shape[:2], self.heads, self.dim // self.heads)
        values, keys, queries = self.values(parts), self.keys(parts), self.queries(parts)
        energy = torch.einsum("nqhd,nkhd->nhqk", queries, keys).masked_fill(mask == 0, -1e20)
        attention = torch.softmax(energy / self.dim**0.5, dim=3)
        out = torch.einsum("nhql,nlhd->nqhd", attention, values)
        return self.fc_out(out.reshape(*x.shape[:2], self.dim))


class Block(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, dim: int, heads: int, projected: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, projected)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x: Any, mask: Any) -> Any:
        x = self.norm1(self.attention(x, mask) + x)
        return self.norm2(self.feed_forward(x) + x)


class Decoder(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, dim: int, heads: int, projected: int | None = None, hidden: int = 100) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(VOCAB, dim)
        self.position_embedding = nn.Embedding(POSITIONS, dim)
        projected = dim // heads if projected is None else projected
        self.layers = nn.ModuleList([Block(dim, heads, projected, hidden) for _ in range(LAYERS)])
        self.fc_out = nn.Linear(dim, VOCAB)

    def forward(self, tokens: Any) -> Any:
        count = tokens.shape[1]
        x = self.word_embedding(tokens) + self.position_embedding(torch.arange(count))
        mask = torch.ones(count, count).tril()
        for layer in self.layers:
            x = layer(x, mask)
        return self.fc_out(x)


def loud(dim: int, heads: int, **options: Any) -> Any:
    """Return a decoder in which every parameter matters."""
    torch.manual_seed(0)
    model = Decoder(dim, heads, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif any(part in name for part in ("queries", "keys")):
                parameter.normal_(0, 3 / parameter.shape[1] ** 0.5)
            else:
                parameter.normal_(0, 1 / parameter.shape[1] ** 0.5)
    return model.eval()


def saved(path: Path, model: Any, wrap: Callable[[Any], Any] = lambda state: state) -> Path:
    torch.save(wrap(model.state_dict()), path)
    return path


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = model.double()(torch.tensor([tokens]))[0].numpy()
    return found


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize(("dim", "heads"), [(48, 4), (40, 1), (27, 9), (35, 5)])
def test_logits_are_those_of_the_class(tmp_path: Path, dim: int, heads: int, backend: str) -> None:
    model = loud(dim, heads)
    store = npllama.convert(saved(tmp_path / "decoder.pth", model), tmp_path / "store", dtype="f32")
    tokens = np.random.default_rng(0).integers(0, VOCAB, 24).tolist()
    truth = logits_of(model, tokens)

    mine = npllama.load(store, backend=backend)
    cache = mine.new_cache(len(tokens))
    rows = [mine.forward(tokens[:20], cache), *(mine.forward([token], cache) for token in tokens[20:])]
    found = np.concatenate(rows)
    errors = ((found - truth) ** 2).sum(-1) / (truth**2).sum(-1)
    assert errors.max() < 1e-10
    assert np.ptp(truth) > 1, "the model is not loud"


def test_everything_is_told_by_the_shapes(tmp_path: Path) -> None:
    config, notes = opened(saved(tmp_path / "decoder.pth", loud(48, 4)))
    assert (config.dim, config.n_heads, config.head_dim, config.n_layers) == (48, 4, 12, LAYERS)
    assert (config.hidden_dim, config.vocab_size, config.max_seq_len) == (100, VOCAB, POSITIONS)
    assert config.score_dim == 48
    assert any("4 heads of 12" in note for note in notes)
    assert any("along the diagonal" in note for note in notes)


def opened(path: Path, **options: Any) -> tuple[Any, tuple[str, ...]]:
    checkpoint = open_checkpoint(path, **options)
    for source in checkpoint.sources:
        source.close()
    return checkpoint.config, checkpoint.notes


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
    ],
    ids=["model", "state_dict", "module."],
)
def test_a_wrapped_state_dict_is_the_same_model(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = loud(48, 4)
    plain, _ = opened(saved(tmp_path / "plain.pth", model))
    found, _ = opened(saved(tmp_path / "wrapped.pth", model, wrap))
    assert found == plain


def test_a_folder_with_the_one_file_is_the_same_model(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pth", loud(48, 4))
    assert opened(tmp_path)[0] == opened(path)[0]


def test_every_number_is_stored_where_the_class_has_it(tmp_path: Path) -> None:
    model = loud(48, 4)
    checkpoint = open_checkpoint(saved(tmp_path / "decoder.pth", model))
    state = model.state_dict()
    wide = checkpoint.tensors["layers.1.attention.wk.weight"]
    wanted = np.kron(np.eye(4, dtype=np.float32), state["layers.1.attention.keys.weight"].numpy())
    np.testing.assert_array_equal(wide.read(), wanted)
    np.testing.assert_array_equal(np.concatenate([wide.read_rows(0, 17), wide.read_rows(17, 48)]), wanted)
    np.testing.assert_array_equal(checkpoint.tensors["output.bias"].read(), state["fc_out.bias"].numpy())
    for source in checkpoint.sources:
        source.close()


def test_inspect_tells_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved(tmp_path / "decoder.pth", loud(48, 4))), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["family"] == "GPT1Decoder"


# --- what is refused -----------------------------------------------------------------------------------------------


def refused(path: Path, error: type[NpllamaError], words: str, **options: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        opened(path, **options)
    assert type(caught.value) is error
    assert str(path) in str(caught.value)


def test_projections_to_the_whole_width_run_with_one_head_alone_and_are_refused_with_more(tmp_path: Path) -> None:
    single, several = loud(48, 1, projected=48), loud(48, 4, projected=48)
    assert logits_of(single, [1, 2, 3]).shape == (3, VOCAB)
    with pytest.raises(RuntimeError, match="shape"):
        logits_of(several, [1, 2, 3])
    assert opened(saved(tmp_path / "single.pth", single))[0].n_heads == 1
    refused(saved(tmp_path / "several.pth", several), UnsupportedError, "widen a head of 12 to 48, and 4 such heads")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position_embedding.weight": None}, r"1 tensors are missing: position_embedding"),
        ({"layers.2.norm1.bias": None}, r"1 tensors are missing: layers\.2\.norm1\.bias"),
        ({"layers.1.norm3.bias": (48,)}, r"1 tensors are unknown: layers\.1\.norm3"),
        ({"layers.7.norm1.bias": (48,)}, r"missing: layers\.3"),
        ({"layers.0.attention.queries.weight": (12, 13)}, "do not divide a width of 48"),
        ({"layers.0.attention.queries.weight": (12, 0)}, "do not divide a width of 48"),
        ({"layers.0.attention.queries.weight": (7, 12)}, r"not of one head's width: .*queries.weight is \(7, 12\)"),
        ({"layers.2.attention.keys.weight": (13, 12)}, r"not of one head's width: .*keys.weight is \(13, 12\)"),
        ({"layers.0.feed_forward.0.weight": (100,)}, r"are no matrices: layers\.0\.feed_forward\.0\.weight"),
        ({"fc_out.bias": (VOCAB + 1,)}, r"fc_out\.bias is \(62,\), expected \(61,\)"),
    ],
)
def test_tensors_that_make_no_model_are_refused(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], words: str
) -> None:
    state = loud(48, 4).state_dict()
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "decoder.pth")
    refused(tmp_path / "decoder.pth", ConfigMismatchError, words)


def test_a_damaged_number_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "decoder.pth", loud(48, 4))
    state = torch.load(path, weights_only=True)
    values = state["layers.1.attention.values.weight"].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(values) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptDataError, match="CRC-32"):
        npllama.convert(path, tmp_path / "store")


def test_other_parameters_without_a_configuration_need_one(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"no params\.json"):
        opened(tmp_path / "other.pth")


def test_a_rope_factor_is_refused(tmp_path: Path) -> None:
    refused(saved(tmp_path / "decoder.pth", loud(48, 4)), ParameterError, "RoPE factor", rope_factor=8.0)
