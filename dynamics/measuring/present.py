"""What a model is at one moment, which tells at which step of a record it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Present:
    """The model as it is now: names of its layers, ‖θ‖² of each, (layer,), and the rounding error of its data type.

    ``first`` is the layer of the first group's first parameter, ``flow_step`` the flow time of a step in that group;
    ``remaining`` counts the parameters of each layer that are not pruned, (layer,).
    """

    layers: list[str]
    sqnorm: np.ndarray
    rounding: float
    first: int
    flow_step: float
    remaining: np.ndarray
