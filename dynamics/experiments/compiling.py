"""A model compiled for the training steps: the same model, by faster code."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import first_line


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as ``torch.compile`` runs it, with the same parameters; calls of ``model`` itself still run eagerly.

    Each batch size is compiled separately, at its first step: a pass has two, because its last batch may be smaller.
    Pruning by masks causes no recompilation.

    Raises:
        ValueError: torch cannot compile on this machine, for example for lack of a compiler: tried here, on one number.
    """
    try:
        torch.compile(lambda number: 2 * number)(torch.zeros(1, device=device))
    except Exception as error:
        raise ValueError(
            f"torch cannot compile here: {first_line(error)}; install a C++ compiler such as g++, or leave compile off"
        ) from error
    return torch.compile(model, dynamic=False)  # type: ignore[return-value]  # a module, of a module
