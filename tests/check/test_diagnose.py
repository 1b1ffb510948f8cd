"""The diagnosis: what it names, what it does not, and what it says of candidates that it cannot tell apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npllama
from npllama import ops
from npllama.check.compare import compare
from npllama.check.diagnose import CLEAR, Diagnosis, diagnose
from npllama.check.mistakes import DICTIONARY
from npllama.check.rerun import Rerun
from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace, TraceLike
from npllama.checkpoint.store import Store
from npllama.config import ModelConfig, RopeScaling
from npllama.dtypes import Array, Tensor
from npllama.errors import ParameterError, TapError
from npllama.taps import Tap, spec_of
from tests.check.cases import (
    CONFIGS,
    DECODED,
    WAYS,
    candidate,
    record,
    right_run,
    tokens_of,
    traces,
    truth_model,
)
from tests.check.planted import PLANTED
from tests.check.wrong_engine import Build, build, frequencies
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import LOUD_TOKENS, loud_config, loud_tensors

CONFIG = CONFIGS[0]
SKIPPED = "slot behind the prompt skipped"


def diagnosed(wrong: TraceLike, dtype: str = "float32", seed: int = 0, **options: Any) -> Diagnosis:
    return diagnose(truth_model(CONFIG, dtype, seed), wrong, **options)


def with_taps(trace: TraceLike, keep: Callable[[str], bool], **header: Any) -> MemoryTrace:
    """Copy a trace with fewer taps, and perhaps another header."""
    described = {"tokens": trace.tokens, "prefill": trace.prefill, "dtype": trace.dtype, "config": CONFIG, **header}
    copy = MemoryTrace(**described)
    for entry in trace.taps:
        if keep(entry.name):
            copy.add(entry.step, entry.name, trace.read(entry.name, entry.step))
    return copy


# --- the dictionary -------------------------------------------------------------------------------------------------


def test_every_entry_says_what_it_is_how_it_shows_and_how_to_mend_it() -> None:
    names = [mistake.name for mistake in DICTIONARY]
    assert len(names) == len(set(names)) >= 60
    for mistake in DICTIONARY:
        for sentence in (mistake.what, mistake.shows, mistake.fix):
            assert sentence.endswith(".")
            assert len(sentence.split()) > 3
        labels = [way.label for way in mistake.ways]
        assert len(set(labels)) == len(labels)
        assert ("" in labels) == (len(labels) == 1)
        for way in mistake.ways:
            assert spec_of(way.first)


def test_what_is_no_mistake_in_a_model_is_not_planted() -> None:
    config = loud_config(n_kv_heads=1, tied=True, rope_theta=10_000.0, norm_eps=1e-6, max_seq_len=16)
    prompt = Rerun.of(truth_model(config, "float32"), tuple(range(16)), 16)
    absent = {(mistake.name, way.label) for mistake, way in WAYS if way.plant(prompt) is None}
    assert absent >= {
        ("rope-theta", "10000"),
        ("rope-scaling-missing", ""),
        ("norm-eps", "1e-06"),
        ("kv-heads-tiled", ""),
        ("wrong-output-matrix", "the embedding"),
        ("keys-cached-before-rope", ""),
        ("positions-at-decode", "one ahead"),
        ("bos-doubled", ""),
        ("wrong-layer-order", "sorted by name"),
        ("weight-transposed", "wk"),
    }
    others = {name for name, _ in absent} - {mistake.name for mistake, way in WAYS if way.plant(prompt) is not None}
    assert others >= {
        "bias-missing",
        "bias-row-order",
        "experts-active",
        "learned-positions-missing",
        "longrope-switch",
        "norm-keeps-mean",
        "qk-norm-missing",
        "qk-norm-after-rope",
        "router-in-low-precision",
        "shared-expert-missing",
        "window-missing",
    }
    assert not absent & {("rope-theta", "500000"), ("norm-eps", "1e-05"), ("bos-missing", ""), ("mask-missing", "")}


# --- nothing to name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clean_engines_are_never_diagnosed(backend: str, dtype: str) -> None:
    for seed in range(8):
        clean = record(build(CONFIG, backend=backend, dtype=dtype, seed=seed).model(), CONFIG, seed=seed)
        found = diagnosed(clean, dtype, seed)
        assert (found.verdict, found.name, found.margin) == ("no match", None, None)
        assert found.sentence == "Every operation of the candidate is the model's, up to rounding."


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_a_clean_run_that_rounds_to_bfloat16_is_not_diagnosed(backend: str) -> None:
    for seed in range(4):
        engine = build(CONFIG, backend=backend, dtype="bfloat16", seed=seed).model()
        assert diagnosed(record(engine, CONFIG, "bfloat16", seed), "bfloat16", seed).name is None


def clipped_gate(gate: Array, up: Array, activation: str) -> Array:
    return ops.glu(np.clip(gate, -1, 1), up, activation)


def distance_bias(q: Array, keys: Array, values: Array, tap: Tap, **how: Any) -> Array:
    def biased(name: str, x: Array) -> Array:
        distance = np.arange(x.shape[2]) - np.arange(x.shape[2] - x.shape[1], x.shape[2])[:, None]
        return tap(name, x + np.float32(0.1) * distance.astype(x.dtype) if name == "scores" else x)

    return ops.attention(q, keys, values, biased, **how)


def inflated_norm(x: Array, weight: Tensor, eps: float) -> Array:
    return ops.rms_norm(x, weight, eps) * np.float32(1.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "function", "first"),
    [
        ("glu", clipped_gate, "layers.0.ffn_act"),
        ("attention", distance_bias, "layers.0.scores"),
        ("rms_norm", inflated_norm, "layers.0.attention_norm"),
    ],
)
def test_a_mistake_that_is_not_in_the_dictionary_has_no_name(
    name: str, function: Callable[..., Array], first: str, dtype: str
) -> None:
    engine = build(CONFIG, dtype=dtype).with_ops(**{name: function}).model()
    found = diagnosed(record(engine, CONFIG, dtype), dtype)
    assert (found.verdict, found.name, found.mistake) == ("no match", None, None)
    assert next(guess for guess in found.ranking if guess.mistake is None).until == (first, 0)


# --- two mistakes at once -------------------------------------------------------------------------------------------

TWO = [
    (("rope-theta", "10000"), ("norm-eps", "1e-06")),
    (("kv-heads-tiled", ""), ("w1-w3-swapped", "")),
    (("residual-missing", "feed-forward"), ("cache-hole", "newest slot read before it is written")),
    (("positions-at-decode", "one ahead"), ("norm-weight-ignored", "ffn_norm")),
    (("bos-doubled", ""), ("mask-missing", "")),
    (("weights-narrowed", "float16"), ("wrong-activation", "GELU, exact")),
    (("rope-row-order", "left in halves"), ("final-norm-missing", "")),
    (("softmax-in-low-precision", "bfloat16"), ("wrong-output-matrix", "the embedding")),
]


@pytest.mark.parametrize("pair", TWO, ids=lambda pair: " and ".join(name for name, _ in pair))
def test_two_mistakes_at_once_are_not_taken_for_one(pair: tuple[tuple[str, str], ...]) -> None:
    wrong = candidate(pair, CONFIG)
    firsts = [(way.step, way.first) for mistake, way in WAYS if (mistake.name, way.label) in pair]
    order = [(entry.step, entry.name) for entry in wrong.taps]
    report = compare(wrong, traces(CONFIG, "float32")[1], traces(CONFIG, "float32")[0])
    assert (report.step, report.first_divergence) == min(firsts, key=order.index)
    found = diagnosed(wrong)
    assert (found.verdict, found.name) == ("no match", None)


def test_of_two_mistakes_the_first_is_hinted_at_where_it_stands_alone_for_a_while() -> None:
    found = diagnosed(candidate([("rope-theta", "10000"), ("w1-w3-swapped", "")], CONFIG))
    assert found.name is None
    assert "agrees with rope-theta (10000) up to layers.0.gate of step 0" in found.sentence


def test_random_pairs_never_get_a_third_name() -> None:
    clean = right_run(CONFIG, "bfloat16")
    possible = [(mistake.name, way.label) for mistake, way in WAYS if way.plant(clean) is not None]
    rng = np.random.default_rng(0)
    for _ in range(8):
        first, second = (possible[i] for i in rng.choice(len(possible), 2, replace=False))
        for rounds_to in ("float32", "bfloat16"):
            found = diagnosed(candidate([first, second], CONFIG, dtype="bfloat16", rounds_to=rounds_to), "bfloat16")
            assert found.name in (None, first[0], second[0])


# --- little to go by ------------------------------------------------------------------------------------------------


def test_the_logits_alone_can_be_enough() -> None:
    found = diagnosed(with_taps(candidate([("norm-eps", "1e-06")], CONFIG), "logits".__eq__))
    assert (found.verdict, found.name) == ("named", "norm-eps")


def test_mistakes_that_give_the_same_logits_are_both_named_and_neither_is_the_diagnosis() -> None:
    found = diagnosed(with_taps(candidate([("silu-of-up", "")], CONFIG), "logits".__eq__))
    assert (found.verdict, found.name) == ("too noisy to say", None)
    assert "silu-of-up" in found.sentence
    assert "w1-w3-swapped" in found.sentence
    assert found.margin is not None
    assert found.margin < CLEAR


def test_absolute_positions_show_in_rotated_queries_and_keys_only() -> None:
    wrong = candidate([("positions-off-by-one", "one ahead")], CONFIG)
    assert diagnosed(wrong).name == "positions-off-by-one"
    blind = with_taps(wrong, lambda name: not name.endswith("_rope"))
    assert diagnosed(blind).sentence.startswith("Every operation")


def test_a_prefill_without_decode_steps_cannot_show_a_mistake_of_the_cache() -> None:
    config, tokens = CONFIG, tokens_of(CONFIG)[:LOUD_TOKENS]
    trace = MemoryTrace(tokens=tokens, prefill=LOUD_TOKENS, config=config)
    wrong = run_trace(build(config).model(), tokens, prefill=LOUD_TOKENS, into=trace)
    assert diagnosed(wrong).name is None


# --- strangers ------------------------------------------------------------------------------------------------------


def foreign(trace: TraceLike) -> MemoryTrace:
    """Say that somebody else wrote it."""
    return with_taps(trace, lambda name: True, producer="somebody", config=None)


def nudged(b: Build) -> Array:
    """Frequencies as another library might compute them: one unit in the last place off."""
    own = frequencies(b.config)
    return np.nextafter(own, np.where(np.arange(len(own)) % 2, np.inf, -np.inf).astype(np.float32))


@pytest.mark.parametrize(
    "mistake", [None, ("norm-eps", "1e-06"), ("kv-heads-tiled", ""), ("positions-at-decode", "one ahead")]
)
def test_tables_that_were_computed_elsewhere_are_no_mistake_and_hide_none(mistake: tuple[str, str] | None) -> None:
    parts = build(CONFIG)
    parts = replace(parts if mistake is None else PLANTED[mistake](parts), freqs=nudged(parts))
    found = diagnosed(foreign(record(parts.model(), CONFIG)))
    assert found.name == (mistake and mistake[0])


def test_the_names_and_layouts_of_other_frameworks_are_understood() -> None:
    wrong = candidate([("w1-w3-swapped", "")], CONFIG)
    renamed = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "self_attn.q_proj": "q", "mlp": "ffn_out"}
    trace = MemoryTrace(tokens=wrong.tokens, prefill=LOUD_TOKENS, producer="somebody")
    for step in range(DECODED + 1):
        for module, tap in renamed.items():
            x = wrong.read(f"layers.0.{tap}", step)
            trace.add(step, f"model.layers.0.{module}", x.reshape(1, len(x), -1))  # a batch of one, flat heads
    found = diagnosed(trace)
    assert (found.verdict, found.name) == ("named", "w1-w3-swapped")


def test_a_missing_bos_is_named_from_a_run_that_says_so_itself() -> None:
    wrong = candidate([("bos-missing", "")], CONFIG)
    tokens = tokens_of(CONFIG)
    honest = with_taps(wrong, lambda name: True, tokens=tokens[1:], prefill=LOUD_TOKENS - 1)
    found = diagnosed(honest, reference=traces(CONFIG, "float32")[1])
    assert (found.verdict, found.name) == ("named", "bos-missing")
    assert diagnosed(honest).name is None  # for itself it is a sound run of fewer tokens


# --- the call itself ------------------------------------------------------------------------------------------------


def test_a_named_mistake_comes_with_its_sentences_its_margin_and_the_others() -> None:
    calls: list[tuple[str, int, int]] = []
    wrong = candidate([("scores-not-scaled", "")], CONFIG)
    found = diagnosed(wrong, progress=lambda *call: calls.append(call))
    assert found.mistake is not None
    for sentence in (found.mistake.what, found.mistake.shows, found.mistake.fix):
        assert sentence in found.sentence
    assert found.ranking[0].label == "scores-not-scaled"
    assert found.ranking[0].ratio < 100 < found.ranking[1].ratio
    assert found.margin is not None
    assert found.margin > 1e6
    assert {guess.name for guess in found.ranking} > {"none", "rope-theta", "mask-missing"}
    assert calls[0][1:] == (0, len(WAYS))
    assert calls[-1][1:] == (len(WAYS), len(WAYS))


def test_the_dictionary_may_be_another_one() -> None:
    wrong = candidate([("scores-not-scaled", "")], CONFIG)
    others = [mistake for mistake in DICTIONARY if mistake.name != "scores-not-scaled"]
    assert diagnosed(wrong, dictionary=others).verdict == "no match"


def test_a_float64_candidate_is_held_to_float64() -> None:
    config, tokens = loud_config(norm_eps=1.0001e-5), tokens_of(CONFIG)
    tensors = loud_tensors(CONFIG)
    wrong = run_trace(loud_model(config, backend="float64", tensors=tensors), tokens, prefill=LOUD_TOKENS)
    right = run_trace(loud_model(loud_config(), backend="float64"), tokens, prefill=LOUD_TOKENS)
    model = truth_model(loud_config(), "float32")
    assert diagnose(model, right).sentence.startswith("Every operation")
    assert diagnose(model, wrong).sentence.startswith("No known mistake")


@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_only_a_float64_model_can_be_the_truth(backend: str) -> None:
    with pytest.raises(ParameterError, match=rf"{backend} backend, expected float64.*backend=\"float64\""):
        diagnose(loud_model(CONFIG, backend=backend), candidate([], CONFIG))


def test_tokens_of_another_vocabulary_are_refused() -> None:
    model = truth_model(loud_config(vocab_size=64), "float32")
    with pytest.raises(ParameterError, match="outside the model's vocabulary of 64"):
        diagnose(model, candidate([], CONFIG))


def test_a_trace_without_a_single_known_tap_is_refused() -> None:
    trace = MemoryTrace(tokens=[1, 2], prefill=2)
    trace.add(0, "my.tensor", np.zeros((2, 64), np.float32))
    with pytest.raises(TapError, match=r"no tensor that the model has.*npllama\.taps\.TAPS"):
        diagnosed(trace)


# --- trained weights ------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_mistakes_in_an_engine_with_trained_weights_are_named(smollm2_gguf: Path, tmp_path: Path) -> None:
    folder = npllama.convert(smollm2_gguf, tmp_path / "store", layers=2)
    store, model = Store.open(folder), npllama.load(folder, backend="float64")
    tensors = {name: store.tensor(name).numbers() for name in store.entries if not name.startswith("rope")}
    right = Build(store.config, tensors, "fast", "bfloat16", freqs=store.frequencies()[0])
    assert diagnose(model, record(right.model(), store.config)).sentence.startswith("Every operation")
    for mistake in [("kv-heads-tiled", ""), ("cache-hole", SKIPPED)]:
        found = diagnose(model, record(PLANTED[mistake](right).model(), store.config))
        assert (found.verdict, found.name) == ("named", mistake[0])


# --- which mistakes a fixture can see -------------------------------------------------------------------------------

#: What the usual recipe of a parity test cannot see in the logits: N(0, 0.02), norm weights of one, as many key/value
#: heads as heads, eight tokens, and the tolerances of float32 in torch.testing.
BLIND = {
    "rope-scaling-missing",
    "rope-scaling-factor",
    "norm-weight-ignored",
    "norm-weights-swapped",
    "kv-heads-tiled",
    "positions-off-by-one",
}


def seen_in_logits(config: ModelConfig, tensors: Mapping[str, Array], prompt: int) -> set[str]:
    """Return the mistakes of which some way moves the logits of a prompt and three steps beyond float32's tolerance."""
    model = loud_model(config, backend="float64", tensors=tensors)
    clean = Rerun.of(model, tokens_of(config)[: prompt + 3], prompt)
    right = logits_of(clean)
    seen = set()
    for mistake, way in WAYS:
        run = way.plant(clean)
        if run is None:
            continue
        wrong = logits_of(run)
        same = all(
            x.shape == y.shape and np.allclose(x, y, rtol=1.3e-6, atol=1e-5) for x, y in zip(wrong, right, strict=True)
        )
        seen |= set() if same else {mistake.name}
    return seen


