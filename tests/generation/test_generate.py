"""Generation streams the right text and leaves the cache as it says, whatever stops it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest

from npllama import ops
from npllama.cache import KVCache
from npllama.dtypes import Tensor
from npllama.engine import Model
from npllama.errors import ContextOverflowError, NpllamaError, ParameterError, TokenizerError
from npllama.generation.generate import generate
from npllama.generation.prompt import prompt_ids
from npllama.generation.sampling import log_probabilities
from npllama.generation.writer import Step
from npllama.weights import gather_weights
from tests.fixtures.loud import loud_config, loud_tensors, loud_tokens
from tests.generation.fakes import ASSISTANT, BOS, EOS, USER, VOCABULARY, FakeModel, bigram, byte_tokenizer, writes


def loud_model() -> Model:
    """Return a small random model that computes with the textbook's operations."""
    config = loud_config()
    tensors = loud_tensors(config)
    freqs = (1 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)).astype(np.float32)
    weights = gather_weights(config, lambda name: Tensor(tensors[name], "float32") if name in tensors else None, freqs)
    return Model(config, weights, ops, backend="numpy")


def run(model: Any, prompt: Any, **settings: Any) -> list[Step]:
    return list(generate(model, prompt, **settings))


def text_of(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


# --- text ---------------------------------------------------------------------------------------------------------


def test_the_text_is_streamed_until_a_stop_token() -> None:
    steps = run(writes("Hello!", after=3), "ab")  # BOS, a, b
    assert [step.text for step in steps] == ["H", "e", "l", "l", "o", "!", ""]
    assert [step.index for step in steps] == list(range(7))
    assert steps[-1].token == EOS
    assert [step.finish_reason for step in steps] == [None] * 6 + ["stop"]


def test_half_a_character_is_never_shown() -> None:
    text = "naïve 漢字 🦙🏽 ok"
    steps = run(writes(text, after=2), "a")
    assert text_of(steps) == text
    assert all("\ufffd" not in step.text for step in steps)
    assert len(steps) == len(text.encode()) + 1


def test_a_character_cut_off_by_the_length_is_a_replacement_character() -> None:
    steps = run(writes("ab🦙", after=2), "a", max_new_tokens=4)
    assert text_of(steps) == "ab\ufffd"
    assert steps[-1].finish_reason == "length"


def test_a_character_cut_off_by_a_stop_token_is_a_replacement_character() -> None:
    steps = run(writes(b"ab" + "🦙".encode()[:3], after=2), "a")
    assert text_of(steps) == "ab\ufffd"
    assert steps[-1].finish_reason == "stop"


def test_a_stop_string_over_several_tokens_ends_the_text_and_is_not_shown() -> None:
    steps = run(writes("One.\n\nTwo.", after=2), "a", stop=["\n\n"])
    assert [step.text for step in steps] == ["O", "n", "e", ".", "", ""]
    assert steps[-1].finish_reason == "stop"


def test_the_beginning_of_a_stop_string_is_shown_when_the_length_runs_out() -> None:
    steps = run(writes("One.\nTwo.", after=2), "a", stop=["\n\n"], max_new_tokens=5)
    assert text_of(steps) == "One.\n"
    assert steps[-1].finish_reason == "length"


def test_the_beginning_of_a_stop_string_is_shown_before_a_stop_token() -> None:
    assert text_of(run(writes("One.\n", after=2), "a", stop=["\n\n"])) == "One.\n"


def test_a_special_token_that_stops_nothing_is_spelled_out() -> None:
    assert text_of(run(writes("", after=2), [USER])) == ""
    model = FakeModel(lambda tokens: np.eye(VOCABULARY)[USER] * 9, tokenizer=byte_tokenizer())
    assert text_of(run(model, "a", max_new_tokens=2)) == "<user><user>"


def test_an_id_without_a_token_is_no_text() -> None:
    model = FakeModel(lambda tokens: np.eye(VOCABULARY)[VOCABULARY - 1] * 9, tokenizer=byte_tokenizer())
    steps = run(model, "a", max_new_tokens=3)
    assert [step.token for step in steps] == [VOCABULARY - 1] * 3
    assert text_of(steps) == ""


def test_a_model_without_a_tokenizer_takes_and_gives_ids() -> None:
    steps = run(writes("ab", after=3, tokenizer=None), np.array([1, 2, 3]), max_new_tokens=4)
    assert [step.token for step in steps] == [97, 98, EOS, EOS]
    assert text_of(steps) == ""
    assert steps[-1].finish_reason == "length"


# --- prompts ------------------------------------------------------------------------------------------------------


def test_a_text_gets_its_bos_once() -> None:
    assert prompt_ids(writes(""), "ab") == [BOS, 97, 98]
    model = writes("", tokenizer=byte_tokenizer(adds_bos=False))
    assert prompt_ids(model, "ab") == [97, 98]


def test_a_text_behind_a_cache_gets_no_second_bos() -> None:
    model, _ = bigram()
    cache = KVCache(model.config, 100)
    run(model, "ab", cache=cache, max_new_tokens=1)
    run(model, "cd", cache=cache, max_new_tokens=1)
    assert model.calls == [[BOS, 97, 98], [99, 100]]


def test_text_that_spells_a_special_token_is_text() -> None:
    assert prompt_ids(writes(""), "<eos>") == [BOS, *b"<eos>"]


def test_messages_go_through_the_chat_template() -> None:
    model = writes("", tokenizer=byte_tokenizer(adds_bos=False))
    assert prompt_ids(model, [{"role": "user", "content": "<eos>"}]) == [USER, *b"<eos>", ASSISTANT]


def test_an_empty_text_starts_from_bos() -> None:
    assert text_of(run(writes("Hi", after=1), "")) == "Hi"


def test_an_empty_prompt_without_a_bos_is_an_error() -> None:
    model = writes("", tokenizer=byte_tokenizer(adds_bos=False))
    empty: tuple[Any, ...] = ("", [])
    for prompt in empty:
        with pytest.raises(ParameterError, match="the prompt is empty, and no BOS token"):
            generate(model, prompt)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 1.0, True, "7", None])
