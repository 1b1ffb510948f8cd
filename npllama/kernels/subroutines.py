"""Subroutines: functions that nobody but kernels calls, compiled nowhere but in these.

Numba makes of each function that a kernel calls a program of its own: optimised, translated, with an entrance for
Python and files in the cache; then it goes into the kernel, and is optimised there once more. That was half of what a
first load took. A `subroutine` is only typed by itself; its code waits until a kernel is made of it. And where Numba
would paste a helper's source into every caller, to be typed there again, an inlined subroutine is typed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering

from npllama.kernels.jit import EXACT, OPTIONS
from npllama.kernels.references import Compiler

_Function = TypeVar("_Function", bound=Callable[..., Any])


def subroutine(
    *, inline: bool = False, pasted: bool = False, exact: bool = False, counted: bool = False
) -> Callable[[_Function], _Function]:
    """Decorate a function that only kernels call.

    Parameters
    ----------
    inline : bool
        Compile it for each literal number that it is called with, and leave no call of it: for a helper that must know
        them, or whose loop must see where its arrays lie.
    pasted : bool
        Paste its source into its callers: for one with branches that a global constant of the caller's closes, before
        types are looked at. It takes longest to compile.
    exact : bool
        See `npllama.kernels.jit.compiled`; callers must be as exact.
    counted : bool
        Count references to arrays, see there: for one that makes or returns some, or keeps what another one made.
    """

    def decorate(function: _Function) -> _Function:
        options = {**(EXACT if exact else OPTIONS), "nopython": True, "no_cpython_wrapper": True, "forceinline": inline}
        options["_nrt"] = counted
        if pasted:
            options["inline"] = "always"
        return cast(_Function, Subroutine(py_func=function, targetoptions=options, pipeline_class=_Compiler))

    return decorate


class Subroutine(CPUDispatcher):
    """What `subroutine` makes of a function."""

    def __call__(self, *arguments: Any) -> Any:
        """Raise a TypeError: there is nothing to be called from Python."""
        raise TypeError(f"{self.py_func.__name__} is a subroutine of kernels: only these can call it")

    def compile(self, sig: Any) -> Any:
        """Make its code for these types of arguments, if there is none yet."""
        return super().compile(sig if self.targetoptions["forceinline"] else tuple(map(types.unliteral, sig)))

    def add_overload(self, result: Any) -> None:
        """Keep code that was made. The base class would register its entrance, too."""
        self.overloads[tuple(result.signature.args)] = result


class _Code(JITCodeLibrary):
    """A subroutine's code: neither optimised nor translated before a kernel has it."""

    def _optimize_final_module(self) -> None:
        """Leave that to kernels."""

    def _finalize_final_module(self) -> None:
        """Take it as it is."""
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)  # type: ignore[no-untyped-call]
class _Lowering(NativeLowering):
    """Numba's own, but for the kind of code that it makes."""

    def run_pass(self, state: Any) -> bool:
        state.library = _Code(state.targetctx.codegen(), state.func_id.func_qualname)  # type: ignore[no-untyped-call]
        state.flags.no_compile = True
        super().run_pass(state)  # type: ignore[no-untyped-call]
        name = object()  # by which the code of callers finds it
        state["cr"] = state["cr"]._replace(cfunc=name)
        state.targetctx.insert_user_function(name, state["cr"].fndesc, [state.library])
        return True


class _Compiler(Compiler):
    """The same passes, with `_Lowering` for the last one."""

    def define_pipelines(self) -> list[Any]:
        """Return them as the only way to compile a subroutine."""
        (passes,) = super().define_pipelines()
        passes.passes = [(_Lowering if kind is NativeLowering else kind, told) for kind, told in passes.passes]
        passes.finalize()
        return [passes]
