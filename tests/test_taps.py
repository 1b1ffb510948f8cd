"""The tap table and the recorder that holds the engine to it."""

from __future__ import annotations

import numpy as np
import pytest

from npllama import ops, record
from npllama.engine import Model
from npllama.errors import TapError
from npllama.kernels import UNMATERIALISED
from npllama.taps import TAPS, Recorder, at_layer, spec_of, tap_names, untapped
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens

CONFIG = loud_config()


def test_the_numpy_engine_emits_every_tap_of_the_table_in_its_order() -> None:
    model = loud_model(CONFIG)
    with record(model) as rec:
        model.forward(loud_tokens(CONFIG, 9))
    assert list(rec) == tap_names(CONFIG)


def test_the_fast_engine_emits_all_taps_but_those_it_declares_unmaterialised() -> None:
    model = loud_model(CONFIG, backend="fast")
    for n_new in (1, 2, 9):
        with record(model) as rec:
            model.forward(loud_tokens(CONFIG, n_new))
        missing = {f"layers.{i}.{name}" for i in range(CONFIG.n_layers) for name in UNMATERIALISED}
        assert list(rec) == [name for name in tap_names(CONFIG) if name not in missing]


def test_every_formula_names_weights_or_taps_that_exist() -> None:
    assert {spec.name for spec in TAPS} >= {"tok_embeddings", "layers.{i}.q_rope", "logits"}
    assert all(spec.formula and spec.axes for spec in TAPS)


def test_a_pattern_keeps_only_what_it_matches() -> None:
    model = loud_model(CONFIG)
    with record(model, "layers.1.*_rope") as rec:
        model.forward(loud_tokens(CONFIG, 4))
    assert list(rec) == ["layers.1.q_rope", "layers.1.k_rope"]
    assert rec["layers.1.q_rope"].shape == (4, CONFIG.n_heads, CONFIG.head_dim)
    with pytest.raises(TapError, match="norm was not recorded"):
        rec["norm"]


def test_steps_hold_one_dict_for_each_call_and_copies_not_views() -> None:
    from npllama.cache import KVCache

    model, cache = loud_model(CONFIG), KVCache(CONFIG, 8)
    with record(model, "*.k") as rec:
        model.forward([1, 2, 3], cache)
        first = rec["layers.0.k"].copy()
        model.forward([4], cache)
    assert [kept["layers.0.k"].shape[0] for kept in rec.steps] == [3, 1]
    np.testing.assert_array_equal(rec.steps[0]["layers.0.k"], first)
    assert model.recorder is None


def test_watching_stops_when_the_forward_pass_fails() -> None:
    model = loud_model(CONFIG)
    with pytest.raises(Exception, match="outside the vocabulary"), record(model):
        model.forward([10**6])
    assert model.recorder is None


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(TapError, match=r"'layers\.2\.\*' matches no tap of a model with 2 layers"):
        Recorder(CONFIG, "layers.2.*")


def test_an_unknown_tap_is_refused() -> None:
    for name in ("layers.0.query", "logit", "layers.x.q"):
        with pytest.raises(TapError, match="no tap is called"):
            spec_of(name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[:, :-1], r"layers\.0\.attention_norm has shape \(3, 63\), expected \(3, 64\) \(T D\)"),
        (lambda x: x.astype(np.float64), r"attention_norm is float64, expected float32"),
    ],
)
def test_a_tensor_that_breaks_the_table_is_an_error_wanted_or_not(wrong, message: str) -> None:
    tap = Recorder(CONFIG, "logits").step(3, 3, np.dtype(np.float32))
    with pytest.raises(TapError, match=message):
        tap("layers.0.attention_norm", wrong(np.zeros((3, 64), np.float32)))


def test_an_unwatched_layer_costs_no_name_building() -> None:
    assert at_layer(untapped, 3) is untapped


def test_no_silent_float64_in_the_float32_engine() -> None:
    model: Model = loud_model(CONFIG)
    with record(model) as rec:
        logits = model.forward(loud_tokens(CONFIG, 5))
    assert logits.dtype == np.float32
    assert {rec[name].dtype for name in rec} == {np.dtype(np.float32)}
    assert ops.embed.__doc__
