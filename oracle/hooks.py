"""Taps on somebody else's torch modules: forward hooks, by a table of places."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch

from npllama.config import ModelConfig
from npllama.taps import spec_of, tap_names

#: ``see(name, x)`` for a tensor in the shape of its tap, rows as the module has them.
See = Callable[[str, torch.Tensor], None]


def attach(root: torch.nn.Module, table: str, config: ModelConfig, see: See) -> None:
    """Put hooks on a model, as a table says.

    Parameters
    ----------
    root : torch.nn.Module
    table : str
        A line for each place: path of a submodule of ``root``, ``in`` or ``out``, and the tap that its first input or
        its output is; with ``|`` between them the taps that stand side by side in it. ``{i}`` is each layer in turn.
        Lines whose taps the model does not have are passed over.
    config : ModelConfig
        Of the model: gives the taps and their shapes.
    see : callable
        Gets each tensor under the tap's full name, without the batch axis.
    """
    known = frozenset(tap_names(config))
    for path, side, taps in filter(None, map(str.split, table.splitlines())):
        for i in range(config.n_layers if "{i}" in path else 1):
            names = taps.format(i=i).split("|")
            if known.issuperset(names):
                _hook(root.get_submodule(path.format(i=i)), side, names, config, see)


def _hook(module: torch.nn.Module, side: str, names: list[str], config: ModelConfig, see: See) -> None:
    axes = [spec_of(name).axes for name in names]

    def show(x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x
        if axes[0][0] != "T":  # what has a row for each query in every head
            see(names[0], x[0])
            return
        shapes = [[config.axes[axis] for axis in each[1:]] for each in axes]
        widths = [prod(shape) for shape in shapes]
        rows = x.reshape(-1, sum(widths))
        for name, shape, part in zip(names, shapes, rows.split(widths, -1), strict=True):
            see(name, part.unflatten(-1, shape))

    if side == "in":
        module.register_forward_pre_hook(lambda _, inputs: show(inputs))
    else:
        module.register_forward_hook(lambda _, __, output: show(output))
