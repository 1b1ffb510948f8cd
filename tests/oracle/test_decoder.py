"""The oracle against the engine's float64 truth, and what it promises by itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace
from npllama.checkpoint.quantize import quantize
from npllama.config import ModelConfig
from npllama.dtypes import Tensor
from npllama.errors import ContextOverflowError, ParameterError
from npllama.taps import Recorder, tap_names
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import LOUD_TOKENS, loud_config, loud_tokens
from tests.oracle.sources import FAMILIES, OPTIONS, SHAPES, Loud, nmse, nmse_by_tap, prefill_of, recorded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from oracle.decoder import TorchDecoder  # noqa: E402
from oracle.equations import (  # noqa: E402
    mask,
    rms_norm,
    rotate,
    rounded_to_int8,
    rounding_of,
    route,
    turns,
    untapped,
)
from oracle.run import numbers, record  # noqa: E402
from oracle.weights import WeightReader, to_torch  # noqa: E402

DECODED = 3
MODELS = {**SHAPES, **FAMILIES, **OPTIONS}


def some_tokens(config: ModelConfig) -> list[int]:
    return loud_tokens(config, prefill_of(config) + DECODED).tolist()


def truth_of(config: ModelConfig) -> MemoryTrace:
    return run_trace(loud_model(config, backend="float64"), some_tokens(config), prefill=prefill_of(config))


def numpy_turns(freqs: Any, start: int, count: int, scale: float = 1.0) -> Any:
    angles = np.outer(np.arange(start, start + count, dtype=np.float32), freqs.numpy())
    return torch.complex(*(torch.from_numpy(part(angles) * np.float32(scale)) for part in (np.cos, np.sin)))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_in_float64_every_tap_of_prefill_and_decode_is_the_truth(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's cosines and sines differ from NumPy's in the last bit of a float32, which is all that may differ.
    monkeypatch.setattr("oracle.decoder.turns", numpy_turns)
    truth = truth_of(config)
    found = recorded(TorchDecoder(Loud(config), "float64"), truth.tokens, truth.prefill)
    assert found.taps == truth.taps
    assert {name: error for name, error in nmse_by_tap(found, truth).items() if error > 1e-28} == {}


@pytest.mark.parametrize("scale", [1.0, 1.19])
def test_turns_are_float32_cosines_and_sines_of_float32_angles(scale: float) -> None:
    freqs = torch.tensor([1.0, 0.1, 1e-4])
    found = turns(freqs, 100_000, 4, scale).numpy()
    angles = np.outer(np.arange(100_000, 100_004, dtype=np.float32), freqs.numpy())
    assert found.dtype == np.complex64
    np.testing.assert_allclose(found.real, scale * np.cos(angles.astype(np.float64)), atol=1.3e-7, rtol=0)
    np.testing.assert_allclose(found.imag, scale * np.sin(angles.astype(np.float64)), atol=1.3e-7, rtol=0)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_in_float32_every_tap_lies_at_float32_noise_from_the_truth(config: ModelConfig) -> None:
    truth = truth_of(config)
    errors = nmse_by_tap(recorded(TorchDecoder(Loud(config)), truth.tokens, truth.prefill), truth)
    assert set(errors) == {name.rpartition(".")[2] for name in tap_names(config)}
    assert max(errors.values()) < 1e-10


@pytest.mark.parametrize("chunk", [6, 63])
@pytest.mark.parametrize("name", ["llama", "qwen2 with a window in one layer", "qwen2_moe", "openai-gpt"])
def test_a_prefill_in_chunks_computes_what_one_piece_does(name: str, chunk: int) -> None:
    config = FAMILIES[name]
    tokens = some_tokens(config)
    whole = TorchDecoder(Loud(config), "float64").forward(tokens)
    pieces = TorchDecoder(Loud(config), "float64")
    logits = torch.cat([pieces.forward(tokens[start : start + chunk]) for start in range(0, len(tokens), chunk)])
    assert pieces.tokens == tokens
    assert nmse(numbers(logits), numbers(whole)) < 1e-26


def test_a_longrope_text_that_outgrows_its_context_goes_on_as_if_it_had_always_been_long() -> None:
    config = FAMILIES["phi3 with longrope"]
    assert config.rope_scaling is not None
    tokens, original = some_tokens(config), config.rope_scaling.original_max_seq_len
    whole = numbers(TorchDecoder(Loud(config), "float64").forward(tokens))
    oracle = TorchDecoder(Loud(config), "float64")
    steps = np.concatenate([numbers(oracle.forward([token])) for token in tokens])
    assert len(tokens) == original + 1
    assert nmse(steps[original:], whole[original:]) < 1e-26
    assert nmse(steps[:original], whole[:original]) > 1e-4
    assert nmse(steps[:original], numbers(TorchDecoder(Loud(config), "float64").forward(tokens[:-1]))) < 1e-26


def test_a_window_holds_so_many_positions_the_own_among_them() -> None:
    seen = (numbers(mask(2, 5, 3, torch.float32)) == 0).astype(int).tolist()
    assert seen == [[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_of_equally_probable_experts_the_first_are_asked() -> None:
    chosen, weights = route(torch.zeros(3, 7), 2, renormalise=False, tap=untapped)
    assert chosen.tolist() == [[0, 1]] * 3
    np.testing.assert_allclose(numbers(weights), 1 / 7, rtol=1e-6)


def test_in_bfloat16_experts_are_chosen_by_probabilities_that_were_not_rounded() -> None:
    logits = torch.tensor([[0.1, 0.1 + 2**-11, 0.5]]).bfloat16()  # the first two probabilities round to one number
    seen = {}
    chosen, weights = route(logits, 2, renormalise=False, tap=lambda name, x: seen.setdefault(name, x))
    assert seen["router_probs"][0, 0] == seen["router_probs"][0, 1]
    assert chosen.tolist() == [[1, 2]]
    assert weights.tolist() == seen["router_probs"][:, 1:].tolist()


@pytest.mark.parametrize("width", [64, 100, 7])
def test_int8_is_rounded_as_it_is_declared_bit_by_bit(width: int) -> None:
    from npllama.rounding import rounded_to_int8 as declared

    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, (500, width), dtype=np.uint32).view(np.float32)
    of_any_size = rng.standard_normal((5000, width), np.float32) * (2.0 ** rng.integers(-140, 120, (5000, 1))).astype(
        "f"
    )
    for x in (patterns, of_any_size, np.zeros((2, width), np.float32)):
        found = rounded_to_int8(torch.from_numpy(x)).numpy()
        np.testing.assert_array_equal(found, declared(x))
        assert (np.signbit(found) == np.signbit(declared(x)))[np.isfinite(found)].all()


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_in_int8_the_inputs_of_products_are_rounded_and_nothing_else(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = some_tokens(FAMILIES[family])
    exact = recorded(TorchDecoder(Loud(FAMILIES[family]), "float32"), tokens)
    found = recorded(TorchDecoder(Loud(FAMILIES[family]), "int8"), tokens)
    assert (found.dtype, {entry.dtype for entry in found.taps}) == ("int8", {"float32"})
    errors = nmse_by_tap(found, exact)
    assert errors["tok_embeddings"] == 0
    assert 1e-6 < errors["logits"] < 0.3
    monkeypatch.setattr("oracle.decoder.rounded_to_int8", lambda x: x)
    plain = recorded(TorchDecoder(Loud(FAMILIES[family]), "int8"), tokens)
    assert set(nmse_by_tap(plain, exact).values()) == {0.0}


def test_only_the_experts_that_are_asked_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config, read, weights = FAMILIES["qwen3_moe"], [], {}
    assert config.experts is not None

    def watched(tensor: Tensor, dtype: Any, index: Any = ...) -> Any:
        if tensor.shape == (config.experts.count * config.experts.hidden_dim, config.dim):
            read.append(index.start // config.experts.hidden_dim)
        return to_torch(tensor, dtype, index)

    monkeypatch.setattr("oracle.weights.to_torch", watched)
    TorchDecoder(Loud(config)).forward([1, 2], lambda name, x: weights.setdefault(name, x))
    asked = []
    for i in range(config.n_layers):
        experts = np.flatnonzero(numbers(weights[f"layers.{i}.router_weights"]).any(axis=0)).tolist()
        asked += experts + experts  # its matrices to gate and up
    assert read == asked
    assert len(read) < 2 * config.n_layers * config.experts.count


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "olmo2"])
def test_in_bfloat16_each_family_rounds_in_its_own_places(family: str) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 2, 16, generator=rng).bfloat16(), torch.rand(16, generator=rng).bfloat16()
    exact = torch.nn.functional.rms_norm(x.double(), (16,), eps=1e-5)
    once, twice = (exact * weight).bfloat16(), exact.bfloat16() * weight
    by = turns(torch.rand(8, generator=rng), 0, 64)
    turned = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * by[:, None]).flatten(-2)
    shares = [
        float((found == wanted).float().mean())
        for found, wanted in (
            (rms_norm(x, weight, 1e-5, rounding_of(family)), once if family == "olmo2" else twice),
            (rms_norm(x, weight, 1e-5, rounding_of(family)), twice if family == "olmo2" else once),
            (rotate(x, by, rounding_of(family)), turned.bfloat16()),
        )
    ]
    assert shares[0] > 0.999
    assert shares[1] < 0.9
    assert shares[2] < 0.9 if family == "qwen2" else shares[2] > 0.999


@pytest.mark.parametrize(("dtype", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_taps_have_the_order_shapes_and_dtype_of_the_table(config: ModelConfig, dtype: str, held: str) -> None:
    oracle, recorder, names = TorchDecoder(Loud(config), dtype), Recorder(config), []
    for count in (5, 1):
        check = recorder.step(count, len(oracle.tokens) + count, np.dtype(held))

        def tap(name: str, x: Any, check: Any = check) -> Any:
            names.append(name)
            check(name, numbers(x))
            return x

        oracle.forward(list(range(count)), tap)
    assert names == 2 * tap_names(config)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "gpt2"])
def test_taps_of_a_bfloat16_run_are_exact_widenings(name: str) -> None:
    config = FAMILIES[name]
    trace = recorded(TorchDecoder(Loud(config, "bfloat16"), "bfloat16"), some_tokens(config), LOUD_TOKENS)
    lower_halves = {
        entry.name
        for entry in trace.taps
        if (trace.read(entry.name, entry.step).ravel().view(np.uint32) & 0xFFFF).any()
    }
    assert lower_halves == set()


def test_one_layer_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    config, alive, under = loud_config(n_layers=6), [], WeightReader.under
    tensors: list[weakref.ref[Any]] = []

    def watched(self: Any, prefix: str) -> Mapping[str, Any]:
        alive.append(sum(tensor() is not None for tensor in tensors))
        found = under(self, prefix)
        tensors.extend(map(weakref.ref, found.values()))
        return found

    monkeypatch.setattr(WeightReader, "under", watched)
    TorchDecoder(Loud(config)).forward([1, 2, 3])
    assert alive == [0] * (config.n_layers + 2)
    assert len(tensors) == 9 * config.n_layers + 2


def test_greedy_decoding_extends_the_trace_by_the_most_probable_tokens() -> None:
    config = loud_config()
    tokens = some_tokens(config)[:8]
    trace = MemoryTrace(tokens=tokens, prefill=8, config=config)
    record(TorchDecoder(Loud(config)), tokens, trace, greedy=DECODED)
    assert (trace.prefill, trace.steps, len(trace.tokens)) == (8, DECODED, 8 + DECODED)
    for step in range(DECODED):
        assert trace.tokens[8 + step] == int(trace.read("logits", step)[-1].argmax())


def test_of_equally_probable_tokens_the_lowest_id_is_taken() -> None:
    class Undecided:
        producer, config, dtype = "nobody", loud_config(), "float32"

        def forward(self, tokens: Any, tap: Any) -> Any:
            logits = torch.zeros(len(tokens), self.config.vocab_size)
            logits[:, [9, 4, 200]] = 1
            return tap("logits", logits)

    trace = MemoryTrace(tokens=[1], prefill=1)
    record(Undecided(), [1], trace, greedy=2)
    assert trace.tokens == [1, 4, 4]


@pytest.mark.parametrize(
    ("tokens", "settings", "kind", "message"),
    [
        ([], {}, ParameterError, "a prefill of 0 tokens, expected 1 to 0"),
        ([1, 2], {"prefill": 3}, ParameterError, "a prefill of 3 tokens, expected 1 to 2"),
        ([1, 256], {}, ParameterError, "token 256 at index 1 is not an id from 0 to 255"),
        ([1, -1], {}, ParameterError, "token -1 at index 1"),
        ([1, 2], {"greedy": 8191}, ContextOverflowError, "2 tokens and 8191 decode steps exceed the model's context"),
    ],
)
def test_tokens_that_the_model_cannot_run_are_refused(
    tokens: list[int], settings: dict[str, int], kind: type[Exception], message: str
) -> None:
    oracle = TorchDecoder(Loud(loud_config()))
    with pytest.raises(kind, match=message):
        record(oracle, tokens, MemoryTrace(tokens=[1], prefill=1), **settings)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ParameterError, match="the dtype is 'float16', expected one of float32, bfloat16, float64"):
        TorchDecoder(Loud(loud_config()), "float16")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights_are_the_numbers_that_they_stand_for(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    data, scales, *minima = quantize(values, dtype)
    tensor = Tensor(data, dtype, scales, minima[0] if minima else None, width=100)
    wide, rows = to_torch(tensor, torch.float64), to_torch(tensor, torch.float32, [3, 1])
    np.testing.assert_array_equal(wide.numpy(), tensor.numbers(..., np.float64))
    assert rows.dtype == torch.float32
    np.testing.assert_array_equal(rows.numpy(), wide[[3, 1]].float().numpy())
    assert nmse(wide.numpy(), values) < {"int8": 1e-4, "int4": 1e-2}[dtype]
