"""The oracle against the engine's float64 truth, and what it promises by itself."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace
from npllama.config import ModelConfig
from npllama.errors import ContextOverflowError, ParameterError, UnsupportedError
from npllama.taps import Recorder, tap_names
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import LOUD_TOKENS, loud_config, loud_tokens
from tests.oracle.sources import SHAPES, Loud, nmse, nmse_by_tap, recorded

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from oracle.llama import TorchLlama, turns  # noqa: E402
from oracle.run import numbers, record  # noqa: E402

DECODED = 3


def some_tokens(config: ModelConfig) -> list[int]:
    return loud_tokens(config, LOUD_TOKENS + DECODED).tolist()


def truth_of(config: ModelConfig) -> MemoryTrace:
    return run_trace(loud_model(config, backend="float64"), some_tokens(config), prefill=LOUD_TOKENS)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_in_float64_every_tap_of_prefill_and_decode_is_the_truth(config: ModelConfig) -> None:
    truth = truth_of(config)
    oracle = TorchLlama(Loud(config), "float64")
    found = MemoryTrace(tokens=truth.tokens, prefill=truth.prefill, dtype="float64", config=config)
    differences = []

    def run(step: int, tokens: list[int]) -> None:
        def tap(name: str, x: Any) -> Any:
            found.add(step, name, numbers(x))
            if not name.endswith("_rope"):
                return x
            # torch's cosines and sines differ from NumPy's in the last bit of a float32, which is all that may differ
            # here; from then on both go on with the truth's.
            wanted = truth.read(name, step)
            differences.append(nmse(numbers(x), wanted))
            return torch.from_numpy(wanted)

        oracle.forward(tokens, tap)

    run(0, truth.tokens[: truth.prefill])
    for step in range(1, DECODED + 1):
        run(step, [truth.tokens[truth.prefill + step - 1]])
    errors = nmse_by_tap(found, truth)
    assert set(found.taps) == set(truth.taps)
    assert max(differences) < 3e-14
    assert {name: error for name, error in errors.items() if error > 1e-28 and not name.endswith("_rope")} == {}


def test_turns_are_float32_cosines_and_sines_of_float32_angles() -> None:
    freqs = torch.tensor([1.0, 0.1, 1e-4])
    found = turns(freqs, 100_000, 4).numpy()
    angles = np.outer(np.arange(100_000, 100_004, dtype=np.float32), freqs.numpy())
    assert found.dtype == np.complex64
    np.testing.assert_allclose(found.real, np.cos(angles.astype(np.float64)), atol=1.2e-7, rtol=0)
    np.testing.assert_allclose(found.imag, np.sin(angles.astype(np.float64)), atol=1.2e-7, rtol=0)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_in_float32_every_tap_lies_at_float32_noise_from_the_truth(config: ModelConfig) -> None:
    truth = truth_of(config)
    errors = nmse_by_tap(recorded(TorchLlama(Loud(config)), truth.tokens, LOUD_TOKENS), truth)
    assert set(errors) == {name.rpartition(".")[2] for name in tap_names(config.n_layers)}
    assert max(errors.values()) < 1e-10


@pytest.mark.parametrize("chunk", [1, 7, 63])
def test_a_prefill_in_chunks_computes_what_one_piece_does(chunk: int) -> None:
    config = loud_config()
    tokens = some_tokens(config)
    whole = TorchLlama(Loud(config), "float64").forward(tokens)
    pieces = TorchLlama(Loud(config), "float64")
    logits = torch.cat([pieces.forward(tokens[start : start + chunk]) for start in range(0, len(tokens), chunk)])
    assert pieces.length == len(tokens)
    assert nmse(numbers(logits), numbers(whole)) < 1e-26


@pytest.mark.parametrize(("dtype", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_taps_have_the_order_shapes_and_dtype_of_the_table(dtype: str, held: str) -> None:
    config = loud_config()
    oracle, recorder, names = TorchLlama(Loud(config), dtype), Recorder(config.axes, config.n_layers), []
    for count in (5, 1):
        check = recorder.step(count, oracle.length + count, np.dtype(held))

        def tap(name: str, x: Any, check: Any = check) -> Any:
            names.append(name)
            check(name, numbers(x))
            return x

        oracle.forward(list(range(count)), tap)
    order = tap_names(config.n_layers)
    assert sorted(names[: len(order)]) == sorted(order)
    assert names[: len(order)] == names[len(order) :]


def test_taps_of_a_bfloat16_run_are_exact_widenings() -> None:
    config = loud_config()
    trace = recorded(TorchLlama(Loud(config, "bfloat16"), "bfloat16"), some_tokens(config), LOUD_TOKENS)
    lower_halves = {
        entry.name
        for entry in trace.taps
        if (trace.read(entry.name, entry.step).ravel().view(np.uint32) & 0xFFFF).any()
    }
    assert lower_halves == set()


def test_one_layer_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from oracle import llama

    config, alive, read = loud_config(n_layers=6), [], llama.read_layer
    tensors: list[weakref.ref[Any]] = []

    def watched(*arguments: Any) -> Any:
        alive.append(sum(tensor() is not None for tensor in tensors))
        layer = read(*arguments)
        tensors.extend(weakref.ref(getattr(layer, name)) for name in type(layer).__slots__)
        return layer

    monkeypatch.setattr(llama, "read_layer", watched)
    TorchLlama(Loud(config)).forward([1, 2, 3])
    assert alive == [0] * config.n_layers


def test_greedy_decoding_extends_the_trace_by_the_most_probable_tokens() -> None:
    config = loud_config()
    tokens = some_tokens(config)[:8]
    trace = MemoryTrace(tokens=tokens, prefill=8, config=config)
    record(TorchLlama(Loud(config)), tokens, trace, greedy=DECODED)
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
    oracle = TorchLlama(Loud(loud_config()))
    with pytest.raises(kind, match=message):
        record(oracle, tokens, MemoryTrace(tokens=[1], prefill=1), **settings)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ParameterError, match="the dtype is 'float16', expected one of float32, bfloat16, float64"):
        TorchLlama(Loud(loud_config()), "float16")


def test_weights_of_a_storage_that_torch_cannot_read_are_refused() -> None:
    from npllama.dtypes import Tensor
    from oracle.weights import to_torch

    with pytest.raises(UnsupportedError, match="does not read weights stored as int8"):
        to_torch(Tensor(np.zeros(4, np.int8), "int8"), torch.float32)
