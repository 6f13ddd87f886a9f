"""Which units to prune: one global ascending ranking of raw scores, with a floor in each layer. Pure functions.

Units of a layer are (unit,), booleans and scores in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ranked:
    """One layer in the ranking: its units' ``scores``, and which of them are ``standing``, that is, not pruned.

    ``keep`` units always stay: the best or, ``by_index``, the last. ``weight`` is how much a unit counts towards the
    number to prune. ``movable`` says whether any may be pruned.
    """

    scores: Tensor
    standing: Tensor
    keep: int
    by_index: bool = False
    weight: int = 1
    movable: bool = True

    def candidates(self) -> Tensor:
        """Indices of the units that may be pruned, ascending: those not pruned yet, except those that always stay."""
        standing = self.standing.nonzero().flatten()
        if not self.movable:
            return standing[:0]
        order = standing if self.by_index else standing[self.scores[standing].argsort(stable=True)]
        return order[: max(len(order) - self.keep, 0)].sort().values


def capacity(layers: Mapping[str, Ranked]) -> int:
    """Sum of the weights of all units that may be pruned."""
    return sum(layer.weight * len(layer.candidates()) for layer in layers.values())


def lowest(layers: Mapping[str, Ranked], quota: int, *, ties: bool = False) -> dict[str, Tensor]:
    """Indices of the units to prune, by layer: the lowest candidates whose weights add up to at most ``quota``.

    Ties are broken by layer, then index; with ``ties`` all that score no more than the last one are pruned with it.
    """
    candidates = {name: layer.candidates() for name, layer in layers.items()}
    ranking = torch.cat([layers[name].scores[indices] for name, indices in candidates.items()])
    weights = torch.cat(
        [torch.full((len(indices),), layers[name].weight, device="cpu") for name, indices in candidates.items()]
    )
    order = ranking.argsort(stable=True)
    count = int((weights[order].cumsum(0) <= quota).sum())
    if ties and count:
        count = int((ranking <= ranking[order[count - 1]]).sum())
    goes = torch.zeros_like(ranking, dtype=torch.bool)
    goes[order[:count]] = True
    parts = goes.split([len(indices) for indices in candidates.values()])
    return {name: indices[part] for (name, indices), part in zip(candidates.items(), parts, strict=True)}


def without(standing: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The units that are left after those at the given indices are pruned."""
    left = {name: kept.clone() for name, kept in standing.items()}
    for name, indices in gone.items():
        left[name][indices] = False
    return left


def count_left(alive: Mapping[str, Tensor]) -> int:
    """How many units are left in all the layers."""
    return sum(int(kept.sum()) for kept in alive.values())
