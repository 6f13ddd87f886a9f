"""Scores of several measures side by side, and their sampling noise: the bootstrap over batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ...network.masks import filters_left
from ...probing.batch import sample_count
from ...probing.objective import Objective, cross_entropy_objective
from ..candidates.units import filter_coordinates
from .request import Request, request
from .resampled_derivatives import resampled_derivatives
from .scores import at_temperature, paper_temperature, scores_from


def resampled_scores(
    model: nn.Module,
    batches: Sequence[Any],
    measures: Iterable[str],
    *,
    objective: Objective = cross_entropy_objective,
    draws: int = 25,
    seed: int = 0,
    mode: str = "eval",
    protected: Iterable[str] = (),
    initial: Mapping[str, Tensor] | None = None,
) -> xr.Dataset:
    """Scores of all filters by each measure, on all batches and on ``draws`` bootstrap samples of them.

    A bootstrap sample has equally many batches, drawn with replacement (Efron 1979). Measures take absolute values or
    products after the mean over batches, so per-batch scores do not average to theirs: each sample's g and Hg are
    combined from those of the batches, at a cost that hardly depends on ``draws``. The same samples serve all measures,
    so that their differences can be compared draw by draw. Each measure has its paper's temperature if the objective is
    the cross-entropy; a class-balanced one is scored on the same batches as the others.
    ``objective``, ``initial``: see :func:`scores`.

    Returns:
        ``score`` (measure, unit) and ``resampled_score`` (draw, measure, unit), with the coordinates layer and index
        of each filter; NaN where a filter is pruned. To be added to an event: ``event.add("scores", ...)``.

    Raises:
        ValueError: fewer than two batches or draws, no measure, or one that :func:`scores` refuses.
    """
    batches, measures = list(batches), list(measures)
    if len(batches) < 2 or draws < 2 or not measures:
        raise ValueError(
            f"the bootstrap needs at least two batches, two draws and one measure, got {len(batches)}, "
            f"{draws}, {measures}"
        )
    asked = request(model, batches, measures, 1.0, mode, "filter", protected, initial)
    found = _scored(asked, batches, _shares(batches, draws, seed), objective, mode)
    values = torch.stack([torch.stack([_row(asked.model, one[name]) for name in measures]) for one in found]).numpy()
    return xr.Dataset(
        {
            "score": (["measure", "unit"], values[0]),
            "resampled_score": (["draw", "measure", "unit"], values[1:]),
        },
        coords={"measure": measures, **filter_coordinates(asked.layers.values())},
    )


def _shares(batches: list[Any], draws: int, seed: int) -> Tensor:
    """The share of each batch by its samples, in the original batches and in each draw: (1 + draw, batch)."""
    chosen = np.random.default_rng(seed).integers(len(batches), size=(draws, len(batches)))
    times = [np.ones(len(batches)), *(np.bincount(draw, minlength=len(batches)) for draw in chosen)]
    counted = torch.tensor(np.array(times) * [sample_count(batch) for batch in batches], device="cpu")
    return counted / counted.sum(1, keepdim=True)


@torch.no_grad()
def _scored(
    asked: Request, batches: list[Any], shares: Tensor, objective: Objective, mode: str
) -> list[dict[str, dict[str, Tensor]]]:
    """For each draw measure → layer → scores, each measure at its own temperature."""
    scored: list[dict[str, dict[str, Tensor]]] = [{} for _ in shares]
    temperatures = [paper_temperature(row, objective) for row in asked.rows]
    for temperature in dict.fromkeys(temperatures):
        together = [row for row, own in zip(asked.rows, temperatures, strict=True) if own == temperature]
        uses = {row.uses for row in together if row.needs_data}
        loss = at_temperature(objective, temperature)
        found = resampled_derivatives(asked.model, list(asked.layers), batches, shares, uses, loss, mode)
        for one, draw in zip(scored, found, strict=True):
            one |= scores_from(asked, together, draw)
    return scored


def _row(model: nn.Module, found: dict[str, Tensor]) -> Tensor:
    """Scores of all units, (unit,), in host memory; NaN for those that are pruned."""
    left = {layer: filters_left(model, layer).cpu() for layer in found}
    return torch.cat([values.cpu().double().where(left[layer], torch.nan) for layer, values in found.items()])
