"""What the events of a record have said so far: later ones keep to its types and extents, which are for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ..record.store import Store
from ..schema import STUDIES

if TYPE_CHECKING:
    from .event import Event

Coordinates = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PastEvents:
    """The events of a record until now.

    Attributes:
        count: how many there are.
        texts: of what described them, by name, whether it was a text.
        units: layer and index of each unit that one told of.
        studied: the coordinates of each study that was added to one.
        sparsity: what the last pruning that says so has reached, a number or a text as it was given.
    """

    count: int = 0
    texts: Mapping[str, bool] = field(default_factory=dict)
    units: Sequence[tuple[str, int]] = ()
    studied: Mapping[str, Coordinates] = field(default_factory=dict)
    sparsity: float | str = 0.0

    @classmethod
    def of(cls, store: Store, count: int) -> PastEvents:
        """Those of a record that goes on behind so many: what was taken back has fixed its types and extents, too."""
        units = store.coordinates("units")
        labels = zip(units["layer"].tolist(), units["index"].tolist(), strict=True) if units else ()
        studied = {node: found for node in STUDIES if (found := store.coordinates(node))}
        return cls(count, store.texts("pruning"), list(labels), studied, _sparsity(store, count))

    def and_now(self, described: Mapping[str, float | str], event: Event, *, pruned: bool) -> PastEvents:
        """These and one more."""
        return replace(
            self,
            count=self.count + 1,
            texts={**self.texts, **{name: isinstance(value, str) for name, value in described.items()}},
            units=event.unit_labels() or self.units,
            studied={**self.studied, **{node: coordinates(study) for node, study in event.studies.items()}},
            sparsity=described.get("sparsity", self.sparsity) if pruned else self.sparsity,
        )


def coordinates(study: xr.Dataset) -> Coordinates:
    """What labels a study, as :meth:`Store.coordinates` has it."""
    labels = {str(name): values.values for name, values in study.coords.items()}
    return {str(dim): np.arange(size) for dim, size in study.sizes.items()} | labels


def _sparsity(store: Store, count: int) -> float | str:
    try:
        kinds, reached = (store.read("pruning", name)[:count].tolist() for name in ("kind", "sparsity"))
    except KeyError:  # none was a pruning
        return 0.0
    said = [value for kind, value in zip(kinds, reached, strict=True) if kind == "prune" and value != ""]
    return next((value for value in reversed(said) if value == value), 0.0)  # NaN where it was not given
