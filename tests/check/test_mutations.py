"""Every mistake of the dictionary, planted in the engine: seen at the right tap, and named."""

from __future__ import annotations

import pytest

from npllama.check.compare import compare
from npllama.check.diagnose import diagnose
from npllama.check.mistakes import Mistake, Way
from npllama.check.run import shadow_run
from tests.check.cases import WAYS, candidate, config_for, label, right_run, traces, truth_model, visible, wrong_model
from tests.check.family_models import MODELS
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
    ("norm-eps", "outside the root"),
    ("norm-variance-unbiased", ""),
    ("router-in-low-precision", "bfloat16"),
    ("router-in-low-precision", "float16"),
}

#: What the noise of int8 drowns in a trace: nearly the same, and a RoPE that is a little off.
BELOW_INT8 = {
    *(way for way in BELOW_BFLOAT16 if way[0] != "router-in-low-precision"),
    ("weights-narrowed", "bfloat16"),
    ("rope-scaling-factor", "8"),
}

#: What only other families can get wrong, but for norms, activations, windows and experts, which have kernels.
WITHOUT_KERNELS = {
    (mistake.name, way.label)
    for mistake, way in WAYS
    if mistake.name.startswith(("bias-", "learned-", "longrope-", "qk-norm-", "shared-"))
}


#: With some processors' sums a router's logit lies so near the middle of two float16 that it is rounded to either.
#: Weights of another seed have none there, and the mistake is named by those.
BETWEEN_ROUNDINGS = ("router-in-low-precision", "float16")


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
    assert (report.verdict, report.first_divergence, report.step) == ("differs", *visible(way, wrong, reference))
    found = diagnose(truth_model(config, "float32"), wrong)
    if (mistake.name, way.label) == BETWEEN_ROUNDINGS and found.verdict == "too noisy to say":
        assert found.ranking[0].name == mistake.name
        found = diagnose(truth_model(config, "float32", 1), candidate([(mistake.name, way.label)], config, seed=1))
    assert (found.verdict, found.name, found.way) == ("named", mistake.name, way.label)
    assert found.margin is not None
    assert found.margin > 10


# Weights that are stored in bfloat16 lose nothing in bfloat16, and fit into float16. Kernels are the same everywhere:
# Llamas and what other families add with kernels of their own are enough.
@every_way_but(("weights-narrowed", "bfloat16"), ("weights-narrowed", "float16"), *WITHOUT_KERNELS)
def test_the_compiled_engine_on_bfloat16_weights_is_found_out_as_well(mistake: Mistake, way: Way) -> None:
    config = config_for(way, "bfloat16")
    wrong = candidate([(mistake.name, way.label)], config, backend="fast", dtype="bfloat16")
    truth, reference = traces(config, "bfloat16")
    report = compare(wrong, reference, truth)
    assert (report.verdict, report.first_divergence, report.step) == ("differs", *visible(way, wrong, reference))
    found = diagnose(truth_model(config, "bfloat16"), wrong)
    assert (found.verdict, found.name, found.way) == ("named", mistake.name, way.label)


@every_way_but(("weights-narrowed", "bfloat16"))
def test_a_run_that_rounds_to_bfloat16_shows_all_but_what_its_rounding_hides(mistake: Mistake, way: Way) -> None:
    config = config_for(way, "bfloat16")
    wrong = candidate([(mistake.name, way.label)], config, dtype="bfloat16", rounds_to="bfloat16")
    found = diagnose(truth_model(config, "bfloat16"), wrong)
    if (mistake.name, way.label) in BELOW_BFLOAT16:
        assert found.name is None
        assert found.ranking[0].ratio < 30
        return
    assert (found.verdict, found.name) == ("named", mistake.name)
    truth, reference = traces(config, "bfloat16", "bfloat16")
    assert compare(wrong, reference, truth).verdict != "match"


@every_way_but()
def test_a_run_in_int8_is_found_out_by_its_operations_one_by_one_where_its_rounding_hides_it(
    mistake: Mistake, way: Way
) -> None:
    config, planted = config_for(way, "float32"), [(mistake.name, way.label)]
    wrong = candidate(planted, config, rounds_to="int8")
    truth, reference = traces(config, "float32", "int8")
    verdict = compare(wrong, reference, truth).verdict
    assert (verdict == "match") == ((mistake.name, way.label) in BELOW_INT8)
    if verdict != "differs":
        local = shadow_run(wrong_model(planted, config, rounds_to="int8"), reference)
        assert compare(wrong, reference, truth, local=local).verdict == "differs"
    found = diagnose(truth_model(config, "float32"), wrong)
    assert (found.verdict, found.name, found.way) == ("named", mistake.name, way.label)


# --- in other families ----------------------------------------------------------------------------------------------

