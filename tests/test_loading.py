"""Where store, operations and tokenizer become a model."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import npllama
from npllama.errors import BackendError, ConfigMismatchError, FileAccessError, NpllamaError, ParameterError
from tests.fixtures.engine import loud_model
from tests.fixtures.loud import loud_config, loud_tensors, loud_tokens, write_gguf, write_hf
from tools.environment import ROOT

CONFIG = loud_config()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    return npllama.convert(
        write_gguf(folder / "loud.gguf", loud_tensors(CONFIG), CONFIG), folder / "store", dtype="f32"
    )


@pytest.mark.parametrize("backend", ["fast", "numpy", "float64"])
def test_a_loaded_model_computes_what_the_same_weights_in_memory_do(store: Path, backend: str) -> None:
    model = npllama.load(store, backend=backend)
    tokens = loud_tokens(CONFIG)
    np.testing.assert_array_equal(model.forward(tokens), loud_model(model.config, backend=backend).forward(tokens))
    assert model.backend == backend
    assert model.tokenizer is None
    assert model.notice is None


def test_weights_are_memory_maps_and_cannot_be_written(store: Path) -> None:
    model = npllama.load(store, backend="numpy")
    for tensor in (model.weights.tok_embeddings, model.weights.layers[0].w1, model.weights.norm):
        base: object = tensor.data
        while isinstance(base, np.ndarray | memoryview):
            base = base.base if isinstance(base, np.ndarray) else base.obj
        assert isinstance(base, mmap.mmap)
        assert not tensor.data.flags.writeable


def test_an_unknown_backend_names_the_known_ones(store: Path) -> None:
    with pytest.raises(ParameterError, match=r"'gpu', expected one of fast, numpy, float64"):
        npllama.load(store, backend="gpu")


@pytest.mark.parametrize("backend", ["fast", "numpy"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"cache_dtype": "bfloat16"}, "bfloat16"),
        ({"activations": "int8"}, "bfloat16"),
        ({"activations": "bfloat16", "cache_dtype": "float32"}, "float32"),
    ],
)
def test_caches_are_of_the_dtype_that_was_asked_for_and_else_as_exact_as_activations(
    store: Path, backend: str, options: dict[str, str], dtype: str
) -> None:
    model = npllama.load(store, backend=backend, **options)
    cache = model.new_cache(4)
    assert cache.dtype == model.cache_dtype == dtype
    model.forward([1, 2], cache)
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    assert cache.nbytes == 2 * CONFIG.n_layers * 4 * CONFIG.n_kv_heads * CONFIG.head_dim * itemsize


def test_an_unknown_cache_dtype_names_the_known_ones(store: Path) -> None:
    with pytest.raises(ParameterError, match=r"'int4', expected one of float32, bfloat16"):
        npllama.load(store, backend="numpy", cache_dtype="int4")


def test_what_a_cache_needs_is_compiled_by_loading(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npllama.kernels import warmup

    asked: list[warmup.Needs] = []
    monkeypatch.setattr(warmup, "compile_kernels", lambda needs, progress: asked.append(needs))
    npllama.load(store, cache_dtype="bfloat16")
    npllama.load(store)
    assert [needs.cache_dtype for needs in asked] == ["bfloat16", "float32"]


def test_a_model_that_is_not_prepared_compiles_when_it_is_told_to(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from npllama.kernels import warmup

    asked: list[object] = []
    monkeypatch.setattr(warmup, "compile_kernels", lambda needs, progress: asked.append(progress))
    model = npllama.load(store, prepare=False)
    assert asked == []
    model.prepare(print)
    model.prepare()
    assert asked == [print]
    npllama.load(store, backend="numpy").prepare()
    assert asked == [print]


def test_a_model_that_nobody_prepared_compiles_before_its_first_tokens(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npllama.kernels import warmup

    asked: list[object] = []
    monkeypatch.setattr(warmup, "compile_kernels", lambda needs, progress: asked.append(progress))
    model = npllama.load(store, prepare=False)
    with pytest.raises(ParameterError):
        model.forward([])
    assert asked == []
    model.forward([1])
    model.forward_many([[1]], [model.new_cache(1)])
    assert asked == [None]


#: A program that loads a store and prints which kernels few or many tokens had to compile then.
FORGOTTEN = """
import sys
from collections import Counter
import npllama
from numba.core.registry import CPUDispatcher

