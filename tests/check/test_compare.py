"""The comparison: what is settled before any arithmetic, what the noise floor allows, and what it must not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from npllama import ops
from npllama.check.compare import compare
from npllama.check.noise import is_foreign, limits
from npllama.check.rerun import Rerun
from npllama.check.run import run_trace, shadow_run
from npllama.check.trace import MemoryTrace
from npllama.errors import TraceError
from npllama.taps import tap_names
from tests.check.runs import CONFIG, DECODE, PREFILL, TOKENS, bfloat16, changed_trace, edited, engine_trace
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens
from tools.calibrate import play, shuffled_sums

FOREIGN = {"producer": "torch", "model": {}}


@pytest.fixture(scope="module")
def truth() -> MemoryTrace:
    return engine_trace(backend="float64")


@pytest.fixture(scope="module")
def reference() -> MemoryTrace:
    return engine_trace()


@pytest.fixture(scope="module")
def fast() -> MemoryTrace:
    return engine_trace(backend="fast", chunk=23)


# --- agreement ------------------------------------------------------------------------------------------------------


def test_both_backends_match_at_every_tap_and_step(fast: Any, reference: Any, truth: Any) -> None:
    for candidate, other in ((fast, reference), (reference, fast)):
        report = compare(candidate, other, truth)
        assert (report.verdict, report.first_divergence, report.step, report.exit_code) == ("match", None, None, 0)
        assert report.measured
        assert len(report.rows) == len(fast.taps)
        assert all(row.verdict == "match" and row.ratio is not None for row in report.rows)


def test_taps_that_the_candidate_lacks_are_listed_and_the_rest_is_compared(fast: Any, reference: Any) -> None:
    report = compare(fast, reference)
    wanted = {f"layers.{i}.{name}" for i in range(CONFIG.n_layers) for name in ("scores", "probs")}
    assert {label.partition("@")[0] for label in report.missing} == wanted
    assert len(report.missing) == len(wanted) * (1 + DECODE)
    assert compare(reference, fast).extra == report.missing
    assert "231 of 259" not in report.reason
    assert f"{len(report.rows)} of {len(report.rows) + len(report.missing)}" in report.reason


def test_rows_come_in_the_order_of_the_forward_pass_step_by_step(reference: Any, truth: Any) -> None:
    rows = compare(reference, truth).rows
    names = tap_names(CONFIG)
    assert [(row.step, row.name) for row in rows] == [(step, name) for step in range(1 + DECODE) for name in names]


def test_a_trace_matches_itself_exactly(reference: Any) -> None:
    report = compare(reference, reference)
    assert report.verdict == "match"
    assert all((row.ratio, row.max_abs, row.relative_error) == (0, 0, 0) for row in report.rows)
    assert all(row.cosine == pytest.approx(1) for row in report.rows)
    assert report.logits is not None
    assert (report.logits.same_top1, report.logits.kl_max) == (len(TOKENS), 0)


def test_a_bfloat16_run_matches_and_its_reference_need_not_be_one(truth: Any, reference: Any) -> None:
    rounded = changed_trace(bfloat16, dtype="bfloat16")
    other = changed_trace(bfloat16, dtype="bfloat16", backend="fast")
    for report in (compare(rounded, reference, truth), compare(other, rounded, truth)):
        assert report.verdict == "match"
    assert compare(rounded, reference).verdict in ("match", "cannot tell")


def test_a_run_that_decoded_less_is_compared_as_far_as_it_went(reference: Any, truth: Any) -> None:
    short = run_trace(loud_model(CONFIG), TOKENS[: PREFILL + 1], prefill=PREFILL)
    report = compare(short, reference, truth)
    assert report.verdict == "match"
    assert {row.step for row in report.rows} == {0, 1}
    assert "logits@3" in report.missing


# --- before any arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "prefill"),
    [
        ([TOKENS[0] ^ 1, *TOKENS[1:]], PREFILL),
        ([0, *TOKENS], PREFILL + 1),
        (TOKENS[1:], PREFILL - 1),
        ([*TOKENS[:-1], TOKENS[-1] ^ 1], PREFILL),
        (TOKENS[: PREFILL - 1], PREFILL - 1),
    ],
    ids=["first", "bos added", "bos missing", "last", "shorter prompt"],
)
def test_other_tokens_are_a_difference_and_nothing_is_computed(reference: Any, tokens: Any, prefill: int) -> None:
    report = compare(MemoryTrace(tokens=tokens, prefill=prefill), reference)
    assert (report.verdict, report.first_divergence, report.step, report.rows) == ("differs", "tokens", 0, ())
    assert "other tokens" in report.reason


def test_the_same_tokens_in_other_steps_cannot_be_told(reference: Any) -> None:
    report = compare(run_trace(loud_model(CONFIG), TOKENS, prefill=PREFILL - 2), reference)
    assert (report.verdict, report.first_divergence, report.exit_code) == ("cannot tell", None, 7)
    assert "prefill has 62 tokens, the reference's 64" in report.reason


def not_a_number(x: Any) -> Any:
    x.flat[0] = np.nan
    return x


def infinite(x: Any) -> Any:
    x[-1, -1] = np.inf
    return x


def unmasked(x: Any) -> Any:
    x[0, 0, 1] = 0
    return x


FINDINGS = {
    "another shape": (("layers.1.up", 0), lambda x: x[:, :-1], "shape (64, 191), the reference has (64, 192)"),
    "one row only": (("logits", 0), lambda x: x[-1:], "shape (1, 256), the reference has (64, 256)"),
    "another dtype": (("layers.0.gate", 1), lambda x: x.astype(np.float64), "saved as float64 by a run that says"),
    "NaN": (("layers.1.v", 2), not_a_number, "1 of 32 numbers are NaN"),
    "infinity": (("norm", 0), infinite, "1 of 4096 numbers are infinite, or masked"),
    "a hole in the mask": (("layers.0.scores", 0), unmasked, "1 of 16384 numbers are infinite, or masked"),
}


@pytest.mark.parametrize(("key", "edit", "message"), FINDINGS.values(), ids=list(FINDINGS))
def test_what_needs_no_arithmetic_is_reported_as_such(
    reference: Any, truth: Any, key: Any, edit: Any, message: str
) -> None:
    for exact in (truth, None):
        report = compare(edited(reference, {key: edit}), reference, exact)
        assert (report.verdict, report.first_divergence, report.step) == ("differs", *key)
        (odd,) = [row for row in report.rows if row.verdict != "match"]
        assert odd.finding.startswith(message.partition(" numbers")[0])
        assert odd.ratio is None
        json.dumps(report.to_json(), allow_nan=False)


def test_a_reference_that_is_not_finite_is_not_blamed_on_the_candidate(reference: Any) -> None:
    report = compare(reference, edited(reference, {("norm", 0): not_a_number}))
    assert report.verdict == "cannot tell"
    assert "the reference has numbers that are not finite" in report.reason


def test_traces_without_a_common_tap_cannot_be_told(reference: Any) -> None:
    candidate = MemoryTrace(tokens=TOKENS, prefill=PREFILL)
    candidate.add(0, "embeddings.of.mine", np.zeros((PREFILL, 4), np.float32))
    report = compare(candidate, reference)
    assert (report.verdict, report.extra) == ("cannot tell", ("embeddings.of.mine",))
    assert "no tap in common" in report.reason


def test_a_truth_of_other_tokens_is_refused(reference: Any) -> None:
    with pytest.raises(TraceError, match="the truth was fed other tokens"):
        compare(reference, reference, MemoryTrace(tokens=[1], prefill=1))


def test_a_truth_of_another_model_is_refused(reference: Any) -> None:
    other = run_trace(loud_model(loud_config(dim=32), backend="float64"), TOKENS, prefill=PREFILL)
    with pytest.raises(TraceError, match=r"tok_embeddings of step 0 has shape \(64, 64\) in the reference"):
        compare(reference, reference, other)


# --- differences ----------------------------------------------------------------------------------------------------

WRONG = {
    "eps": ({"norm_eps": 1e-6}, "layers.0.attention_norm"),
    "theta": ({"rope_theta": 10_000.0}, "layers.0.q_rope"),
}


@pytest.mark.parametrize(("change", "first"), WRONG.values(), ids=list(WRONG))
def test_a_wrong_constant_differs_first_at_its_tap(
    reference: Any, truth: Any, change: dict[str, Any], first: str
) -> None:
    candidate = engine_trace(dataclasses.replace(CONFIG, **change), backend="fast")
    for exact in (truth, None):
        report = compare(candidate, reference, exact)
        assert (report.verdict, report.first_divergence, report.step, report.exit_code) == ("differs", first, 0, 1)
        row = next(row for row in report.rows if row.name == first)
        assert row.ratio is not None
        assert row.ratio > 1e5


def test_once_something_differs_the_first_tensor_above_the_noise_is_where_it_began(reference: Any, truth: Any) -> None:
    slight = {("layers.0.v", 0): lambda x: x * np.float32(1 + 1.25e-6)}
    assert compare(edited(reference, slight), reference, truth).verdict == "cannot tell"
    report = compare(edited(reference, {**slight, ("layers.1.up", 0): lambda x: x * np.float32(1.1)}), reference, truth)
    assert (report.verdict, report.first_divergence, report.step) == ("differs", "layers.0.v", 0)


def test_a_mistake_of_decoding_shows_at_its_step_behind_a_perfect_prefill(reference: Any, truth: Any) -> None:
    def shifted(x: Any) -> Any:
        return x[:, ::-1]

    report = compare(edited(reference, {("layers.1.k_rope", 2): shifted}), reference, truth)
    assert (report.first_divergence, report.step) == ("layers.1.k_rope", 2)
    assert all(row.verdict == "match" for row in report.rows if row.step < 2)


def test_a_mistake_in_one_token_is_not_hidden_by_a_much_larger_one() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(8, 64))
    exact[0] *= 1e4
    traces = []
    for dtype, values in (("float64", exact), ("float32", exact.astype(np.float32)), ("float32", exact * 1)):
        trace = MemoryTrace(tokens=range(8), prefill=8, dtype=dtype)
        trace.add(0, "norm", values.astype(dtype))
        traces.append(trace)
    truth, reference, candidate = traces
    candidate.read("norm")[5] *= 1 + 1e-4
    report = compare(candidate, reference, truth)
    assert (report.verdict, report.rows[0].token) == ("differs", 5)
    assert report.rows[0].nmse_db < -140  # type: ignore[operator]


def test_every_position_shifted_by_one_is_seen_though_no_logit_moves(reference: Any, truth: Any) -> None:
    model = loud_model(CONFIG)
    tables = model._ops.rope_tables
    model._ops = SimpleNamespace(**{**vars(ops), "rope_tables": lambda f, start, n: tables(f, start + 1, n)})
    report = compare(run_trace(model, TOKENS, prefill=PREFILL), reference, truth)
    assert report.first_divergence == "layers.0.q_rope"
    assert {row.name.rpartition(".")[2] for row in report.rows if row.verdict == "differs"} == {"q_rope", "k_rope"}


def test_a_reference_that_shares_the_mistake_does_not_hide_it(truth: Any) -> None:
    wrong = engine_trace(dataclasses.replace(CONFIG, rope_theta=1e4))
    report = compare(wrong, wrong, truth)
    assert (report.verdict, report.first_divergence) == ("differs", "layers.0.q_rope")
    assert any("reference itself departs from the truth" in note for note in report.notes)


def test_the_noise_of_a_coarser_reference_excuses_nothing(truth: Any) -> None:
    coarse = changed_trace(bfloat16, dtype="bfloat16")
    disguised = edited(coarse, dtype="float32")
    report = compare(disguised, coarse, truth)
    assert report.verdict == "differs"
    assert not report.measured


def test_a_lucky_row_of_the_reference_does_not_cry_wolf(truth: Any, fast: Any) -> None:
    lucky = edited(
        engine_trace(),
        {(entry.name, entry.step): None for entry in truth.taps if entry.name != "norm"},
    )
    exact = truth.read("norm").astype(np.float32)
    lucky = edited(lucky, {("norm", 0): lambda x: np.where(np.arange(len(x))[:, None] == 7, exact, x)})
    assert compare(fast, lucky, truth).verdict == "match"


def test_local_errors_tell_the_guilty_operation_from_those_that_inherit(reference: Any, truth: Any) -> None:
    model = loud_model(CONFIG)
    model._ops = SimpleNamespace(**{**vars(ops), "glu": lambda gate, up, activation: gate * up})
    report = compare(run_trace(model, TOKENS, prefill=PREFILL), reference, truth, local=shadow_run(model, reference))
    assert (report.first_divergence, report.step) == ("layers.0.ffn_act", 0)
    assert "by its own doing" in report.reason
    origins = {origin: {row.name.rpartition(".")[2] for row in report.rows if row.origin == origin}
               for origin in ("local", "inherited")}  # fmt: skip
    assert origins["local"] == {"ffn_act"}
    assert {"ffn_out", "resid_post", "logits"} <= origins["inherited"]
    assert all(row.origin is None for row in report.rows if row.verdict == "match")


# --- RoPE tables of other programs ----------------------------------------------------------------------------------


def with_angles_off_by(ulp: float) -> MemoryTrace:
    """Record a run whose frequencies are that many float32 ulp larger."""
    model = loud_model(CONFIG)
    freqs = model.weights.rope_freqs * np.float32(1 + ulp * 2**-23)
    model.weights = dataclasses.replace(model.weights, rope_freqs=freqs.astype(np.float32))
    return run_trace(model, TOKENS, prefill=PREFILL)


def test_two_ulp_of_the_angles_are_allowed_to_strangers_only(reference: Any, truth: Any) -> None:
    off = with_angles_off_by(2)
    assert compare(edited(off, **FOREIGN), reference, truth).verdict == "match"
    own = compare(off, reference, truth)
    assert max(row.ratio or 0 for row in own.rows if row.name == "layers.0.q_rope") > 10 * max(
        row.ratio or 0 for row in compare(edited(off, **FOREIGN), reference, truth).rows
    )


def test_strangers_get_that_allowance_and_no_more(reference: Any, truth: Any) -> None:
    for ulp in (100, 1000):
        report = compare(edited(with_angles_off_by(ulp), **FOREIGN), reference, truth)
        assert report.first_divergence == "layers.0.q_rope"
    wrong = compare(edited(engine_trace(dataclasses.replace(CONFIG, norm_eps=1e-6)), **FOREIGN), reference, truth)
    assert wrong.first_divergence == "layers.0.attention_norm"


def test_who_is_a_stranger(reference: Any) -> None:
    assert not is_foreign(reference)
    assert is_foreign(edited(reference, producer="torch"))
    assert is_foreign(edited(reference, model={"rope_layout": "interleaved"}))


# --- figures --------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_row_are_what_they_say() -> None:
    a = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
    b = np.array([[3.0, 0.0], [0.0, 1.0]], np.float32)
    traces = []
    for x in (a, b):
        trace = MemoryTrace(tokens=[1, 2], prefill=2)
        trace.add(0, "norm", x)
        traces.append(trace)
    (row,) = compare(*traces).rows
    assert row.max_abs == 4
    assert row.relative_error == pytest.approx(4 / np.sqrt(10))
    assert row.nmse_db == pytest.approx(10 * np.log10(16 / 10))
    assert row.cosine == pytest.approx((9 + 1) / np.sqrt(26 * 10))
    assert (row.token, row.shape) == (0, (2, 2))


def test_the_summary_of_the_logits_is_that_of_the_distributions() -> None:
    a = np.log(np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3]], np.float32))
    b = np.log(np.array([[0.5, 0.3, 0.2], [0.45, 0.35, 0.2]], np.float32)) + 7
    traces = []
    for x in (a, b):
        trace = MemoryTrace(tokens=[1, 2], prefill=2)
        trace.add(0, "logits", x)
        traces.append(trace)
    found = compare(*traces).logits
    assert found is not None
    kl = 0.45 * np.log(0.45 / 0.2) + 0.35 * np.log(0.35 / 0.5) + 0.2 * np.log(0.2 / 0.3)
    assert (found.positions, found.same_top1, found.first_flip) == (2, 1, 1)
    assert found.kl_max == pytest.approx(kl, rel=1e-5)
    assert found.kl_mean == pytest.approx(kl / 2, rel=1e-4)
    assert found.flip_margin == pytest.approx(np.log(0.45 / 0.35), rel=1e-4)
    assert found.overlap == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_thresholds_are_ordered_and_judge_at_their_edges(dtype: str) -> None:
    measured, estimated = (limits(dtype, measured=known) for known in (True, False))
    for found in (measured, estimated):
        assert 10 < found.token.match < found.token.differs
        assert 1.7 < found.typical.match < found.typical.differs < found.token.differs
    assert measured.token.differs < estimated.token.differs
    edge = measured.token
    ratios = (0, edge.match, edge.match * 1.01, edge.differs * 1.01, np.inf)
    assert [edge.judge(x) for x in ratios] == ["match", "match", "cannot tell", "differs", "differs"]


def test_the_graver_of_two_answers_counts() -> None:
    found = limits("float32", measured=True)
    fine, odd, bad = 1.0, found.token.match * 2, found.token.differs * 2
    typical = found.typical
    assert found.judge(fine, None) == found.judge(fine, fine) == "match"
    assert found.judge(odd, fine) == found.judge(fine, typical.match * 1.01) == "cannot tell"
    assert found.judge(bad, fine) == found.judge(fine, typical.differs * 2) == found.judge(odd, bad) == "differs"


def test_between_the_thresholds_nobody_can_tell(reference: Any, truth: Any) -> None:
    typical = limits("float32", measured=True).typical
    middle = np.sqrt(typical.match * typical.differs)

    def worse(x: Any) -> Any:
        exact = truth.read("norm")
        return (exact + (x - exact) * np.sqrt(middle)).astype(np.float32)

    report = compare(edited(reference, {("norm", 0): worse}), reference, truth)
    assert (report.verdict, report.first_divergence, report.exit_code) == ("cannot tell", None, 7)
    assert "norm of step 0 is not clearly right" in report.reason


def test_the_json_has_the_promised_keys_and_only_finite_numbers(fast: Any, reference: Any, truth: Any) -> None:
    values = compare(fast, reference, truth).diagnosed("name", "sentence", float("inf")).to_json()
    assert {"verdict", "first_divergence", "step", "diagnosis", "margin", "taps"} <= set(values)
    assert {"name", "step", "shape", "verdict", "ratio", "nmse_db"} <= set(values["taps"][0])
    assert values["taps"][0]["name"] == "tok_embeddings"
    assert (values["diagnosis"], values["margin"]) == ("name", None)
    json.dumps(values, allow_nan=False)


def test_no_alarm_on_a_hundred_clean_models() -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        heads = int(rng.choice([2, 4]))
        config = loud_config(
            dim=32,
            hidden_dim=64,
            head_dim=8,
            vocab_size=64,
            n_layers=int(rng.integers(1, 4)),
            n_heads=heads,
            n_kv_heads=int(rng.choice([1, heads])),
            tied=bool(rng.random() < 0.5),
        )
        tokens = loud_tokens(config, 34, seed).tolist()
        models = {
            backend: loud_model(config, backend=backend, seed=seed, dtype=("float32", "bfloat16")[seed % 2])
            for backend in ("float64", "numpy", "fast")
        }
        truth, plain = (run_trace(models[backend], tokens, prefill=32) for backend in ("float64", "numpy"))
        with threads(1 + seed // 2 % 2):
            fast = run_trace(models["fast"], tokens, prefill=32, chunk=int(rng.integers(1, 33)))
        shuffled = play(Rerun.of(models["numpy"], tuple(tokens), 32).with_ops(**shuffled_sums(seed)), "float32")
        for what, *traces in (
            ("fast", fast, plain, truth),
            ("shuffled sums", shuffled, plain, truth),
            ("fast without truth", fast, plain, None),
        ):
            report = compare(*traces)
            assert report.verdict == "match", f"seed {seed}, {what}: {report.reason}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give Numba that many threads, where there are so many."""
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(before)
