"""Scores of several measures side by side, and their sampling noise: the bootstrap over batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..masks import parameter_masks
from ..probe import unwrap
from .importance import scores
from .measures import find_measure


def resampled_scores(
    model: nn.Module,
    batches: Sequence[Any],
    measures: Iterable[str],
    *,
    draws: int = 25,
    seed: int = 0,
    mode: str = "eval",
) -> xr.Dataset:
    """Scores of all filters by each measure, on all batches and on ``draws`` bootstrap samples of them.

    A bootstrap sample has as many batches, drawn with replacement (Efron 1979); each is scored anew, since a measure
    takes absolute values or products after the mean over batches: per-batch scores do not average to it. The same
    samples serve all measures, so that differences between measures can be compared draw by draw. Each measure is at
    its paper's temperature; a class-balanced one is scored on the same batches as the others.

    Returns:
        ``score`` (measure, unit) and ``resampled_score`` (measure, draw, unit), with the coordinates layer and index
        of each filter; NaN where a filter is pruned. To be added to an event: ``event.add("scores", ...)``.

    Raises:
        ValueError: fewer than two batches or draws, no measure, or one that :func:`scores` refuses.
    """
    batches, measures = list(batches), list(measures)
    if len(batches) < 2 or draws < 2 or not measures:
        raise ValueError(
            f"the bootstrap needs two batches, draws and a measure at least, got {len(batches)}, {draws}, {measures}"
        )
    chosen = np.random.default_rng(seed).integers(len(batches), size=(draws, len(batches)))
    samples = [batches, *([batches[index] for index in draw] for draw in chosen)]
    found = {name: [_scored(model, sample, name, mode) for sample in samples] for name in measures}
    layers = {name: len(values) for name, values in found[measures[0]][0].items()}
    values = np.stack([[_row(model, one) for one in found[name]] for name in measures])
    return xr.Dataset(
        {
            "score": (["measure", "unit"], values[:, 0]),
            "resampled_score": (["measure", "draw", "unit"], values[:, 1:]),
        },
        coords={
            "measure": measures,
            "layer": ("unit", [name for name, filters in layers.items() for _ in range(filters)]),
            "index": ("unit", [index for filters in layers.values() for index in range(filters)]),
        },
    )


def _scored(model: nn.Module, batches: list[Any], measure: str, mode: str) -> dict[str, Tensor]:
    return scores(model, batches, measure, temperature=find_measure(measure).temperature, mode=mode)


def _row(model: nn.Module, found: dict[str, Tensor]) -> np.ndarray:
    """Scores of all units, (unit,); NaN for those that are pruned."""
    masks = parameter_masks(unwrap(model))
    alive = {
        name: masks[f"{name}.weight"].flatten(1).any(1) if f"{name}.weight" in masks else torch.ones_like(values).bool()
        for name, values in found.items()
    }
    return torch.cat([values.double().where(alive[name], torch.nan) for name, values in found.items()]).cpu().numpy()