#: mistake | way | model of another family | tap that shows it first | step
_ELSEWHERE = """
bos-missing                  |                    | gpt2           | tok_embeddings              | 0
weights-narrowed             | float16            | gpt2           | tok_embeddings              | 0
weights-narrowed             | float16            | qwen2_moe      | tok_embeddings              | 0
wrong-layer-order            | last first         | qwen2_moe      | layers.0.attention_norm     | 0
last-layer-missing           |                    | gpt1           | logits                      | 0
k-v-swapped                  |                    | qwen2          | layers.0.k                  | 0
k-v-swapped                  |                    | gpt2           | layers.0.k                  | 0
norm-eps                     | 1e-06              | gpt2           | layers.0.attention_norm     | 0
norm-weight-ignored          | attention_norm     | olmo2          | layers.0.attention_out_norm | 0
norm-weight-ignored          | ffn_norm           | gpt1           | layers.0.resid_post_norm    | 0
norm-weight-plus-one         |                    | olmo2          | layers.0.q_norm             | 0
norm-weights-swapped         |                    | gpt1           | layers.0.resid_mid_norm     | 0
norm-subtracts-mean          |                    | qwen3          | layers.0.attention_norm     | 0
norm-keeps-mean              | divided by the deviation | gpt1     | layers.0.resid_mid_norm     | 0
norm-missing                 | both               | gpt1           | layers.0.resid_mid_norm     | 0
norm-missing                 | attention          | olmo2          | layers.0.attention_out_norm | 0
norm-missing                 | feed-forward       | gpt2           | layers.0.ffn_norm           | 0
norm-order                   | post               | gpt2           | layers.0.q                  | 0
norm-order                   | post               | olmo2          | layers.0.resid_mid          | 0
norm-order                   | pre                | olmo2          | layers.0.q                  | 0
norm-order                   | output             | mixtral        | layers.0.q                  | 0
final-norm-missing           |                    | olmo2          | norm                        | 0
qkv-split-order              | v k q              | gpt2           | layers.0.q                  | 0
qkv-split-order              | k q v              | phi3, long     | layers.0.q                  | 0
qkv-split-order              | by key/value heads | qwen2          | layers.0.q                  | 0
gate-up-alternating          |                    | phi3, long     | layers.0.gate               | 0
bias-missing                 | q, k and v         | gpt2           | layers.0.q                  | 0
bias-missing                 | k                  | gpt2           | layers.0.k                  | 0
qk-norm-missing              | queries and keys   | olmo2          | layers.0.q_rope             | 0
qk-norm-row-order            |                    | olmo2          | layers.0.q_norm             | 0
rope-theta                   | 500000             | phi3, crossing | layers.0.q_rope             | 0
rope-scaling-missing         |                    | phi3, long     | layers.0.q_rope             | 0
rope-row-order               | left in halves     | qwen2          | layers.0.q                  | 0
rope-row-order               | left in halves     | qwen3          | layers.0.q                  | 0
rope-row-order               | permuted twice     | olmo2          | layers.0.q                  | 0
rope-missing                 | queries            | qwen3          | layers.0.q_rope             | 0
longrope-switch              | short factors always | phi3, crossing | layers.0.q_rope           | 1
cache-hole                   | newest slot read before it is written | mistral | layers.0.scores | 1
kv-heads-tiled               |                    | qwen2          | layers.0.scores             | 0
scores-not-scaled            |                    | gpt1           | layers.0.scores             | 0
softmax-in-low-precision     | bfloat16           | gpt2           | layers.0.probs              | 0
w1-w3-swapped                |                    | phi3, long     | layers.0.gate               | 0
w1-w3-swapped                |                    | mixtral        | layers.0.expert_gate        | 0
w1-w3-swapped                |                    | qwen2_moe      | layers.0.expert_gate        | 0
silu-of-up                   |                    | mixtral        | layers.0.expert_act         | 0
wrong-activation             | GELU, exact        | gpt2           | layers.0.ffn_act            | 0
wrong-activation             | GELU, by tanh      | gpt1, biased output, relu | layers.0.ffn_act | 0
wrong-activation             | ReLU               | mixtral        | layers.0.expert_act         | 0
residual-missing             | both               | olmo2          | layers.0.resid_mid          | 0
residual-missing             | feed-forward       | qwen2_moe      | layers.0.resid_post         | 0
residual-doubled             | feed-forward       | gpt1           | layers.0.resid_post         | 0
experts-active               | one too many       | qwen2_moe      | layers.0.router_weights     | 0
"""
ELSEWHERE = [tuple(cell.strip() for cell in line.split("|")) for line in _ELSEWHERE.strip().splitlines()]


@pytest.mark.parametrize(("mistake", "way", "model", "first", "step"), ELSEWHERE)
def test_in_the_models_of_other_families_it_shows_where_they_have_it_and_has_the_same_name(
    mistake: str, way: str, model: str, first: str, step: str
) -> None:
    config = MODELS[model]
    wrong = candidate([(mistake, way)], config)
    truth, reference = traces(config, "float32")
    report = compare(wrong, reference, truth)
    assert (report.verdict, report.first_divergence, report.step) == ("differs", first, int(step))
    found = diagnose(truth_model(config, "float32"), wrong)
    assert (found.verdict, found.name, found.way) == ("named", mistake, way)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("backend", "rounds_to"), [("numpy", "float32"), ("fast", "float32"), ("numpy", "bfloat16")])
def test_a_clean_run_of_every_family_matches_and_has_no_name(model: str, backend: str, rounds_to: str) -> None:
    config = MODELS[model]
    clean = candidate([], config, backend=backend, dtype="bfloat16", rounds_to=rounds_to)
    truth, reference = traces(config, "bfloat16", rounds_to)
    assert compare(clean, reference, truth).verdict == "match"
    found = diagnose(truth_model(config, "bfloat16"), clean)
    assert (found.verdict, found.name) == ("no match", None)
    assert found.sentence.startswith("Every operation")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["numpy", "fast"])
def test_a_clean_run_in_int8_matches_operation_by_operation_and_has_no_name(model: str, backend: str) -> None:
    config = MODELS[model]
    clean = candidate([], config, backend=backend, rounds_to="int8")
    truth, reference = traces(config, "float32", "int8")
    assert compare(clean, reference, truth).verdict != "differs"
    local = shadow_run(wrong_model([], config, backend=backend, rounds_to="int8"), reference)
    assert compare(clean, reference, truth, local=local).verdict == "match"
    found = diagnose(truth_model(config, "float32"), clean)
    assert (found.verdict, found.name) == ("no match", None)
    assert found.sentence.startswith("Every operation")
