"""`python -m oracle check`: the engine's every tensor against torch's.

Besides `oracle.__main__`, this is the one module of the package that knows the engine, because it has to run it: by
its public name (`npllama.load`) and through `npllama.check`. No arithmetic of the engine's reaches what it is judged
by. The reference is the oracle; the truth that both are measured against is the oracle in float64, not the engine's
own float64 backend: a mistake in the textbook operations would be in both the engine and that, and pass. (On sound
operations the two agree to the last digits of float64; the tests hold them to it.) Only the search for a known mistake
behind a difference works on the engine's float64 backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import npllama
from npllama.check.compare import compare
from npllama.check.diagnose import Diagnosis, diagnose
from npllama.check.report import Report
from npllama.check.run import run_trace, shadow_run
from npllama.check.trace import MemoryTrace
from npllama.checkpoint.store import Store
from npllama.errors import ParameterError
from oracle.decoder import TorchDecoder
from oracle.run import check_run, record

#: Taps that each backend may leave out, because a kernel computes through them. Any other that is missing is a fault.
FUSED = {"fast": frozenset({"scores", "probs"}), "numpy": frozenset[str]()}

_SHARED = (
    "The engine's own float64 backend makes the same mistake, so it is in what all backends share: "
    "npllama/ops.py, npllama/model.py, or how the weights were read."
)


def check(
    store: Store,
    tokens: Sequence[int],
    *,
    decode: int = 0,
    backend: str = "fast",
    threads: int | None = None,
    dtype: str | None = None,
    activations: str = "float32",
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Run engine and oracle over the same tokens and judge the engine.

    Parameters
    ----------
    store : Store
        The model.
    tokens : sequence of int
        Ids of the prompt.
    decode : int
        Steps behind it, each with the oracle's most probable token.
    backend : {"fast", "numpy"}
        Of the engine.
    threads : int, optional
        Of the engine.
    dtype : {"float32", "bfloat16"}, optional
        What the reference computes in, and so whose noise the engine is allowed; by default what the engine rounds to.
        The engine itself computes in float32: with bfloat16 the report shows how it stands to a run as Meta's.
    activations : {"float32", "bfloat16", "int8"}
        What the engine rounds the inputs of its products to; see `npllama.load`. A reference in bfloat16 rounds those
        and more. One in int8 rounds exactly those, exactly so; so the engine keeps keys and values in float32 then.
    say : callable
        Told what is being done.

    Returns
    -------
    Report
        With the error of each operation alone, on the reference's inputs; where the engine differs, also with the
        known mistake that would explain it.

    Raises
    ------
    NpllamaError
        The tokens do not fit the model, the engine cannot run it, or it would round and the reference would not.

    Notes
    -----
    All tensors of the three runs are in memory at once, but only one layer of the oracle's weights.
    """
    prefill = len(tokens)
    dtype = dtype or activations
    if activations != "float32" and dtype != activations:
        raise ParameterError(
            f"the engine was asked to round activations to {activations}, and the reference to compute in {dtype}",
            remedy="Leave --dtype away: what is rounded is allowed the noise of a run that rounds alike.",
        )
    check_run(store.config, tokens, prefill, decode)
    say(f"torch in {dtype}: {prefill} tokens and {decode} decode steps")
    reference = _recorded(store, tokens, prefill, dtype, greedy=decode)
    fed = reference.tokens
    say("torch in float64, the truth")
    truth = _recorded(store, fed, prefill, "float64")
    say(f"the {backend} engine, then each of its operations alone on torch's inputs")
    cache_dtype = (
        "bfloat16" if activations == "bfloat16" else "float32"
    )  # int8 is the reference's way with weights only
    model = npllama.load(store.path, backend=backend, threads=threads, activations=activations, cache_dtype=cache_dtype)
    candidate = MemoryTrace(tokens=fed, prefill=prefill, dtype=dtype, config=store.config)
    run_trace(model, fed, prefill=prefill, into=candidate)
    report = compare(candidate, reference, truth, local=shadow_run(model, reference))
    report = _with_lost_taps(report, FUSED[backend])
    if dtype != "float32":
        how = "in float32" if activations == "float32" else f"with products of {activations}"
        alone = ""
        if dtype == "int8":
            alone = "; each of its operations alone, on torch's inputs, that of float32; it cached in float32"
        notes = (*report.notes, f"the engine computed {how} and was allowed the noise of {dtype}{alone}")
        report = replace(report, notes=notes)
    if report.verdict != "differs":
        return report
    say("which known mistake explains this?")
    found = diagnose(npllama.load(store.path, backend="float64"), candidate, reference)
    return report.diagnosed(found.name, _sentence(found), found.margin)


def _recorded(store: Store, tokens: Sequence[int], prefill: int, dtype: str, greedy: int = 0) -> MemoryTrace:
    trace = MemoryTrace(
        tokens=tokens, prefill=prefill, dtype=dtype, producer=TorchDecoder.producer, config=store.config
    )
    record(TorchDecoder(store, dtype), tokens, trace, prefill=prefill, greedy=greedy)
    return trace


def _with_lost_taps(report: Report, fused: frozenset[str]) -> Report:
    """Count a tap as a difference that the engine should have shown and did not."""
    lost = [label for label in report.missing if label.partition("@")[0].rpartition(".")[2] not in fused]
    if not lost or report.verdict == "differs":
        return report
    name, _, step = lost[0].partition("@")
    reason = f"The engine shows no {name}, and {len(lost) - 1} other tensors are missing that its backend should show."
    return replace(report, verdict="differs", first_divergence=name, step=int(step or 0), reason=reason)


def _sentence(found: Diagnosis) -> str:
    """Return the diagnosis for a person; what the float64 backend reproduces is no mistake of one backend."""
    shared = any(guess.mistake is None and guess.explains for guess in found.ranking)
    return _SHARED if shared else found.sentence