def test_an_id_that_is_none_is_an_error_that_says_where(bad: Any) -> None:
    with pytest.raises(ParameterError, match=rf"token {bad!r} at index 2 is not an id from 0 to {VOCABULARY - 1}"):
        generate(writes(""), [1, 2, bad])


@pytest.mark.parametrize(
    ("prompt", "settings"), [("text", {}), ([{"role": "user", "content": "x"}], {}), ([1], {"stop": ["x"]})]
)
def test_text_without_a_tokenizer_is_an_error(prompt: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="tokenizer"):
        generate(writes("", tokenizer=None), prompt, **settings)


# --- lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "tokens"), [(15, 2), (16, 1)])
def test_a_context_is_used_to_the_brim(prompt: int, tokens: int) -> None:
    model, _ = bigram(max_seq_len=16, tokenizer=None)
    steps = run(model, [1] * prompt, max_new_tokens=10**9)
    assert len(steps) == tokens
    assert steps[-1].finish_reason == "length"


def test_a_prompt_longer_than_the_context_is_an_error_with_both_numbers() -> None:
    with pytest.raises(ContextOverflowError, match="17 tokens, but the context holds 16"):
        generate(writes("", max_seq_len=16), [1] * 17)


def test_a_prompt_that_does_not_fit_behind_the_cache_is_an_error_with_all_numbers() -> None:
    model, _ = bigram()
    cache = KVCache(model.config, 16)
    run(model, [1] * 10, cache=cache, max_new_tokens=1)
    with pytest.raises(ContextOverflowError, match="7 tokens behind 10 cached ones, but the context holds 16"):
        generate(model, [1] * 7, cache=cache)
    assert cache.length == 10


@pytest.mark.parametrize("name", ["max_new_tokens", "chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_a_count_below_one_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=rf"{name} is {value!r}, expected an integer of 1 or more"):
        generate(writes(""), [1], **{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"top_k": VOCABULARY + 1},
        {"top_p": 0},
        {"min_p": 2},
        {"seed": -1},
        {"stop": "x"},
        {"lookup": -1},
        {"lookup": 1.5},
    ],
)
def test_settings_are_checked_before_the_first_step(settings: dict[str, Any]) -> None:
    with pytest.raises(NpllamaError):
        generate(writes(""), [1], **settings)


# --- cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_the_chunk_makes_no_difference_to_the_tokens(chunk: int) -> None:
    model = loud_model()
    prompt = loud_tokens(model.config).tolist()
    whole = [int(np.argmax(model.forward(prompt)[-1]))]
    for _ in range(5):
        whole.append(int(np.argmax(model.forward(prompt + whole)[-1])))
    assert [step.token for step in run(model, prompt, chunk=chunk, max_new_tokens=6)] == whole


def test_a_prompt_is_fed_in_chunks_and_every_later_token_once() -> None:
    model, _ = bigram()
    steps = run(model, list(range(10)), chunk=4, max_new_tokens=3)
    tokens = [step.token for step in steps]
    assert model.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [tokens[0]], [tokens[1]]]


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_closing_early_leaves_a_cache_to_go_on_from(taken: int) -> None:
    model = loud_model()
    prompt = loud_tokens(model.config).tolist()
    whole = [step.token for step in run(model, prompt, max_new_tokens=8)]
    cache = KVCache(model.config, 100)
    with closing(generate(model, prompt, cache=cache, max_new_tokens=8)) as steps:
        first = [next(steps).token for _ in range(taken)]
    assert cache.length == (len(prompt) + taken - 1 if taken else 0)
    rest = run(model, first[-1:] or prompt, cache=cache, max_new_tokens=8 - taken)
    assert first + [step.token for step in rest] == whole


def test_a_finished_generation_holds_all_but_its_last_token() -> None:
    model, _ = bigram()
    cache = KVCache(model.config, 50)
    run(model, [1, 2, 3], cache=cache, max_new_tokens=4)
    assert cache.length == 3 + 4 - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_own_cache_is_no_larger_than_needed_and_of_the_models_dtype(dtype: str) -> None:
    model, _ = bigram(max_seq_len=1 << 20)
    model.cache_dtype = dtype
    made: list[KVCache] = []
    forward = model.forward

    def watch(tokens: Any, cache: Any = None, *, last: bool = False) -> Any:
        made.append(cache)
        return forward(tokens, cache, last=last)

    model.forward = watch
    run(model, [1, 2, 3], max_new_tokens=4)
    assert made[0].capacity == made[0].length == 6
    assert made[0].dtype == dtype


# --- numbers ------------------------------------------------------------------------------------------------------


def test_equal_seeds_write_equal_tokens() -> None:
    def tokens(seed: int) -> list[int]:
        return [step.token for step in run(bigram()[0], "ab", seed=seed, temperature=1.0, max_new_tokens=30)]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_the_logprob_is_the_models_whatever_the_sampling() -> None:
    model, table = bigram()
    steps = run(model, [5], temperature=3.0, top_k=5, seed=0, max_new_tokens=20, stop=())
    before = [5, *(step.token for step in steps)][:-1]
    expected = log_probabilities(table[before], np.array([step.token for step in steps]))
    np.testing.assert_array_equal([step.logprob for step in steps], expected)