def compiled():
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("npllama.kernels")]
    kernels = {id(k): k for names in modules for k in names.values() if isinstance(k, CPUDispatcher)}
    return Counter({f"{k.py_func.__module__}.{k.py_func.__name__}": len(k.overloads) for k in kernels.values()})

model = npllama.load(sys.argv[1], activations=sys.argv[2])
before = compiled()
assert before["npllama.kernels.attend._attend"] == 1, before
for count in (1, 2, 5, 9, 20, 70):
    cache = model.new_cache(100)
    model.forward([1] * count, cache), model.forward([2], cache)
model.forward_many([[1] * 40, [4], [5, 6]], [model.new_cache(50) for _ in range(3)])
print(*(compiled() - before))
"""


@pytest.mark.parametrize(
    ("dtype", "activations"), [("f32", "float32"), ("bf16", "bfloat16"), ("int8", "float32"), ("int4", "int8")]
)
def test_loading_compiles_all_that_tokens_need_few_or_many(dtype: str, activations: str, tmp_path: Path) -> None:
    """In a process of its own: here another test may have called a kernel that loading forgets."""
    source = write_gguf(tmp_path / "loud.gguf", loud_tensors(CONFIG), CONFIG)
    store = npllama.convert(source, tmp_path / "store", dtype=dtype)
    command = [sys.executable, "-c", FORGOTTEN, str(store), activations]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split() == []


def test_the_fast_backend_without_numba_says_which_one_runs(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("npllama.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(npllama, "kernels", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(BackendError, match=r"needs Numba.* choose the numpy backend"):
        npllama.load(store)
    assert npllama.load(store, backend="numpy").forward([1]).shape == (1, CONFIG.vocab_size)


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_a_number_of_threads_that_cannot_be_had_is_refused(store: Path, threads: int) -> None:
    with pytest.raises(ParameterError, match=rf"{threads} threads were asked for; this process may use 1 to"):
        npllama.load(store, threads=threads)


def test_threads_go_to_whoever_does_the_work_numba_or_blas(store: Path) -> None:
    import numba
    import threadpoolctl

    def blas() -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    before, most = numba.get_num_threads(), npllama.load(store, backend="numpy").threads
    try:
        assert blas() == {most}
        assert npllama.load(store, threads=most).threads == numba.get_num_threads() == most
        assert blas() == {1}
        assert npllama.load(store, threads=1).threads == numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)


def test_compiling_reports_its_progress(store: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    npllama.load(store, progress=lambda *step: seen.append(step))
    assert seen[0] == ("compiling kernels", 0, seen[-1][2])
    assert seen[-1][1] == seen[-1][2]


def test_a_folder_that_is_no_store_is_one_typed_error(tmp_path: Path) -> None:
    with pytest.raises(NpllamaError):
        npllama.load(tmp_path)
    with pytest.raises(FileAccessError):
        npllama.load(tmp_path / "missing")


def test_own_special_tokens_need_rows_in_the_embedding(store: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    small = loud_config(vocab_size=258)
    folder = write_hf(tmp_path / "hf", loud_tensors(small), small)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    byte_level.save(str(folder / "tokenizer.json"))
    path = npllama.convert(folder, tmp_path / "store")
    model = npllama.load(path, backend="numpy", special_tokens=["<|a|>", "<|b|>"])
    assert model.tokenizer is not None
    assert model.tokenizer.encode("<|b|>", allow_special=True) == [257]
    with pytest.raises(ConfigMismatchError, match=r"259 ids \(3 of them own special tokens\).* 258 rows"):
        npllama.load(path, backend="numpy", special_tokens=["<|a|>", "<|b|>", "<|c|>"])


@pytest.mark.real
def test_a_tokenizer_comes_out_of_a_gguf_or_the_store_made_of_it_alike(smollm2_gguf: Path, tmp_path: Path) -> None:
    store = npllama.convert(smollm2_gguf, tmp_path / "store", layers=1)
    text = "Hello, wörld! 123\n<|im_start|>"
    ids = npllama.Tokenizer.from_path(smollm2_gguf).encode(text)
    assert ids == npllama.Tokenizer.from_path(store).encode(text)
    assert npllama.Tokenizer.from_path(store / "tokenizer" / "tokenizer.json").decode(ids) == text
