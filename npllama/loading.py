"""Where the parts meet: a store, a set of operations and a tokenizer become a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from npllama import ops
from npllama.cache import check_dtype
from npllama.checkpoint.store import Store
from npllama.engine import Model, Progress
from npllama.errors import BackendError, ParameterError
from npllama.rounding import ACTIVATIONS, with_rounded_inputs
from npllama.text import tokenizer as text
from npllama.weights import gather_weights

BACKENDS = ("fast", "numpy", "float64")


def load(
    path: str | os.PathLike[str],
    *,
    backend: str = "fast",
    threads: int | None = None,
    kernels: str | None = None,
    activations: str = "float32",
    cache_dtype: str | None = None,
    special_tokens: Sequence[str] = (),
    prepare: bool = True,
    progress: Progress | None = None,
) -> Model:
    """Open a converted model.

    Parameters
    ----------
    path : path-like
        Folder that `npllama.convert` wrote.
    backend : {"fast", "numpy", "float64"}
        Compiled kernels; the textbook in float32, without Numba; or the textbook in float64, the truth.
    threads : int, optional
        Threads that the kernels, or without them BLAS, may use; by default one for each core of this process.
    kernels : {"amx", "avx512bf16", "avx512", "avx2", "portable"}, optional
        Instructions that the fast backend may use; by default the best that the processor has.
    activations : {"float32", "bfloat16", "int8"}
        What the input of every product with weights is rounded to, see `npllama.rounding`. float32 is exact. bfloat16,
        which is what other engines compute in, makes long prompts about twice as fast where the processor has a unit
        for it. Where that is a matrix unit, integer weights are then rounded to bfloat16, too, if more than 16 tokens
        meet them. int8, in groups of 64, is what other engines multiply integer weights by: two to three times as fast
        with AVX-512, 1.2 to 1.7 times with AVX2. It costs more, and leaves all weights as they are.
    cache_dtype : {"float32", "bfloat16"}, optional
        How the model's caches keep keys and values, and what attention multiplies in. bfloat16 takes half the memory,
        and a long text goes faster. By default that is for activations that are rounded, and float32 for others. A
        `npllama.KVCache` of your own may differ; what it needs is then compiled when it is first used.
    special_tokens : sequence of str
        Your own special tokens, appended after the vocabulary; the embedding must have rows for them.
    prepare : bool
        Compile what the model needs, which takes half a minute the first time. Otherwise `Model.prepare` does so, or
        the first forward pass.
    progress : callable, optional
        Called as ``progress(what, done, total)`` while kernels are compiled for the first time.

    Returns
    -------
    Model
        Its weights are memory maps: nothing is copied, and pages are read when they are first used.

    Raises
    ------
    NpllamaError
        The folder is not a complete store, the backend is unknown or cannot run here, a dtype is none of those above,
        or the tokenizer does not fit.
    """
    if backend not in BACKENDS:
        raise ParameterError(f"the backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    store = Store.open(path)
    weights = gather_weights(store.config, store.find, *store.frequencies())
    if kernels is not None and backend != "fast":
        raise ParameterError(f"kernels were chosen ({kernels!r}), but the backend is {backend!r}, which has none")
    if activations not in ACTIVATIONS:
        raise ParameterError(f"the activations are {activations!r}, expected one of {', '.join(ACTIVATIONS)}")
    cache_dtype = cache_dtype or ("float32" if activations == "float32" else "bfloat16")
    check_dtype(cache_dtype)
    if activations != "float32" and backend == "float64":
        raise ParameterError(f"activations were rounded to {activations}, but the float64 backend is the truth")
    operations: Any = ops
    if backend == "fast":
        operations = _with_kernels(kernels, activations)
    elif activations != "float32":
        operations = with_rounded_inputs(ops, activations)
    count = _limit_threads(threads, backend)
    tokenizer = None
    if store.tokenizer_folder is not None:
        tokenizer = text.Tokenizer.from_path(store.tokenizer_folder, special_tokens=special_tokens)
        tokenizer.check_model_rows(store.config.vocab_size)
    model = Model(
        store.config,
        weights,
        operations,
        backend=backend,
        dtype=np.float64 if backend == "float64" else np.float32,
        threads=count,
        activations=activations,
        cache_dtype=cache_dtype,
        tokenizer=tokenizer,
        notice=_notice(store),
        prepare=(lambda progress: _compile(model, kernels, progress)) if backend == "fast" else None,
    )
    if backend == "fast":
        from npllama.kernels.memory import keep_freed_memory

        keep_freed_memory()
    if prepare:
        model.prepare(progress)
    return model


def _compile(model: Model, kernels: str | None, progress: Progress | None) -> None:
    """Compile the kernels of a path that a model needs."""
    from npllama.kernels.warmup import Needs, compile_kernels

    needs = Needs(
        model.weights.output.dtype,
        kernels,
        model.activations,
        model.cache_dtype,
        layer_norm=model.config.norm == "layer",
        gated=model.config.gated,
        at_once=model.runs_at_once,
    )
    compile_kernels(needs, progress)


def _notice(store: Store) -> str | None:
    truncated = store.manifest.get("truncated")
    if truncated is None:
        return None
    return (
        f"This store keeps the first {truncated['layers']} of {truncated['of']} layers: "
        "every tensor in them is exact, but the text is not meaningful."
    )


def _with_kernels(path: str | None, activations: str) -> SimpleNamespace:
    """Return the textbook's operations with every compiled twin in its original's place."""
    try:
        from npllama.kernels.paths import twins
    except ImportError as problem:
        raise BackendError(
            f"the fast backend needs Numba, which cannot be imported: {problem}",
            remedy="Install numba, or choose the numpy backend.",
        ) from None
    return SimpleNamespace(**{**vars(ops), **twins(path, activations)})


def _limit_threads(threads: int | None, backend: str) -> int:
    """Give the threads to whoever does the work, Numba or BLAS, and return their number.

    BLAS threads go on spinning for a while after a product. Beside kernels that are waiting for the processors they
    halve the speed, so BLAS has one thread where Numba has the others.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = physical_cores() if threads is None else threads
    if not 1 <= count <= available:
        raise ParameterError(f"{count} threads were asked for; this process may use 1 to {available}")
    import threadpoolctl

    threadpoolctl.threadpool_limits(1 if backend == "fast" else count, user_api="blas")
    if backend == "fast":
        from npllama.kernels.threads import use_threads

        use_threads(count)
    return count


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Count the cores that this process may use, two threads of one core as one."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in allowed)
    return len({file.read_text() if file.exists() else str(file) for file in siblings})


class Tokenizer(text.Tokenizer):
    """A tokenizer that opens whatever a model comes in.

    See `npllama.text.tokenizer.Tokenizer`; this one also reads the vocabulary inside a GGUF file, which is the
    business of `npllama.checkpoint`.
    """

    @classmethod
    def from_path(cls, path: str | os.PathLike[str], *, special_tokens: Sequence[str] = ()) -> text.Tokenizer:
        """Open a store, a folder with tokenizer files, ``tokenizer.model``, ``tokenizer.json`` or a ``.gguf``."""
        if Path(path).suffix != ".gguf":
            return super().from_path(path, special_tokens=special_tokens)
        from npllama.checkpoint.gguf import open_gguf, tokenizer_files

        name = os.fspath(path)
        file = open_gguf(name)
        file.source.close()  # the metadata has been read
        return cls.from_files(tokenizer_files(file.metadata, name), special_tokens=special_tokens, source=name)
