from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npllama.checkpoint.gguf.checkpoint import open_gguf_checkpoint
from npllama.config import Experts, ModelConfig, RopeScaling, from_gguf
from npllama.config.gguf_metadata import nearest_decimal
from npllama.errors import ConfigError, ConfigMismatchError, NpllamaError, UnsupportedError

Metadata = dict[str, Any]
CONFIG = ModelConfig("llama", 64, 2, 4, 2, 16, 96, 32, 1e-5, 10_000.0, None, 64, False)
SHORT, LONG = tuple(1 + i / 10 for i in range(8)), tuple(1.5 + i / 10 for i in range(8))


def single(value: float) -> float:
    return float(np.float32(value))


def metadata(architecture: str = "llama", epsilon: str = "layer_norm_rms_epsilon", **more: Any) -> Metadata:
    """Return a file's keys; ``more`` are under the architecture's prefix, ``__`` for a dot, None for none at all."""
    keys = {
        "embedding_length": 64,
        "block_count": 2,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "feed_forward_length": 96,
        "vocab_size": 32,
        "context_length": 64,
        f"attention.{epsilon}": single(1e-5),
    } | {key.replace("__", "."): value for key, value in more.items()}
    return {"general.architecture": architecture} | {
        f"{architecture}.{key}": value for key, value in keys.items() if value is not None
    }


def read(values: Metadata, **tensors: Any) -> ModelConfig:
    return from_gguf(values, "m.gguf", **{"tied": False, "freq_factors": False, **tensors})[0]


# --- numbers -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 999_999), st.integers(-20, 20))
def test_a_decimal_comes_back_from_the_float32_that_a_file_keeps(digits: int, exponent: int) -> None:
    decimal = float(f"{digits}e{exponent}")
    assert nearest_decimal(single(decimal)) == decimal


@pytest.mark.parametrize("value", [0.1, 1e-5, 123456.789012345, 1e-60])
def test_a_number_that_is_no_float32_stays_as_it_is(value: float) -> None:
    assert nearest_decimal(value) == value


def test_all_numbers_of_a_configuration_are_decimals() -> None:
    config = read(metadata(rope__freq_base=single(12_345.6), rope__scaling__factor=single(3.3)))
    assert (config.norm_eps, config.rope_theta) == (1e-5, 12_345.6)
    assert config.rope_scaling == RopeScaling("linear", 3.3)


# --- RoPE ----------------------------------------------------------------------------------------------------------


def longrope(**more: Any) -> RopeScaling | None:
    short, long = ([single(factor) for factor in factors] for factors in (SHORT, LONG))
    values = metadata("phi3", rope__scaling__original_context_length=16, **more)
    return read(values, longrope=(short, long)).rope_scaling


def test_the_factors_of_longrope_are_its_tensors() -> None:
    computed = math.sqrt(1 + math.log(64 / 16) / math.log(16))
    wanted = RopeScaling(
        "longrope", original_max_seq_len=16, short_factors=SHORT, long_factors=LONG, attention_factor=computed
    )
    assert longrope() == wanted
    assert longrope(rope__scaling__attn_factor=single(computed)) == wanted
    assert longrope(rope__scaling__attn_factor=1.25) == replace(wanted, attention_factor=1.25)


def test_a_context_that_was_not_stretched_needs_no_attention_factor() -> None:
    scaling = longrope(context_length=16)
    assert scaling is not None
    assert scaling.attention_factor == 1.0


def test_a_factor_without_a_type_is_linear() -> None:
    for kind in (None, "linear"):
        values = metadata(rope__scaling__type=kind, rope__scaling__factor=4.0)
        assert read(values).rope_scaling == RopeScaling("linear", 4.0)
    assert read(metadata(rope__scaling__type="none", rope__scaling__factor=4.0)).rope_scaling is None


# --- windows and experts -------------------------------------------------------------------------------------------


def test_a_window_as_wide_as_the_context_is_none() -> None:
    assert read(metadata("phi3", attention__sliding_window=63)).windows == (63, 63)
    for window in (64, 0):
        assert read(metadata("phi3", attention__sliding_window=window)).windows == ()


MIXTURE = {"expert_count": 4, "expert_used_count": 2}


def test_the_experts_of_a_llama_are_as_wide_as_its_feed_forward_layer() -> None:
    assert read(metadata(**MIXTURE)) == replace(CONFIG, experts=Experts(4, 2, 96, renormalise=True))
    assert read(metadata(expert_count=0, expert_used_count=0)) == CONFIG


