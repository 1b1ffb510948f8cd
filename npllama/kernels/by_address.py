"""Calls of compiled functions by their addresses, for use inside kernels.

Numba hands the code of a function to whoever calls it, and optimises it there anew: in a parallel loop three times. A
large function that is called by its address is compiled once.
"""

from __future__ import annotations

from typing import Any

import numba
from numba import types
from numba.core import cgutils

from npllama.kernels.llvm import intrinsic

_typeof: Any = numba.typeof
_if_unlikely: Any = cgutils.if_unlikely


def address_of(function: Any, *arguments: Any) -> int:
    """Return where the code of a compiled function is for arguments of these types; compile it if need be.

    Whoever calls it there must bring arguments of these very types: nothing checks them.
    """
    result = function.get_compile_result(types.void(*map(_typeof, arguments)))
    address: int = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
    return address


@intrinsic
def call_at(context: Any, address: Any, arguments: Any) -> Any:
    """``call_at(address, arguments)``: call what `address_of` found for such arguments, which returns nothing."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        convention = context.call_conv
        kind = convention.get_function_type(types.none, arguments.types)
        pointer = builder.inttoptr(values[0], kind.as_pointer())
        each = [builder.extract_value(values[1], i) for i in range(len(arguments.types))]
        status, _ = convention.call_function(builder, pointer, types.none, arguments.types, each)
        with _if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), code
