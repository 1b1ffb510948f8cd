"""Sampling draws from exactly the distribution that its settings describe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.dtypes import Array
from npllama.errors import CorruptDataError, ParameterError
from npllama.generation.sampling import Sampling, candidates, log_probabilities, random_generator, sample


def random_logits(size: int = 300, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([1, 7, 7, 3, 7], dtype=np.float32)
    assert sample(logits, Sampling(), random_generator(0)) == 1


def test_greedy_draws_no_random_number() -> None:
    rng = random_generator(0)
    sample(random_logits(), Sampling(), rng)
    assert rng.random() == random_generator(0).random()


@pytest.mark.parametrize("temperature", [1e-30, 5e-324])
def test_a_tiny_temperature_is_greedy_and_makes_no_nan(temperature: float) -> None:
    logits = random_logits()
    tokens, weights = candidates(logits, Sampling(temperature=temperature, top_p=0.9, min_p=0.1))
    assert tokens.tolist() == [int(np.argmax(logits))]
    assert weights.tolist() == [1.0]


def test_a_huge_temperature_is_uniform() -> None:
    _, weights = candidates(random_logits(), Sampling(temperature=1e300))
    np.testing.assert_allclose(weights, 1 / 300)


def test_an_excluded_token_is_never_a_candidate() -> None:
    logits = random_logits()
    logits[5] = -np.inf
    tokens, _ = candidates(logits, Sampling(temperature=1e30))
    assert tokens.size == 299
    assert 5 not in tokens


def test_top_p_drops_where_the_sum_of_those_before_exceeds_it() -> None:
    logits = np.zeros(4, dtype=np.float32)  # four probabilities of exactly 0.25: before them 0, 0.25, 0.5, 0.75

    def kept(top_p: float) -> list[int]:
        return [int(token) for token in candidates(logits, Sampling(temperature=1, top_p=top_p))[0]]

    assert kept(0.5) == [0, 1, 2]
    assert kept(0.499) == [0, 1]
    assert kept(0.75) == [0, 1, 2, 3]
    assert kept(1e-12) == [0]


def test_top_p_counts_the_share_among_those_that_top_k_left() -> None:
    logits = np.zeros(8, dtype=np.float32)
    settings = Sampling(temperature=1, top_k=4, top_p=0.4)
    assert candidates(logits, settings)[0].tolist() == [0, 1]


def test_top_k_keeps_the_lowest_ids_among_equals() -> None:
    logits = np.array([1, 5, 1, 9, 1, 5, 1], dtype=np.float32)
    assert candidates(logits, Sampling(temperature=1, top_k=2))[0].tolist() == [1, 3]
    assert candidates(logits, Sampling(temperature=1, top_k=5))[0].tolist() == [0, 1, 2, 3, 5]


def test_min_p_is_a_share_of_the_most_probable_token() -> None:
    logits = np.log(np.array([0.6, 0.31, 0.07, 0.02])).astype(np.float32)
    assert candidates(logits, Sampling(temperature=1, min_p=0.5))[0].tolist() == [0, 1]
    assert candidates(logits, Sampling(temperature=1, min_p=0.1))[0].tolist() == [0, 1, 2]
    assert candidates(logits, Sampling(temperature=1, min_p=1.0))[0].tolist() == [0]


@given(
    st.integers(0, 1000),
    st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 40]),
    st.floats(0.01, 0.999) | st.just(1.0),
    st.sampled_from([0.0, 0.05, 0.9]),
)
def test_the_candidates_are_those_of_a_full_sort(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(seed=seed)
    found, _ = candidates(logits, Sampling(temperature, top_k, top_p, min_p))
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    weights = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
    weights /= weights.sum()
    expected = []
    before = 0.0
    for token, weight in zip(order, weights, strict=True):
        if top_p < 1 and before > top_p:  # at 1 the rounded sum could exceed it
            break
        if weight >= min_p * weights[0]:
            expected.append(int(token))
        before += weight
    assert found.tolist() == sorted(expected)


@pytest.mark.torch
@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=0.8, min_p=0.05),
        Sampling(temperature=1.3, top_k=50, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_the_probabilities_are_those_of_transformers(settings: Sampling) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(5):
        logits = random_logits(2000, seed)
        steps = [process.TemperatureLogitsWarper(settings.temperature)]
        steps += [process.TopKLogitsWarper(settings.top_k)] if settings.top_k else []
        steps += [process.TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
        steps += [process.MinPLogitsWarper(settings.min_p)] if settings.min_p else []
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for step in steps:
            scores = step(None, scores)
        expected = torch.softmax(scores[0], dim=-1).numpy()
        found = np.zeros(logits.size)
        tokens, weights = candidates(logits, settings)
        found[tokens] = weights
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=2.0, top_k=10),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=0.5, min_p=0.01),
    ],
    ids=str,
)
def test_draws_follow_the_probabilities(settings: Sampling) -> None:
    draws = 20_000
    logits = random_logits(40, seed=3) / 3
    rng = random_generator(1234)
    counts = np.bincount([sample(logits, settings, rng) for _ in range(draws)], minlength=logits.size)
    tokens, weights = candidates(logits, settings)
    assert counts[tokens].sum() == draws
    likely = weights * draws >= 5
    expected = np.append(weights[likely], weights[~likely].sum()) * draws
    observed = np.append(counts[tokens][likely], counts[tokens][~likely].sum())
    filled = expected > 0
    chi_square = float(((observed - expected)[filled] ** 2 / expected[filled]).sum())
    freedom = int(filled.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations; the seed is fixed


def test_equal_seeds_draw_equal_tokens() -> None:
    def draw(seed: int) -> list[int]:
        rng = random_generator(seed)
        return [sample(random_logits(seed=i), Sampling(temperature=1.0), rng) for i in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


class TopOfTheRange:
    """A generator whose number is the largest below 1, as rarely as that comes."""

    def random(self) -> float:
        return float(np.nextafter(1.0, 0.0))


def test_the_largest_random_number_still_draws_a_token() -> None:
    for seed in range(50):
        logits = random_logits(1000, seed)
        rng: Any = TopOfTheRange()
        assert 0 <= sample(logits, Sampling(temperature=1.0), rng) < 1000


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = random_logits()
    logits[17] = bad
    with pytest.raises(CorruptDataError, match=r"largest of the 300 logits is (nan|inf)"):
        sample(logits, Sampling(temperature), random_generator(0))


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(CorruptDataError, match="is -inf"):
        sample(np.full(4, -np.inf, dtype=np.float32), Sampling(), random_generator(0))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, -0.1, math.nan, math.inf, "1", None, True]),
        ("top_k", [-1, 1.5, math.nan, "1", None, True]),
        ("top_p", [0, -0.5, 1.5, math.nan, math.inf, "1", None, True]),
        ("min_p", [-0.1, 1.5, math.nan, "1", None, True]),
    ],
)
def test_a_setting_out_of_its_range_is_an_error_that_names_it(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ParameterError, match=f"^{name} is {value!r}, expected"):
            Sampling(**{name: value})


def test_top_k_beyond_the_vocabulary_is_an_error() -> None:
    with pytest.raises(ParameterError, match="top_k is 301, expected at most the 300 tokens"):
        sample(random_logits(), Sampling(top_k=301), random_generator(0))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", True])
def test_a_seed_out_of_its_range_is_an_error(seed: Any) -> None:
    with pytest.raises(ParameterError, match=r"seed is .*, expected an integer from 0 to"):
        random_generator(seed)


def test_without_a_seed_every_generator_differs() -> None:
    assert random_generator(None).random() != random_generator(None).random()


def test_log_probabilities_sum_to_one_and_do_not_overflow() -> None:
    logits = np.array([[1e4, -1e4, 9999.0, 0.0]], dtype=np.float32)
    each = log_probabilities(np.repeat(logits, 4, axis=0), np.arange(4))
    assert math.isclose(float(np.exp(each).sum()), 1.0, rel_tol=1e-7)
    assert each.dtype == np.float64


@pytest.mark.torch
def test_log_probabilities_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(0).normal(0, 5, (6, 5000)).astype(np.float32)
    tokens = np.array([0, 4999, 17, 17, 2500, 1])
    expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), dim=-1).numpy()[np.arange(6), tokens]
    np.testing.assert_allclose(log_probabilities(logits, tokens), expected, atol=1e-6, rtol=0)
