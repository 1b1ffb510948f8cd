"""The references by name: the oracle itself, and the third opinions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from npllama.errors import BackendError
from oracle.decoder import TorchDecoder
from oracle.run import Reference
from oracle.weights import Source


def _oracle(source: Source, dtype: str, capacity: int) -> AbstractContextManager[Reference]:
    return nullcontext(TorchDecoder(source, dtype))


def _transformers(source: Source, dtype: str, capacity: int) -> AbstractContextManager[Reference]:
    try:
        from oracle.transformers_reference import TransformersModel
    except ImportError as problem:
        raise BackendError(
            f"transformers cannot be imported: {problem}", remedy="Install it with `pip install transformers`."
        ) from None
    return nullcontext(TransformersModel(source, dtype))


@contextlib.contextmanager
def _meta(source: Source, dtype: str, capacity: int) -> Iterator[Reference]:
    from oracle.meta_reference import MetaLlama, single_process

    with single_process():
        yield MetaLlama(source, dtype, capacity=capacity)


#: Name -> what opens the reference for a source, a dtype and the number of positions that it will see.
REFERENCES: dict[str, Callable[[Source, str, int], AbstractContextManager[Reference]]] = {
    "oracle": _oracle,
    "transformers": _transformers,
    "meta": _meta,
}
