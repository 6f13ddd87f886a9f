"""Scores of a network's filters or weights by one measure or several, from streamed data, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import named
from ...hardware.precision import precise
from ...probing.objective import Objective, cross_entropy_objective
from ..candidates.weights import weight_of
from .derivatives import Derivatives, derivatives
from .measures import Evidence, Measure, normalised
from .request import Request, request


def scores(
    model: nn.Module,
    batches: Iterable[Any] | None,
    measure: str,
    *,
    objective: Objective = cross_entropy_objective,
    temperature: float = 1.0,
    mode: str = "eval",
    granularity: str = "filter",
    protected: Iterable[str] = (),
    initial: Mapping[str, Tensor] | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Importance of every filter, (filter,), by the name of its layer; the lowest are pruned first (grasp's highest).

    Args:
        model: convolutions, linear layers and BatchNorm that torch.fx can trace. It is left as it is.
        batches: of ``(inputs, labels)``, or whatever the objective takes. They are read one at a time; where H is
            needed, twice. A measure that needs no data takes None; synflow uses only the shape of the first input.
        measure: a name from :data:`MEASURES`, which holds each one's formula: whether it is signed, and whether an
            absolute value stands before or after the sum over a filter.
        objective: ``objective(model, batch) -> scalar loss``, a mean over the batch's samples; the loss is its mean
            over the batches, by samples. By default the cross-entropy of logits / temperature.
        temperature: T, of the cross-entropy alone. The paper's is ``MEASURES[measure].temperature``.
        mode: "eval" (the paper's) or "train": how BatchNorm and dropout behave while the loss is evaluated.
        granularity: "filter" (of :func:`unit_layers`), or "weight" for a score of every weight of every convolution and
            linear layer, in the weight's shape.
        protected: names of layers that are left out.
        initial: parameters at initialisation by name, for a measure that uses θ₀: a
            ``copy.deepcopy(model.state_dict())`` from then.
        seed: seed of the measure "random"; None draws its numbers from torch's generator.

    Filters of depthwise convolutions have no scores of their own: they are pruned with the layer that feeds them. A
    filter is scored by its remaining weights: those that read a pruned filter's channel are pruned with it, as in the
    paper's code, which cuts both out; those that read channels of several layers, summed or concatenated, stay. Source:
    Lubana & Dick, ICLR 2021, sections 3 and 4; Molchanov et al. 2019 for taylor and fisher; Lee et al. 2019, eq. 4, for
    snip; Wang et al. 2020, eq. 8, for grasp, with g and H of all trainable parameters here (its code uses weights only:
    freeze biases and normalisations for the same); Tanaka et al. 2020 for synflow.

    Raises:
        ValueError: unknown measure, mode or granularity; a temperature that is not positive; no data or no ``initial``
            where the measure needs it; a frozen layer where it needs gradients; a model on several devices, or one
            with a layer that cannot be pruned safely.
    """
    found = scores_by_measure(
        model, batches, [measure], objective=objective, temperature=temperature, mode=mode, granularity=granularity,
        protected=protected, initial=initial, seed=seed,
    )  # fmt: skip
    return found[measure]


@torch.no_grad()
def scores_by_measure(
    model: nn.Module,
    batches: Iterable[Any] | None,
    measures: Sequence[str],
    *,
    objective: Objective = cross_entropy_objective,
    temperature: float = 1.0,
    mode: str = "eval",
    granularity: str = "filter",
    protected: Iterable[str] = (),
    initial: Mapping[str, Tensor] | None = None,
    seed: int | None = None,
) -> dict[str, dict[str, Tensor]]:
    """:func:`scores` by several measures at once: measure → layer → scores. One g and one Hg serve all of them."""
    asked = request(model, batches, measures, temperature, mode, granularity, protected, initial)
    loss = at_temperature(objective, temperature)
    uses = {row.uses for row in asked.rows if row.needs_data}
    found = _derivatives(asked, batches, uses, loss, mode) if uses else Derivatives()
    drawn = torch.Generator().manual_seed(seed) if seed is not None else None
    return scores_from(asked, asked.rows, found, drawn)


def at_temperature(objective: Objective, temperature: float) -> Objective:
    """The loss that importance refers to: the objective, with its logits divided by the temperature.

    Raises:
        ValueError: the temperature is not 1, and the objective is not the cross-entropy.
    """
    if objective is cross_entropy_objective:
        return partial(cross_entropy_objective, temperature=temperature)
    if temperature != 1:
        raise ValueError(
            f"a temperature, {temperature}, divides the logits of the cross-entropy: leave it out with an "
            "objective of your own"
        )
    return objective


def paper_temperature(row: Measure, objective: Objective) -> float:
    """The temperature of a measure's paper; 1 if the objective is not the cross-entropy."""
    return row.temperature if objective is cross_entropy_objective else 1.0


def _derivatives(
    asked: Request, batches: Iterable[Any], uses: set[str], objective: Objective, mode: str
) -> Derivatives:
    try:
        return derivatives(asked.model, list(asked.layers), batches, uses, objective, mode)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        own = getattr(objective, "func", None) is not cross_entropy_objective
        if own or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            "importance is measured with the mean cross-entropy of model(inputs) and labels over batches "
            f"(inputs, labels), which failed with {named(error)}. For another loss pass objective=lambda "
            "model, batch: <scalar loss>, or prune by magnitude"
        ) from error


def scores_from(
    asked: Request, rows: Sequence[Measure], found: Derivatives, drawn: torch.Generator | None = None
) -> dict[str, dict[str, Tensor]]:
    """Measure → layer → scores, from what was gathered over the batches."""
    evidence = {name: _evidence(asked, name, found) for name in asked.layers}
    return {row.name: _scores(row, evidence, asked.granularity, drawn) for row in rows}


def _evidence(asked: Request, name: str, found: Derivatives) -> Evidence:
    weight, left = weight_of(name), asked.left.get(name)
    theta = precise(asked.model.get_parameter(weight).detach())
    return Evidence(
        theta=theta if left is None else theta.masked_fill(~left, 0),
        initial=asked.initial.get(name),
        grad=found.grad.get(weight),
        hess_grad=found.hess_grad.get(weight),
        squared_sample_grad=found.squares.get(name),
        flow_grad=found.flow_grad.get(weight),
        scale=asked.scales.get(name),
    )


def _scores(
    row: Measure, evidence: dict[str, Evidence], granularity: str, drawn: torch.Generator | None
) -> dict[str, Tensor]:
    found = {}
    for name, one in evidence.items():
        if row.uses == "uniform":
            one = Evidence(one.theta, uniform=_uniform(one.theta, granularity, drawn))
        entries = row.entries(one)
        if granularity == "weight":  # each weight is scored as a filter of one weight
            found[name] = row.combine(entries.reshape(-1, 1)).view(entries.shape)
        else:
            found[name] = row.combine(entries.reshape(len(entries), -1))
    return normalised(found) if row.normalised else found


def _uniform(theta: Tensor, granularity: str, drawn: torch.Generator | None) -> Tensor:
    shape = theta.shape if granularity == "weight" else theta.shape[:1]
    if drawn is None:
        return torch.rand(shape, dtype=theta.dtype, device=theta.device)
    return torch.rand(shape, dtype=theta.dtype, generator=drawn, device=drawn.device).to(theta.device)
