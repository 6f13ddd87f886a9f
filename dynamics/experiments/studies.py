"""The studies of an event: further measurements of a network that is about to be pruned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..network.masks import filters_left
from ..probing.objective import Objective
from ..pruning import MEASURES, Pruning, removal_curve, resampled_scores, scale_invariance
from ..recording.event import Event
from ..schema import PAPER_MEASURES

PARTS = 8
_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)


def add_studies(
    event: Event,
    model: nn.Module,
    pruning: Pruning,
    probe: Sequence[tuple[Tensor, Tensor]],
    objective: Objective,
    mode: str,
) -> None:
    """Add "curve", "scores" and "invariance" to the event of a planned pruning of filters, before it is applied.

    ============  ============================================================================
    "curve"       prunings by the same scores, of 1/32 to 1/4 of the filters left, if as many can be pruned; measured
                  in the mode of the event
    "scores"      the paper's measures and their sampling noise, over :data:`PARTS` parts of the probe; in eval mode
    "invariance"  which filters are scale-invariant; in both modes
    ============  ============================================================================
    """
    protected = tuple(getattr(model, "protected", ()))
    ranking = {name: scores for name, scores in pruning.scores.items() if name not in protected}
    left = [int(filters_left(model, name).sum()) for name in ranking]
    if round(_FRACTIONS[-1] * sum(left)) <= sum(max(count - 1, 0) for count in left):
        if MEASURES[pruning.settings["measure"]].highest_first:
            ranking = {name: -scores for name, scores in ranking.items()}
        curve = removal_curve(model, probe, ranking, _FRACTIONS, objective=objective, mode=mode, protected=protected)
        event.add("curve", curve)
    inputs, labels = (torch.cat(parts) for parts in zip(*probe, strict=True))
    parts = list(zip(inputs.tensor_split(PARTS), labels.tensor_split(PARTS), strict=True))
    event.add("scores", resampled_scores(model, parts, PAPER_MEASURES, protected=protected))
    event.add("invariance", scale_invariance(model, probe, objective=objective, protected=protected))