def logits_of(run: Rerun) -> list[Array]:
    kept = []

    def watch(step: int, name: str, x: Array) -> Array:
        if name == "logits":
            kept.append(x)
        return x

    with np.errstate(all="ignore"):
        run.play(np.dtype(np.float64), watch)
    return kept


def test_the_usual_fixture_is_blind_to_mistakes_that_a_loud_one_shows() -> None:
    llamas = [right_run(model, "float32") for model in CONFIGS[:3]]
    everything = {mistake.name for mistake, way in WAYS if any(way.plant(run) is not None for run in llamas)}
    assert len(everything) >= 34
    scaling = RopeScaling("llama3", 8.0)
    config = loud_config(dim=32, n_heads=8, n_kv_heads=8, head_dim=4, hidden_dim=86, rope_scaling=scaling)
    rng = np.random.default_rng(0)
    quiet = {
        name: rng.normal(0, 0.02, x.shape).astype(np.float32) if x.ndim == 2 else np.ones_like(x)
        for name, x in loud_tensors(config).items()
    }
    assert everything - seen_in_logits(config, quiet, prompt=5) == BLIND
    config = loud_config(rope_scaling=scaling)
    seen = seen_in_logits(config, loud_tensors(config), prompt=LOUD_TOKENS)
    assert everything - seen == {"positions-off-by-one"}  # only q_rope and k_rope show it
