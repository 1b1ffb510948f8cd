"""A batch gives every prompt what it gets alone, and keeps its lanes full."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from npllama.cache import KVCache
from npllama.errors import ContextOverflowError, NpllamaError, ParameterError, TokenizerError
from npllama.generation.batch import generate_batch
from npllama.generation.generate import generate
from npllama.generation.writer import Step
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens
from tests.generation.fakes import FakeModel, bigram, writes
from tests.generation.test_lookup import LONGROPE, assert_same


def gathered(model: Any, prompts: list[Any], **settings: Any) -> list[list[Step]]:
    """Return the steps of each prompt, in the order in which they came."""
    found: list[list[Step]] = [[] for _ in prompts]
    for index, step in generate_batch(model, prompts, **settings):
        found[index].append(step)
    return found


def prompts_of(model: Any, lengths: tuple[int, ...]) -> list[list[int]]:
    return [loud_tokens(model.config, length, seed).tolist() for seed, length in enumerate(lengths)]


def passes_of(model: FakeModel) -> list[list[list[int]]]:
    """Watch a stand-in: return a list that will hold the sequences of every forward pass."""
    passes: list[list[list[int]]] = []
    forward_many = model.forward_many

    def watched(sequences: Any, caches: Any, *, last: bool = False) -> Any:
        passes.append([[int(token) for token in tokens] for tokens in sequences])
        return forward_many(sequences, caches, last=last)

    model.forward_many = watched  # type: ignore[method-assign]
    return passes


# --- the same as alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(("lanes", "chunk"), [(1, 512), (2, 7), (3, 512), (8, 1), (8, 512)])
def test_each_prompt_gets_the_steps_that_it_gets_alone(lanes: int, chunk: int, temperature: float) -> None:
    model = loud_model(loud_config(), backend="float64")
    prompts = prompts_of(model, (3, 40, 1, 17, 9))
    settings = {"max_new_tokens": 8, "temperature": temperature, "top_p": 0.9}
    together = gathered(model, prompts, lanes=lanes, chunk=chunk, seed=11, **settings)
    for index, prompt in enumerate(prompts):
        assert_same(together[index], list(generate(model, prompt, seed=11 + index, **settings)))


@pytest.mark.parametrize("backend", ["numpy", "fast"])
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
def test_the_tokens_are_the_same_in_float32_too(backend: str, cache_dtype: str) -> None:
    model = loud_model(loud_config(), backend=backend, dtype="bfloat16", cache_dtype=cache_dtype)
    prompts = prompts_of(model, (3, 40, 1, 17))
    together = gathered(model, prompts, lanes=3, max_new_tokens=8)
    for steps, prompt in zip(together, prompts, strict=True):
        alone = generate(model, prompt, max_new_tokens=8)
        assert [step.token for step in steps] == [step.token for step in alone]


def test_texts_that_end_for_different_reasons_end_as_they_do_alone() -> None:
    model, table = bigram(3)
    table[:, 256:] += 3  # special tokens, the stop token among them
    prompts = ["a", "bc", "", "def", "gh", "xyz", "ä"]
    settings: dict[str, Any] = {"temperature": 1.0, "stop": ["e", "\n"], "max_new_tokens": 40}
    together = gathered(model, prompts, lanes=3, seed=5, **settings)
    assert together == [list(generate(model, text, seed=5 + i, **settings)) for i, text in enumerate(prompts)]
    assert len({(steps[-1].finish_reason, len(steps)) for steps in together}) > 3


def test_a_context_ends_the_texts_that_reach_it() -> None:
    model, _ = bigram(max_seq_len=16, tokenizer=None)
    together = gathered(model, [[1] * 16, [2] * 10, [3]], max_new_tokens=12)
    assert [len(steps) for steps in together] == [1, 7, 12]
    assert {steps[-1].finish_reason for steps in together} == {"length"}


def test_equal_prompts_get_different_random_numbers() -> None:
    first, second = gathered(bigram()[0], ["x", "x"], temperature=1.0, seed=1, max_new_tokens=20)
    assert [step.token for step in first] != [step.token for step in second]


def test_the_largest_seed_has_successors() -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 20}
    found = gathered(bigram()[0], ["x", "x"], seed=2**64 - 1, **settings)
    assert found[1] == list(generate(bigram()[0], "x", seed=0, **settings))
    assert gathered(bigram()[0], ["x", "x"], seed=np.uint64(2**64 - 1), **settings) == found


@pytest.mark.parametrize("length", [30, 38, 41, 60])
def test_a_longrope_text_is_the_same_in_company(length: int) -> None:
    model = loud_model(loud_config(family="phi3", rope_scaling=LONGROPE), backend="float64")
    prompts = prompts_of(model, (length, 5))
    together = gathered(model, prompts, max_new_tokens=12, chunk=7)
    for steps, prompt in zip(together, prompts, strict=True):
        assert_same(steps, list(generate(model, prompt, max_new_tokens=12)))


def test_a_long_longrope_prompt_is_computed_once() -> None:
    model = loud_model(loud_config(family="phi3", rope_scaling=LONGROPE))
    computed = []
    run = model._run
    model._run = lambda ids, *more: computed.append(len(ids)) or run(ids, *more)  # type: ignore[func-returns-value,method-assign]
    gathered(model, prompts_of(model, (60, 5)), max_new_tokens=2, chunk=7)
    assert sum(computed) == 60 + 1 + 5 + 1


# --- lanes --------------------------------------------------------------------------------------------------------


def test_a_lane_that_ends_goes_to_the_next_prompt_at_once() -> None:
    model = writes("ab", after=3, tokenizer=None)
    passes = passes_of(model)
    gathered(model, [[i, i, i] for i in range(1, 8)], lanes=3, max_new_tokens=4)
    assert [len(sequences) for sequences in passes] == [3] * 8 + [1] * 4
    assert [sum(len(tokens) == 3 for tokens in sequences) for sequences in passes] == [3, 0, 0, 0] * 2 + [1, 0, 0, 0]


def test_prompts_share_a_chunk_while_the_others_go_on() -> None:
    model, _ = bigram(tokenizer=None)
    passes = passes_of(model)
    gathered(model, [[1], [2] * 5, [3] * 9], lanes=3, chunk=4, max_new_tokens=6)
    assert [[len(tokens) for tokens in sequences] for sequences in passes] == [
        [1, 4],
        [1, 1, 4],
        [1, 1, 4],
        [1, 1, 1],
        [1, 1, 1],
        [1, 1, 1],
        [1, 1],
        [1],
        [1],
    ]


def test_the_cache_of_a_text_that_has_ended_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = bigram(tokenizer=None)
    made: list[weakref.ref[KVCache]] = []
    init = KVCache.__init__

    def watched(self: KVCache, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", watched)
    steps = generate_batch(model, [[i] for i in range(6)], lanes=1, max_new_tokens=2)
    for index, _step in steps:
        if index == 4:
            break
    gc.collect()
    assert sum(cache() is not None for cache in made) <= 2


def test_no_prompts_give_no_steps() -> None:
    assert list(generate_batch(writes(""), [])) == []


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "problem", "message"),
    [
        ([1, 999], ParameterError, r"prompts\[2\]: the prompt's token 999 at index 1"),
        ([], ParameterError, r"prompts\[2\]: the prompt is empty, .* Give at least one token"),
        ([1] * 17, ContextOverflowError, r"prompts\[2\]: the prompt has 17 tokens, but the context holds 16"),
        ("text", TokenizerError, r"prompts\[2\]: this model has no tokenizer"),
    ],
)
def test_a_prompt_that_is_none_is_named_before_anything_is_computed(
    bad: Any, problem: type[NpllamaError], message: str
) -> None:
    model, _ = bigram(max_seq_len=16, tokenizer=None)
    with pytest.raises(problem, match=message):
        generate_batch(model, [[1], [2], bad, [3]])
    assert model.calls == []


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_k": 10**6},
        {"seed": -1},
        {"stop": "x"},
        {"stop": [""]},
        {"max_new_tokens": 0},
        {"chunk": 0},
        {"lanes": 0},
        {"lanes": 1.5},
    ],
)
@pytest.mark.parametrize("prompts", [[], ["a"]])
def test_settings_are_checked_even_if_there_are_no_prompts(prompts: list[str], settings: dict[str, Any]) -> None:
    with pytest.raises(ParameterError) as problem:
        generate_batch(writes(""), prompts, **settings)
    assert "prompts[" not in str(problem.value)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(TokenizerError, match="stop strings need a tokenizer"):
        generate_batch(writes("", tokenizer=None), [], stop=["x"])
