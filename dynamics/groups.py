"""What the optimizers say of each parameter: whether it is theirs, its learning rate, flow time and weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocks import Vector
from .layers import Layers


class Groups:
    """The parameter groups of one or more optimizers, by parameter and by layer; looked up again when they change."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], layers: Layers) -> None:
        self._optimizers, self._layers = optimizers, layers
        self._of: tuple | None = None
        self._decays: list[float] = []
        self._decay = torch.empty(0)

    def refresh(self) -> None:
        """Look up which group each parameter is in, if a group or the model changed."""
        now = (self._layers.version, *(len(group["params"]) for _, group in self._all()))
        if now == self._of:
            return
        self._of = now
        group_of = {id(p): number for number, (_, group) in enumerate(self._all()) for p in group["params"]}
        self._group_of = [group_of.get(id(parameter), -1) for parameter in self._layers.parameters]
        owner = [owner for owner, _ in self._all()]
        self._held = [
            [index for index, group in enumerate(self._group_of) if group >= 0 and owner[group] == number]
            for number in range(len(self._optimizers))
        ]
        trained = zip(self._layers.layer_of_parameter, self._group_of, self._layers.parameters, strict=True)
        pairs = {(layer, group) for layer, group, parameter in trained if group >= 0 and parameter.requires_grad}
        self._groups_in = [[group for owner, group in pairs if owner == layer] for layer in range(len(self._layers))]

    def _all(self) -> list[tuple[int, dict[str, Any]]]:
        """Each group with the number of its optimizer."""
        return [(number, group) for number, one in enumerate(self._optimizers) for group in one.param_groups]

    def gradient(self, number: int, into: Vector) -> None:
        """Copy g of the parameters that an optimizer holds as it will apply it, without a gradient scaler's factor."""
        held = self._held[number]
        into.take([self._layers.parameters[index].grad for index in held], among=held)
        scale = getattr(self._optimizers[number], "grad_scale", None)  # set during a fused step only
        if scale is not None:
            torch._foreach_div_([into.views[index] for index in held], scale)

    def learning_rate(self) -> np.ndarray:
        """η of each layer, (layer,): 0 where nothing is trained, NaN where a layer's parameters differ in it."""
        return self._by_layer([float(group["lr"]) for _, group in self._all()])

    def flow_step(self) -> np.ndarray:
        """Flow time of a step in each layer, (layer,), as :meth:`learning_rate`."""
        return self._by_layer([_flow_step(group) for _, group in self._all()])

    def _by_layer(self, values: list[float]) -> np.ndarray:
        found = [{values[group] for group in groups} for groups in self._groups_in]
        return np.array([0.0 if not rates else rates.pop() if len(rates) == 1 else np.nan for rates in found])

    def first_flow_step(self) -> float:
        """Flow time of a step in the first group."""
        return _flow_step(self._optimizers[0].param_groups[0])

    def decay(self) -> Tensor:
        """Weight decay λ of each block, (block,); 0 for what no optimizer holds. Sent to the device when it changes."""
        decays = [float(group.get("weight_decay") or 0.0) for _, group in self._all()]
        if [self._of, *decays] != self._decays:
            self._decays = [self._of, *decays]
            self._decay = self._layers.per_block([decays[group] if group >= 0 else 0.0 for group in self._group_of])
        return self._decay


def _flow_step(group: Mapping[str, Any]) -> float:
    """Flow time of a step: η, and with SGD's momentum β its long-run sum η(1−dampening)/(1−β)."""
    momentum = float(group.get("momentum") or 0.0)
    rate = float(group["lr"])
    return rate * (1 - float(group.get("dampening") or 0.0)) / (1 - momentum) if 0 < momentum < 1 else rate
