"""Scores of several measures side by side, and their sampling noise: the bootstrap over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..probe import unwrap
from .importance import scores_by_measure
from .invariance import standing
from .measures import find_measure


def resampled_scores(
    model: nn.Module,
    batches: Sequence[Any],
    measures: Iterable[str],
    *,
    draws: int = 25,
    seed: int = 0,
    mode: str = "eval",
    protected: Iterable[str] = (),
) -> xr.Dataset:
    """Scores of all filters by each measure, on all batches and on ``draws`` bootstrap samples of them.

    A bootstrap sample has as many batches, drawn with replacement (Efron 1979); each is scored anew, since a measure
    takes absolute values or products after the mean over batches: per-batch scores do not average to it. The same
    samples serve all measures, so that differences between measures can be compared draw by draw. Each measure is at
    its paper's temperature; a class-balanced one is scored on the same batches as the others.

    Returns:
        ``score`` (measure, unit) and ``resampled_score`` (draw, measure, unit), with the coordinates layer and index
        of each filter; NaN where a filter is pruned. To be added to an event: ``event.add("scores", ...)``.

    Raises:
        ValueError: fewer than two batches or draws, no measure, or one that :func:`scores` refuses.
    """
    batches, measures = list(batches), list(measures)
    if len(batches) < 2 or draws < 2 or not measures:
        raise ValueError(
            f"the bootstrap needs two batches, draws and a measure at least, got {len(batches)}, {draws}, {measures}"
        )
    settings = {"mode": mode, "protected": tuple(protected)}
    chosen = np.random.default_rng(seed).integers(len(batches), size=(draws, len(batches)))
    samples = [batches, *([batches[index] for index in draw] for draw in chosen)]
    found = [_scored(model, sample, measures, settings) for sample in samples]
    values = torch.stack([torch.stack([_row(model, one[name]) for name in measures]) for one in found]).cpu().numpy()
    filters = {layer: len(scores) for layer, scores in found[0][measures[0]].items()}
    return xr.Dataset(
        {
            "score": (["measure", "unit"], values[0]),
            "resampled_score": (["draw", "measure", "unit"], values[1:]),
        },
        coords={
            "measure": measures,
            "layer": ("unit", [layer for layer, count in filters.items() for _ in range(count)]),
            "index": ("unit", [index for count in filters.values() for index in range(count)]),
        },
    )


def _scored(
    model: nn.Module, batches: list[Any], measures: list[str], settings: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """Measure → layer → scores, each measure at its own temperature."""
    temperatures = {name: find_measure(name).temperature for name in measures}
    found = {}
    for temperature in dict.fromkeys(temperatures.values()):
        together = [name for name in measures if temperatures[name] == temperature]
        found |= scores_by_measure(model, batches, together, temperature=temperature, **settings)
    return found


def _row(model: nn.Module, found: dict[str, Tensor]) -> Tensor:
    """Scores of all units, (unit,); NaN for those that are pruned."""
    model = unwrap(model)
    return torch.cat([values.double().where(standing(model, layer), torch.nan) for layer, values in found.items()])
