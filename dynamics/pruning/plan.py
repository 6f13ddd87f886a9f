"""A pruning, planned or done: its scores, the units it leaves, and the network's cost then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..words import counted
from .cost import Cost
from .selection import count_left


@dataclass(frozen=True)
class Pruning:
    """What one pruning does, before or after it is done.

    The ``scores`` it ranks by and the units ``alive`` after it, both by layer; the sparsity asked for (``target``) and
    reached; the :class:`Cost` of the network before anything was pruned (``dense``) and after this pruning, or None
    unless a batch shows the shape of an input, and the model takes that input alone. ``attributes`` describes it in an
    event's record.
    """

    scores: dict[str, Tensor]
    alive: dict[str, Tensor]
    target: float
    sparsity: float
    cost: Cost | None
    dense: Cost | None
    settings: dict[str, Any]

    def __repr__(self) -> str:
        left = units_left(self.alive, self.settings["granularity"])
        return f"<Pruning by {self.settings['measure']}: {left}, {self.sparsity:.1%} pruned>"

    @property
    def attributes(self) -> dict[str, str | float]:
        """Numbers and strings for ``recorder.event("prune", ..., **pruning.attributes)``."""
        costs = {} if self.cost is None else {f"{name}_left": count for name, count in asdict(self.cost).items()}
        costs |= {} if self.dense is None else {f"dense_{name}": count for name, count in asdict(self.dense).items()}
        return {**self.settings, "target": self.target, "sparsity": self.sparsity, **costs}


def units_left(alive: Mapping[str, Tensor], unit: str) -> str:
    """How many units are left in how many layers, in words."""
    whole = sum(kept.numel() for kept in alive.values())
    return f"{count_left(alive)} of {counted(whole, unit)} left in {counted(len(alive), 'layer')}"
