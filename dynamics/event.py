"""An event in a training, such as a pruning: what it did to loss, gradient and curvature, measured before and after."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import schema
from .curvature import Expansion
from .layers import Layers
from .quantities import Vectors, minus


class Event:
    """What the body of ``with recorder.event(...) as event`` may add to the record."""

    def __init__(self) -> None:
        self.alive: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}

    def units(self, *, alive: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> None:
        """Record which units (filters) of each layer are left, boolean (unit,), and the scores where there are any."""
        self.alive = {layer: kept.detach().cpu().clone() for layer, kept in alive.items()}
        self.scores = {layer: score.detach().cpu() for layer, score in (scores or {}).items()}

    def unit_labels(self) -> list[tuple[str, int]]:
        """Layer and index of each unit, in the order of :meth:`unit_row`."""
        return [(layer, index) for layer, kept in self.alive.items() for index in range(len(kept))]

    def unit_row(self) -> dict[str, Tensor]:
        """Scores and survival of all units, each (unit,)."""
        missing = {layer: torch.full(kept.shape, torch.nan) for layer, kept in self.alive.items()}
        scores = [self.scores.get(layer, missing[layer]).double() for layer in self.alive]
        return {"score": torch.cat(scores), "alive": torch.cat(list(self.alive.values()))}


class Stage:
    """The network at one moment: its expansion at the probe, and which parameters are not pruned."""

    def __init__(self, layers: Layers, expansion: Expansion) -> None:
        self.expansion = expansion
        self.kept = [kept.clone() for kept in layers.kept()]
        self._hess_grad = expansion.hessian_product(expansion.grad)

    def vectors(self, **others: list[Tensor]) -> Vectors:
        """θ, g, Hg and what is kept, with further vectors."""
        theta = [tensor.detach() for tensor in self.expansion.theta.values()]
        kept = [kept.to(tensor.dtype) for kept, tensor in zip(self.kept, theta, strict=True)]
        return Vectors(theta=theta, grad=self.expansion.grad, hess_grad=self._hess_grad, kept=kept, **others)


@torch.no_grad()
def effect(layers: Layers, before: Stage, after: Stage) -> dict[str, Tensor]:
    """The row of ``/pruning``: all quantities at both stages, (stage, layer), and those of the removal δ, (layer,).

    δ = θ_after − θ_before, R = the parameters pruned in between. H is that of the network before.
    """
    rows = [row for row in schema.quantities("pruning") if "layer" in row.over]
    staged = [row.name for row in rows if "stage" in row.over]
    stages = [layers.evaluate(staged, stage.vectors()) for stage in (before, after)]
    values = {name: torch.stack([stage[name] for stage in stages]) for name in staged}
    values["loss"] = torch.stack([before.expansion.loss, after.expansion.loss])
    removal = minus(list(after.expansion.theta.values()), list(before.expansion.theta.values()))
    removed = [(was & ~now).to(delta.dtype) for was, now, delta in zip(before.kept, after.kept, removal, strict=True)]
    hess_removal = before.expansion.hessian_product(removal)
    vectors = before.vectors(removal=removal, hess_removal=hess_removal, removed=removed)
    return values | layers.evaluate([row.name for row in rows if "stage" not in row.over], vectors)
