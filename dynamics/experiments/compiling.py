"""A model compiled for the training steps: the same model, by faster code."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import first_line


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as ``torch.compile`` runs it, with the same parameters; what calls ``model`` itself still runs eagerly.

    Each size of a batch is compiled by itself, at its first step: a pass has two, for its last batch may be smaller.
    Pruning by masks compiles nothing again.

    Raises:
        ValueError: torch cannot compile on this machine, for example for lack of a compiler: tried here, on one number.
    """
    try:
        torch.compile(lambda number: 2 * number)(torch.zeros(1, device=device))
    except Exception as error:
        raise ValueError(
            f"torch cannot compile here: {first_line(error)}; install a C++ compiler such as g++, or leave compile off"
        ) from error
    return torch.compile(model, dynamic=False)
