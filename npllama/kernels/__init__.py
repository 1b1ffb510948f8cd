"""The twins of `npllama.ops`: the same names and signatures, compiled with Numba.

An operation that is not here runs as it stands in the textbook. The names in this module are the kernels for the
processor at hand; `npllama.kernels.paths` gives those of a chosen path.
"""

from npllama.kernels.activation import activate, add, glu
from npllama.kernels.attend import UNMATERIALISED, attention, attentions, softmax
from npllama.kernels.experts import expert_linear
from npllama.kernels.matmul import gated_linears, linear, linears
from npllama.kernels.norm import layer_norm, rms_norm
from npllama.kernels.rope import apply_rope
from npllama.kernels.through_layers import through_layers

__all__ = [
    "UNMATERIALISED",
    "activate",
    "add",
    "apply_rope",
    "attention",
    "attentions",
    "expert_linear",
    "gated_linears",
    "glu",
    "layer_norm",
    "linear",
    "linears",
    "rms_norm",
    "softmax",
    "through_layers",
]