@pytest.mark.parametrize("said", [None, False, True])
def test_whether_the_experts_weights_are_renormalised_is_what_the_file_or_else_the_architecture_says(
    said: bool | None,
) -> None:
    for architecture, usual, shared in (("qwen2moe", False, 48), ("qwen3moe", True, None)):
        values = metadata(
            architecture,
            **MIXTURE,
            expert_feed_forward_length=24,
            expert_shared_feed_forward_length=shared,
            expert_weights_norm=said,
        )
        wanted = Experts(4, 2, 24, renormalise=usual if said is None else said, shared_dim=shared or 0)
        assert read(values).experts == wanted


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], type[NpllamaError], str]] = {
    "an architecture that is no word": (
        lambda: read({"general.architecture": ["llama"]}),
        UnsupportedError,
        r"general\.architecture is \['llama'\]",
    ),
    "a window in some layers": (
        lambda: read(metadata("phi3", attention__sliding_window_pattern=2)),
        ConfigError,
        r"unknown keys .* phi3\.attention\.sliding_window_pattern",
    ),
    "an array in the place of a number": (
        lambda: read(metadata(rope__dimension_count=np.array([16, 16]))),
        ConfigError,
        "a single value",
    ),
    "attention to what comes after": (
        lambda: read(metadata(attention__causal=False)),
        UnsupportedError,
        r"attention\.causal is False",
    ),
    "rotation of a part of a head": (
        lambda: read(metadata("phi3", rope__dimension_count=12)),
        UnsupportedError,
        r"rope\.dimension_count is 12",
    ),
    "two scalings": (
        lambda: read(metadata(rope__scaling__factor=2.0), freq_factors=True),
        UnsupportedError,
        r"scaled twice, by rope_freqs\.weight and by rope\.scaling\.factor",
    ),
    "longrope without factors": (
        lambda: read(metadata(rope__scaling__type="longrope")),
        ConfigError,
        "neither rope_factors_short",
    ),
    "longrope of too few factors": (
        lambda: read(metadata("phi3"), longrope=([1.0] * 7, [1.0] * 7)),
        ConfigError,
        r"7 factors, expected Dh/2 = 8",
    ),
    "longrope of an empty context": (
        lambda: read(metadata("phi3", rope__scaling__original_context_length=1), longrope=(SHORT, LONG)),
        ConfigError,
        "original_context_length is 1",
    ),
    "an attention factor without longrope": (
        lambda: read(metadata(rope__scaling__attn_factor=1.2)),
        UnsupportedError,
        "attn_factor is 1.2",
    ),
    "experts in a dense architecture": (
        lambda: read(metadata("qwen2", **MIXTURE)),
        UnsupportedError,
        "expert_count is 4: this architecture has no mixture of experts",
    ),
    "experts of no width": (
        lambda: read(metadata("qwen3moe", **MIXTURE)),
        ConfigError,
        "expert_feed_forward_length is missing",
    ),
    "more experts asked than there are": (
        lambda: read(metadata(expert_count=2, expert_used_count=3)),
        ConfigError,
        "3 of 2 experts",
    ),
    "scaled weights of experts": (
        lambda: read(metadata(**MIXTURE, expert_weights_scale=2.5)),
        UnsupportedError,
        "expert_weights_scale is 2.5",
    ),
    "a router that is no softmax": (
        lambda: read(metadata(**MIXTURE, expert_gating_func=gguf.ExpertGatingFuncType.SIGMOID.value)),
        UnsupportedError,
        "expert_gating_func is 2",
    ),
    "a shared expert where there is none": (
        lambda: read(
            metadata(
                "qwen3moe", **MIXTURE, expert_feed_forward_length=24, expert_shared_feed_forward_length=24
            )
        ),
        ConfigError,
        "unknown keys .* qwen3moe.expert_shared_feed_forward_length",
    ),
    "the other norm's epsilon": (
        lambda: read(metadata("gpt2")),
        ConfigError,
        r"gpt2\.attention\.layer_norm_epsilon is missing",
    ),
    "a vocabulary that is no list": (
        lambda: read({**metadata(vocab_size=None), "tokenizer.ggml.tokens": 7}),
        ConfigError,
        r"llama\.vocab_size is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_metadata_that_npllama_would_get_wrong_are_refused(what: str) -> None:
    attempt, error, message = REFUSED[what]
    with pytest.raises(error, match=message) as caught:
        attempt()
    assert type(caught.value) is error
    assert str(caught.value).startswith("m.gguf: ")


def write_longrope(path: Path, **factors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "phi3")
    for key, value in metadata("phi3", rope__scaling__original_context_length=16).items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
    for which, values in factors.items():
        writer.add_tensor(f"rope_factors_{which}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_one_kind_of_longrope_factors_without_the_other_is_refused(tmp_path: Path) -> None:
    factors = np.array(SHORT, np.float32)
    for there, missing in (("short", "long"), ("long", "short")):
        path = write_longrope(tmp_path / f"{there}.gguf", **{there: factors})
        with pytest.raises(ConfigMismatchError, match=rf"rope_factors_{missing}\.weight is missing"):
            open_gguf_checkpoint(path)


@pytest.mark.parametrize("shape", [(2, 4), (1 << 16, 2)])
def test_longrope_factors_that_are_no_vector_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    factors = np.ones(shape, np.float32)
    path = write_longrope(tmp_path / "m.gguf", short=factors, long=factors)
    with pytest.raises(ConfigMismatchError, match=r"m\.gguf:rope_factors_short\.weight: its shape is"):
        open_gguf_checkpoint(path)
