"""The twins of `npllama.ops`: the same names and signatures, compiled with Numba.

An operation that is not here runs as it stands in the textbook.
"""

from npllama.kernels.activation import swiglu
from npllama.kernels.attend import UNMATERIALISED, attention, softmax
from npllama.kernels.matmul import linear, linears
from npllama.kernels.norm import rms_norm
from npllama.kernels.rope import apply_rope

__all__ = ["UNMATERIALISED", "apply_rope", "attention", "linear", "linears", "rms_norm", "softmax", "swiglu"]
