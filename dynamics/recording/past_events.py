"""What earlier events of a record contain: later ones must have the same types and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xarray as xr

from ..record.store import Store
from ..schema import STUDIES

Coordinates = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class PastEvents:
    """The events of a record so far.

    Attributes:
        count: number of events.
        texts: for each attribute that described them, by name, whether it was a string.
        units: layer and index of each recorded unit.
        studied: the coordinates of each study that was added to an event.
        sparsity: that of the last pruning that gave one, a number or a string as given.
    """

    count: int = 0
    texts: Mapping[str, bool] = field(default_factory=dict)
    units: Sequence[tuple[str, int]] = ()
    studied: Mapping[str, Coordinates] = field(default_factory=dict)
    sparsity: float | str = 0.0

    @classmethod
    def of(cls, store: Store, count: int) -> PastEvents:
        """The events of a record that resumes after ``count`` of them; dropped ones fixed types and sizes, too."""
        units = store.coordinates("units")
        labels = zip(units["layer"].tolist(), units["index"].tolist(), strict=True) if units else ()
        studied = {node: found for node in STUDIES if (found := store.coordinates(node))}
        return cls(count, store.texts("pruning"), list(labels), studied, _sparsity(store, count))

    def and_now(
        self,
        described: Mapping[str, float | str],
        units: Sequence[tuple[str, int]],
        studies: Mapping[str, xr.Dataset],
        *,
        pruned: bool,
    ) -> PastEvents:
        """These events and one more."""
        return replace(
            self,
            count=self.count + 1,
            texts={**self.texts, **{name: isinstance(value, str) for name, value in described.items()}},
            units=units or self.units,
            studied={**self.studied, **{node: coordinates(study) for node, study in studies.items()}},
            sparsity=described.get("sparsity", self.sparsity) if pruned else self.sparsity,
        )


def coordinates(study: xr.Dataset) -> Coordinates:
    """The labels along each dimension of a study, in the form of :meth:`Store.coordinates`."""
    labels = {str(name): values.values for name, values in study.coords.items()}
    return {str(dim): np.arange(size) for dim, size in study.sizes.items()} | labels


def _sparsity(store: Store, count: int) -> float | str:
    try:
        kinds, reached = (store.read("pruning", name)[:count].tolist() for name in ("kind", "sparsity"))
    except KeyError:  # none was a pruning
        return 0.0
    said = [value for kind, value in zip(kinds, reached, strict=True) if kind == "prune" and value != ""]
    return next((value for value in reversed(said) if value == value), 0.0)  # NaN where it was not given
