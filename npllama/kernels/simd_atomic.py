"""Single instructions by which threads tell one another how far they are, for use inside kernels.

Arrays are of int64 and C-contiguous, and positions in them are flat. What a thread wrote before it added to a counter
is there for whoever has seen the sum.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from npllama.kernels.llvm import call, intrinsic

#: Elements from one counter to the next: none shares its cache lines with another.
APART = 16


def _element(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@intrinsic
def fetch_add(context: Any, array: Any, index: Any, number: Any) -> Any:
    """``fetch_add(array, index, number)``: add to an element; return what it was before. LOCK XADD."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _element(context, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", place, arguments[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), code


@intrinsic
def load_acquire(context: Any, array: Any, index: Any) -> Any:
    """``load_acquire(array, index)``: an element as it is now; nothing is read before it. MOV."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _element(context, builder, signature.args[0], *arguments)
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(array, types.int64), code


@intrinsic
def pause(context: Any) -> Any:
    """``pause()``: let the processor's other work go first, while waiting in a loop. PAUSE."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), code
