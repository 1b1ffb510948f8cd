"""Repeat the experiment behind the thresholds of `npllama.check.noise`.

Random models are run by correct engines in many ways (both backends, other summation orders, chunk sizes and thread
counts, weights stored in float32 and bfloat16, every tensor rounded to bfloat16, the inputs of products rounded to
int8) and with every mistake of the bug dictionary. Each run is compared as `npllama compare` does it; what is printed
are the two distributions of the largest ratio to the noise floor, with a truth (measured) and without (estimated; not
in int8, whose noise is only ever measured). The thresholds must lie between them.

    python tools/calibrate.py --seeds 100 --planted 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from npllama import ops
from npllama.check.compare import compare
from npllama.check.mistakes import DICTIONARY
from npllama.check.mistakes.entry import rounded
from npllama.check.noise import limits
from npllama.check.report import TapRow
from npllama.check.rerun import Rerun, kind_of
from npllama.check.run import run_trace
from npllama.check.trace import MemoryTrace
from npllama.config import Experts, ModelConfig, RopeScaling
from npllama.rounding import with_rounded_inputs
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tokens

_PREFILL, _DECODE = 64, 4
#: What engines with fused kernels never round.
_FUSED = frozenset({"q", "k", "scores", "probs", "gate", "up"})
_GPT: dict[str, Any] = {
    "norm": "layer",
    "positions": "learned",
    "rope_scaling": None,
    "max_seq_len": 128,
    "gated": False,
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "attention_out_bias": True,
    "ffn_bias": True,
}
#: What other families have that Llama has not.
_FAMILIES: tuple[dict[str, Any], ...] = (
    {"qkv_bias": True},
    {"qk_norm": "head"},
    {"qk_norm": "projection", "norm_order": "output"},
    {"experts": Experts(count=4, active=2, hidden_dim=96)},
    {"experts": Experts(count=6, active=2, hidden_dim=48, renormalise=False, shared_dim=80), "qkv_bias": True},
    _GPT,
    {**_GPT, "norm_order": "post", "final_norm": False},
)
#: Clean or planted, kind of floor, which token, dtype -> (largest ratio, what it was).
Found = dict[tuple[str, str, str, str], list[tuple[float, str]]]


def random_config(rng: np.random.Generator) -> ModelConfig:
    """Return one of many small loud architectures: half of them Llamas, the others of all families."""
    n_heads = int(rng.choice([2, 4, 6]))
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 32) if rng.random() < 0.5 else None
    made = loud_config(
        n_layers=int(rng.integers(1, 5)),
        n_heads=n_heads,
        n_kv_heads=int(rng.choice([k for k in (1, 2, 3, 6) if n_heads % k == 0])),
        head_dim=int(rng.choice([8, 16, 32])),
        hidden_dim=int(rng.choice([96, 192, 300])),
        rope_theta=float(rng.choice([1e4, 5e5])),
        rope_scaling=scaling,
        tied=bool(rng.random() < 0.5),
    )
    changes = _FAMILIES[rng.integers(len(_FAMILIES))] if rng.random() < 0.5 else {}
    windows = tuple(int(width) for width in rng.choice([0, 9, 30], made.n_layers)) if rng.random() < 0.2 else ()
    return replace(made, windows=windows, **changes)


def shuffled_sums(seed: int) -> dict[str, Callable[..., Any]]:
    """Return operations that add up the same products in another order."""

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        order = np.random.default_rng(seed).permutation(x.shape[1])
        y = np.ascontiguousarray(x[:, order]) @ np.ascontiguousarray(weight.numbers(to=x.dtype)[:, order]).T
        return y if bias is None else y + bias.numbers(to=x.dtype)

    def linears(x: Any, weights: Sequence[Any], biases: Sequence[Any]) -> Any:
        return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        width = x.dtype.type(x.shape[1])
        centred = x - np.cumsum(x, axis=-1, dtype=x.dtype)[:, -1:] / width
        variance = np.cumsum(centred * centred, axis=-1, dtype=x.dtype)[:, -1:] / width
        scaled = centred / np.sqrt(variance + x.dtype.type(eps))
        return scaled * weight.numbers(to=x.dtype) + bias.numbers(to=x.dtype)

    def rms_norm(x: Any, weight: Any, eps: float) -> Any:
        mean_square = np.cumsum(x * x, axis=-1, dtype=x.dtype)[:, -1:] / x.dtype.type(x.shape[1])
        return x / np.sqrt(mean_square + x.dtype.type(eps)) * weight.numbers(to=x.dtype)

    def attention(q: Any, keys: Any, values: Any, tap: Any, **how: Any) -> Any:
        order = np.random.default_rng(seed).permutation(q.shape[2])
        return ops.attention(q[..., order], keys[..., order], values, tap, **how)

    return {"linear": linear, "linears": linears, "rms_norm": rms_norm, "layer_norm": layer_norm,
            "attention": attention}  # fmt: skip


def play(run: Rerun, dtype: str, exact: frozenset[str] = frozenset()) -> MemoryTrace:
    """Record a run in "float32", with the inputs of products rounded to "int8", or with tensors rounded to "bfloat16".

    Those of the kinds in ``exact`` are not.
    """
    trace = MemoryTrace(tokens=run.tokens, prefill=run.prefill, dtype=dtype, config=run.config)
    if dtype == "int8":
        run = replace(run, ops=with_rounded_inputs(run.ops, dtype))

    def watch(step: int, name: str, x: Any) -> Any:
        y = rounded(x, dtype) if dtype == "bfloat16" and kind_of(name) not in exact else x
        trace.add(step, name, np.array(y))
        return y

    run.play(np.dtype(np.float32), watch)
    return trace


def clean_runs(config: ModelConfig, seed: int, storage: str, tokens: list[int]) -> Iterator[tuple[str, MemoryTrace]]:
    """Yield what correct float32 engines make of a model."""
    import numba

    rng = np.random.default_rng(seed)
    fast = loud_model(config, seed=seed, dtype=storage, backend="fast")
    numpy = loud_model(config, seed=seed, dtype=storage)
    chunk = int(rng.integers(1, _PREFILL))
    yield f"fast, chunks of {chunk}", run_trace(fast, tokens, prefill=_PREFILL, chunk=chunk)
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield "fast, one thread", run_trace(fast, tokens, prefill=_PREFILL)
    finally:
        numba.set_num_threads(threads)
    yield f"numpy, chunks of {chunk}", run_trace(numpy, tokens, prefill=_PREFILL, chunk=chunk)
    shuffled = Rerun.of(numpy, tuple(tokens), _PREFILL).with_ops(**shuffled_sums(seed))
    yield "numpy, shuffled sums", play(shuffled, "float32")


def note(
    found: Found, kind: str, what: str, candidate: MemoryTrace, reference: MemoryTrace, truth: MemoryTrace
) -> None:
    """Compare with and without the truth, and keep the largest ratios: of any token, and of a typical one."""
    for floor, exact in (("measured", truth), ("estimated", None)):
        if candidate.dtype == "int8" and exact is None:
            continue
        report = compare(candidate, reference, exact)
        for token, ratio in (("worst", _ratio), ("typical", _typical)):
            row = max(report.rows, key=ratio)
            label = f"{what}: {row.name}@{row.step}; {report.verdict} first at {report.first_divergence}@{report.step}"
            found.setdefault((kind, floor, token, candidate.dtype), []).append((ratio(row), label))


def _ratio(row: TapRow) -> float:
    return row.ratio or 0.0


def _typical(row: TapRow) -> float:
    return row.typical or 0.0


def experiment(seed: int, planted: bool, found: Found) -> None:
    """Run one random model in every way."""
    config = random_config(np.random.default_rng(seed))
    tokens = loud_tokens(config, _PREFILL + _DECODE, seed).tolist()
    storage = ("float32", "bfloat16")[seed % 2]
    truth = run_trace(loud_model(config, seed=seed, dtype=storage, backend="float64"), tokens, prefill=_PREFILL)
    plain = loud_model(config, seed=seed, dtype=storage)
    run = Rerun.of(plain, tuple(tokens), _PREFILL)
    references = {dtype: play(run, dtype) for dtype in ("float32", "bfloat16", "int8")}
    for what, trace in clean_runs(config, seed, storage, tokens):
        note(found, "clean", f"seed {seed}, {what}", trace, references["float32"], truth)
    shuffled = run.with_ops(**shuffled_sums(seed))
    for what, exact in (("shuffled sums", frozenset[str]()), ("fused roundings", _FUSED)):
        trace = play(shuffled, "bfloat16", exact)
        note(found, "clean", f"seed {seed}, {what}", trace, references["bfloat16"], truth)
    note(found, "clean", f"seed {seed}, shuffled sums", play(shuffled, "int8"), references["int8"], truth)
    ways = [(mistake.name, way) for mistake in DICTIONARY for way in mistake.ways] if planted else []
    for name, way in ways:
        wrong = way.plant(shuffled)
        # Other tokens are a difference without any arithmetic.
        if wrong is not None and wrong.tokens == run.tokens:
            for dtype, reference in references.items():
                trace = play(wrong, dtype)
                note(found, "planted", f"seed {seed}, {name} {way.label}", trace, reference, truth)


def main() -> int:
    """Run the experiment and print both distributions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="random models (default: 20)")
    parser.add_argument("--planted", type=int, default=2, help="how many of them get every mistake (default: 2)")
    options = parser.parse_args()
    found: Found = {}
    for seed in range(options.seeds):
        experiment(seed, seed < options.planted, found)
        print(f"\r{seed + 1} of {options.seeds} models", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for (kind, floor, token, dtype), ratios in sorted(found.items()):
        values = np.array([ratio for ratio, _ in ratios])
        quantiles = "  ".join(f"{name} {np.quantile(values, q):.3g}" for name, q in
                              (("least", 0), ("1 %", 0.01), ("median", 0.5), ("99 %", 0.99), ("most", 1)))  # fmt: skip
        print(f"{kind}, floor {floor}, {token} token, {dtype}: {len(values)} runs\n    {quantiles}")
        extreme = sorted(ratios, reverse=kind == "clean")[:8]
        print("".join(f"    {ratio:10.3g}  {what}\n" for ratio, what in extreme), end="")
    for dtype in ("float32", "bfloat16", "int8"):
        for measured in (True, False) if dtype != "int8" else (True,):
            print(f"{dtype}, {'measured' if measured else 'estimated'}: {limits(dtype, measured=measured)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
