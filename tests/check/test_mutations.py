"""Every mistake of the dictionary, planted in the engine: seen at the right tap, and named."""

from __future__ import annotations

import pytest

from npllama.check.compare import compare
from npllama.check.diagnose import diagnose
from npllama.check.mistakes import Mistake, Way
from tests.check.cases import WAYS, candidate, config_for, label, right_run, traces, truth_model, visible
from tests.check.planted import PLANTED

#: What 16 bits drown: bfloat16 weights of ordinary size fit into float16, a softmax in 16 bits is what such a run does
#: anyway, and an epsilon moves the norms by less than their rounding does.
BELOW_BFLOAT16 = {
    ("weights-narrowed", "float16"),
    ("softmax-in-low-precision", "bfloat16"),
    ("softmax-in-low-precision", "float16"),
    ("norm-eps", "1e-05"),
    ("norm-eps", "1e-06"),
    ("norm-eps", "1e-08"),
    ("norm-eps", "0"),
}


def every_way_but(*absent: tuple[str, str]) -> pytest.MarkDecorator:
    """Run a test for each way of each mistake."""
    ways = [(mistake, way) for mistake, way in WAYS if (mistake.name, way.label) not in absent]
    assert len(ways) == len(WAYS) - len(absent)
    return pytest.mark.parametrize(("mistake", "way"), ways, ids=label)


def test_every_way_of_every_mistake_is_planted_in_the_engine_too() -> None:
    assert set(PLANTED) == {(mistake.name, way.label) for mistake, way in WAYS}
    for _, way in WAYS:
        assert way.plant(right_run(config_for(way, "float32"), "float32")) is not None


@every_way_but()
def test_float32_sees_it_at_the_right_tap_and_names_it(mistake: Mistake, way: Way) -> None:
    config = config_for(way, "float32")
    wrong = candidate([(mistake.name, way.label)], config)
    truth, reference = traces(config, "float32")
    report = compare(wrong, reference, truth)
    assert (report.verdict, report.first_divergence, report.step) == ("differs", *visible(way, wrong))
    found = diagnose(truth_model(config, "float32"), wrong)
    assert (found.verdict, found.name, found.way) == ("named", mistake.name, way.label)
    assert found.margin is not None
    assert found.margin > 10


# Weights that are stored in bfloat16 lose nothing in bfloat16, and fit into float16.
@every_way_but(("weights-narrowed", "bfloat16"), ("weights-narrowed", "float16"))
def test_the_compiled_engine_on_bfloat16_weights_is_found_out_as_well(mistake: Mistake, way: Way) -> None:
    config = config_for(way, "bfloat16")
    wrong = candidate([(mistake.name, way.label)], config, backend="fast", dtype="bfloat16")
    truth, reference = traces(config, "bfloat16")
    report = compare(wrong, reference, truth)
    assert (report.verdict, report.first_divergence, report.step) == ("differs", *visible(way, wrong))
    found = diagnose(truth_model(config, "bfloat16"), wrong)
    assert (found.verdict, found.name, found.way) == ("named", mistake.name, way.label)


@every_way_but(("weights-narrowed", "bfloat16"))
def test_a_run_that_rounds_to_bfloat16_shows_all_but_what_its_rounding_hides(mistake: Mistake, way: Way) -> None:
    config = config_for(way, "bfloat16")
    wrong = candidate([(mistake.name, way.label)], config, dtype="bfloat16", rounds_to="bfloat16")
    found = diagnose(truth_model(config, "bfloat16"), wrong)
    if (mistake.name, way.label) in BELOW_BFLOAT16:
        assert found.name is None
        assert found.ranking[0].ratio < 10
        return
    assert (found.verdict, found.name) == ("named", mistake.name)
    truth, reference = traces(config, "bfloat16", "bfloat16")
    assert compare(wrong, reference, truth).verdict != "match"
