"""The pruner: ranks all units of a network, removes exactly as many of the lowest as asked, and keeps them removed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import apply_masks
from ..probe import unwrap
from .importance import scores
from .measures import find_measure
from .units import unit_layers


@dataclass(frozen=True)
class Pruned:
    """What one pruning did: the scores it ranked by and what is alive after it, by layer, and the sparsity reached."""

    scores: dict[str, Tensor]
    alive: dict[str, Tensor]
    sparsity: float


class Pruner:
    """Prunes filters by one global ascending ranking of raw scores across layers (the paper's protocol).

    Exactly as many go as asked; ties are broken by layer, then index. A filter once silenced never revives. Every layer
    keeps its best filters down to ``floor`` of its size, at least one. Filters of the model's ``protected`` layers
    count in the whole but never go.

    Args:
        model: see :func:`scores`.
        optimizer: its state is masked along with the parameters.
        measure: a name from :data:`MEASURES`.
        temperature: T of the measure's loss; None means the paper's for this measure.
        mode: "eval" or "train", for the measure.
        floor: share of each layer's filters that always stays.

    Raises:
        ValueError: unknown measure, floor outside [0, 1], or a model that cannot be traced.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        measure: str,
        *,
        temperature: float | None = None,
        mode: str = "eval",
        floor: float = 0.05,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {floor}: 0.05 keeps at least 5 % of every layer")
        self._model, self._optimizer, self._measure, self._mode, self._floor = model, optimizer, measure, mode, floor
        row = find_measure(measure)
        self._temperature = row.temperature if temperature is None else temperature
        self._layers = unit_layers(unwrap(model))
        self.alive = {layer.name: torch.ones(layer.filters, dtype=torch.bool) for layer in self._layers}

    def prune(self, sparsity: float, batches: Iterable[Any] | None = None) -> Pruned:
        """Remove units until the share ``sparsity`` of all is gone; nothing where it is gone already.

        Raises:
            ValueError: sparsity outside [0, 1), more than the floors allow, a measure without the data it needs, or
                scores that are not numbers. The model is then untouched.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}: 0.75 removes three filters of four")
        total = sum(layer.filters for layer in self._layers)
        left = sum(int(kept.sum()) for kept in self.alive.values())
        count = max(left - round(total * (1 - sparsity)), 0)
        found = scores(self._model, batches, self._measure, temperature=self._temperature, mode=self._mode)
        found = {name: values.cpu() for name, values in found.items()}
        alive = self._without(self._lowest(found, count, sparsity))
        apply_masks(unwrap(self._model), self._parameter_masks(alive), self._optimizer)
        self.alive = alive
        return Pruned(found, {name: kept.clone() for name, kept in alive.items()}, 1 - (left - count) / total)

    def _lowest(self, found: dict[str, Tensor], count: int, sparsity: float) -> dict[str, list[int]]:
        """The ``count`` units of lowest score among those that may go, by layer."""
        candidates = [entry for layer in self._layers for entry in self._candidates(layer.name, found[layer.name])]
        if count > len(candidates):
            raise ValueError(
                f"sparsity {sparsity} asks for {count} units more to go, but only {len(candidates)} can: every layer "
                f"keeps {self._floor:.0%} of its filters, at least one, and protected layers keep all"
            )
        chosen = sorted(candidates, key=lambda entry: entry[0])[:count]  # stable: ties go by layer, then index
        lowest: dict[str, list[int]] = {}
        for _, name, index in chosen:
            lowest.setdefault(name, []).append(index)
        return lowest

    def _candidates(self, name: str, values: Tensor) -> list[tuple[float, str, int]]:
        """Units of one layer that may go: those alive, less the best that the floor protects."""
        alive = self.alive[name].nonzero().flatten()
        if not torch.isfinite(values[alive]).all():
            raise ValueError(
                f"{self._measure} has scores that are not finite in layer {name!r}: has the training diverged?"
            )
        if name in getattr(unwrap(self._model), "protected", ()):
            return []
        keep = max(1, math.ceil(self._floor * len(values)))
        order = alive[values[alive].argsort(stable=True)][: max(len(alive) - keep, 0)]
        return [(values[index].item(), name, index) for index in sorted(order.tolist())]

    def _without(self, lowest: dict[str, list[int]]) -> dict[str, Tensor]:
        alive = {name: kept.clone() for name, kept in self.alive.items()}
        for name, indices in lowest.items():
            alive[name][indices] = False
        return alive

    def _parameter_masks(self, alive: dict[str, Tensor]) -> dict[str, Tensor]:
        model, masks = unwrap(self._model), {}
        for layer in self._layers:
            if alive[layer.name].all():
                continue
            for name in layer.parameter_names(model):
                parameter = model.get_parameter(name)
                kept = alive[layer.name].to(parameter.device).view(-1, *[1] * (parameter.ndim - 1))
                masks[name] = kept.expand_as(parameter)
        return masks
