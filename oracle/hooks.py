"""Taps on somebody else's torch modules: forward hooks, by a table of places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npllama.taps import spec_of

#: ``see(name, x)`` for a tensor in the shape of its tap, rows as the module has them.
See = Callable[[str, torch.Tensor], None]


def attach(layers: Any, table: str, see: See, head_dim: int) -> None:
    """Put hooks on every layer, as a table says.

    Parameters
    ----------
    layers : sequence of torch.nn.Module
        The decoder layers.
    table : str
        A line for each tap: path of a submodule (``.`` is the layer itself), ``in`` or ``out``, tap without its layer.
    see : callable
        Gets each tensor under the tap's full name.
    head_dim : int
        Dh.
    """
    for i, layer in enumerate(layers):
        for line in table.strip().splitlines():
            path, side, tap = line.split()
            module = layer if path == "." else layer.get_submodule(path)
            hook(module, side, f"layers.{i}.{tap}", see, head_dim)


def hook(module: torch.nn.Module, side: str, name: str, see: See, head_dim: int) -> None:
    """Show the first input or the output of a module, without its batch axis, as a tap."""

    def on_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        see(name, _shaped(name, inputs[0], head_dim))

    def on_output(_: torch.nn.Module, __: Any, output: Any) -> None:
        see(name, _shaped(name, output[0] if isinstance(output, tuple) else output, head_dim))

    if side == "in":
        module.register_forward_pre_hook(on_input)
    else:
        module.register_forward_hook(on_output)


def _shaped(name: str, x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Take the batch axis away, and split (T, H*Dh) into heads where the tap has them."""
    x = x[0]
    return x.unflatten(-1, (-1, head_dim)) if spec_of(name).axes[-1] == "Dh" else x
