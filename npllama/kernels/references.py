"""What a function that counts no references must not do, looked at as it is compiled.

Whoever makes an array counts the references to it, and so does whoever gets it: the last one gives it back. A function
that counts none (``counted=False`` of `npllama.kernels.jit.compiled`) may look at the arrays of its arguments. If it
got an array from one that counts, nobody would give that back; if it returned one, whoever counts would give it back
while it is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numba import types
from numba.core import errors
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, register_pass
from numba.core.typed_passes import NoPythonSupportedFeatureValidation


def check_references(state: Any) -> None:
    """Raise Numba's TypingError if a function that counts no references, typed but not compiled yet, breaks a rule."""
    if state.flags.nrt:
        return
    if _holds_arrays(state, state.return_type):
        raise errors.TypingError(f"{_named(state)} counts no references, but returns {state.return_type}")
    for function, result in _calls(state):
        if function.targetoptions.get("_nrt", True) and _holds_arrays(state, result):
            named = f"{_named(state)} counts no references, but calls {function.py_func.__name__}, which does"
            raise errors.TypingError(f"{named}, for {result}")


def _calls(state: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the compiled functions that are called, and the type of what each call returns."""
    for block in state.func_ir.blocks.values():
        for call in block.find_exprs(op="call"):
            callee = state.typemap[call.func.name]
            if isinstance(callee, types.Dispatcher):
                yield callee.dispatcher, state.calltypes[call].return_type


def _holds_arrays(state: Any, kind: Any) -> bool:
    return bool(state.targetctx.data_model_manager[kind].contains_nrt_meminfo())


def _named(state: Any) -> str:
    return str(state.func_id.func_name)


@register_pass(mutates_CFG=False, analysis_only=True)  # type: ignore[no-untyped-call]
class _Check(FunctionPass):
    """`check_references`, as a pass of Numba's."""

    _name = "check_references"

    def __init__(self) -> None:
        FunctionPass.__init__(self)  # type: ignore[no-untyped-call]

    def run_pass(self, state: Any) -> bool:
        check_references(state)
        return False


class Compiler(CompilerBase):
    """Numba's passes, and before code is made `check_references`."""

    def define_pipelines(self) -> list[Any]:
        """Return them as the only way to compile a function."""
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)  # type: ignore[no-untyped-call]
        passes.add_pass_after(_Check, NoPythonSupportedFeatureValidation)
        passes.finalize()
        return [passes]
