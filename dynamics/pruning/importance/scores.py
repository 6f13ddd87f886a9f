"""Scores of a network's filters or weights by one measure or several, from data that streams by in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import named
from ...hardware.precision import precise
from ...probing.probe import Objective, cross_entropy_objective, unwrap
from ..candidates.units import UnitLayer, unit_layers, weights_left
from ..candidates.weights import weight_layers, weight_of
from .derivatives import Derivatives, derivatives
from .measures import Evidence, Measure, find_measure, normalised


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
        batches: of ``(inputs, labels)``, or whatever the objective takes. They are looked at one at a time; where H is
            needed, twice. A measure that looks at none takes None; synflow looks at nothing but the first input's
            shape.
        measure: a name from :data:`MEASURES`, which holds each one's formula: whether it is signed, and whether an
            absolute value stands before or after the sum over a filter.
        objective: ``objective(model, batch) -> scalar loss``, a mean over the batch's samples; the loss is its mean
            over the batches, by samples. By default the cross-entropy of logits / temperature.
        temperature: T, of the cross-entropy alone. The paper's is ``MEASURES[measure].temperature``.
        mode: "eval" (the paper's) or "train": how BatchNorm and dropout behave while the loss is evaluated.
        granularity: "filter" (of :func:`unit_layers`), or "weight" for a score of every weight of every convolution and
            linear layer, in the weight's shape.
        protected: names of layers that are left out.
        initial: parameters at initialisation by name, for a measure of θ₀: ``copy.deepcopy(model.state_dict())`` of
            then.
        seed: of the measure "random", for numbers of its own; None draws them from torch's generator.

    Depthwise convolutions have no scores of their own as filters: they go with the layer that feeds them. A filter is
    scored by its weights that are left: those that read a pruned filter's channel have gone with it, as in the paper's
    code, which cuts both out; those that read several layers' channels, added up or side by side, stay. Source:
    Lubana & Dick, ICLR 2021, sections 3 and 4; Molchanov et al. 2019 for taylor and fisher; Lee et al. 2019, eq. 4, for
    snip; Wang et al. 2020, eq. 8, for grasp, where g and H are here those of all trainable parameters (freeze biases
    and normalisations for its code's, which takes weights only); Tanaka et al. 2020 for synflow.

    Raises:
        ValueError: unknown measure, mode or granularity, a temperature that is not positive, no data or no ``initial``
            where the measure needs some, a frozen layer where it needs gradients, a model on several devices, or one
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
    rows = [find_measure(name) for name in measures]
    check_request(rows, batches, temperature, mode, granularity)
    loss = at_temperature(objective, temperature)
    model = unwrap(model)
    check_one_device(model)
    layers = unit_layers(model, protected) if granularity == "filter" else weight_layers(model, protected)
    names = [layer.name for layer in layers] if granularity == "filter" else layers
    check_not_frozen(model, names, rows)
    start = initial_weights(model, names, rows, initial)
    scales = gammas(model, layers, rows) if granularity == "filter" else {}
    uses = {row.uses for row in rows if row.needs_data}
    found = _derivatives(model, names, batches, uses, loss, mode) if uses else Derivatives()
    left = weights_left(model, layers) if granularity == "filter" else {}
    drawn = torch.Generator().manual_seed(seed) if seed is not None else None
    return scores_from(model, names, rows, found, scales, start, left, granularity, drawn)


def at_temperature(objective: Objective, temperature: float) -> Objective:
    """The loss that importance is of.

    Raises:
        ValueError: there is a temperature, and the objective is no cross-entropy.
    """
    if objective is cross_entropy_objective:
        return partial(cross_entropy_objective, temperature=temperature)
    if temperature != 1:
        raise ValueError(
            f"a temperature, {temperature}, divides the logits of the cross-entropy: of an objective of your own leave "
            "it out"
        )
    return objective


def paper_temperature(row: Measure, objective: Objective) -> float:
    """The temperature that a measure's paper has; 1 where the objective is no cross-entropy."""
    return row.temperature if objective is cross_entropy_objective else 1.0


def _derivatives(
    model: nn.Module, names: list[str], batches: Iterable[Any], uses: set[str], objective: Objective, mode: str
) -> Derivatives:
    try:
        return derivatives(model, names, batches, uses, objective, mode)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        own = getattr(objective, "func", None) is not cross_entropy_objective
        if own or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            "importance is of the mean cross-entropy of model(inputs) and labels over (inputs, labels) batches, and "
            f"that failed with {named(error)}. Of another loss, give it: objective=lambda model, batch: <scalar loss>; "
            "or prune by magnitude"
        ) from error


def scores_from(
    model: nn.Module,
    layers: Sequence[str],
    rows: Sequence[Measure],
    found: Derivatives,
    scales: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    left: Mapping[str, Tensor],
    granularity: str = "filter",
    drawn: torch.Generator | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Measure → layer → scores, from what was gathered over the batches.

    Of the layers that have them: γ, θ₀, and which weights are ``left``, as the channels that they read are.
    """
    evidence = {
        name: _evidence(model, name, found, scales.get(name), initial.get(name), left.get(name)) for name in layers
    }
    return {row.name: _scores(row, evidence, granularity, drawn) for row in rows}


def check_one_device(model: nn.Module) -> None:
    """Raise ValueError where the model's parameters and buffers are not all on one device."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    places: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in places.items())
        raise ValueError(f"the model is on {len(places)} devices ({where}): scores need it on one; move it with .to()")


def check_request(
    rows: Sequence[Measure], batches: Iterable[Any] | None, temperature: float, mode: str, granularity: str
) -> None:
    """Raise ValueError where scores are asked for that cannot be: see :func:`scores`."""
    check_settings(temperature, mode, granularity)
    for row in rows:
        if granularity == "weight" and row.per_filter:
            raise ValueError(f"{row.name} scores whole filters; it has no score for single weights")
        if row.needs_data and (batches is None or (isinstance(batches, Sequence) and not batches)):
            raise ValueError(f"{row.name} needs data: pass batches of (inputs, labels), got none")


def check_settings(temperature: float, mode: str, granularity: str) -> None:
    """Raise ValueError where there is no such granularity, mode or temperature."""
    if granularity not in ("filter", "weight") or mode not in ("eval", "train"):
        raise ValueError(
            f"granularity is 'filter' or 'weight' and mode 'eval' or 'train'; got {granularity!r}, {mode!r}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def check_not_frozen(model: nn.Module, layers: Sequence[str], rows: Sequence[Measure]) -> None:
    """Raise ValueError where a measure looks at the gradient of a weight that is frozen."""
    frozen = [name for name in map(weight_of, layers) if not model.get_parameter(name).requires_grad]
    if frozen and (needing := [row.name for row in rows if row.uses in ("grad", "hess_grad")]):
        raise ValueError(
            f"{needing[0]} is made of gradients, and {frozen[0]!r} is frozen (requires_grad=False): its own is "
            "0, so that it would go first: name what is frozen in protected=(...), or choose another measure"
        )


def gammas(model: nn.Module, layers: list[UnitLayer], rows: Sequence[Measure]) -> dict[str, Tensor]:
    """γ of the normalisation that follows each layer, where there is one.

    Raises:
        ValueError: a measure looks at it, and it is not there.
    """
    followers = {layer.name: layer.normalisation(model) for layer in layers}
    lacking = [name for name, norm in followers.items() if norm is None]
    if lacking and (needing := [row.name for row in rows if row.uses == "scale"]):
        raise ValueError(
            f"{needing[0]} needs a normalisation with a scale γ after every layer that is pruned, and after "
            f"{lacking[0]!r} there is none: name what has none in protected=(...)"
        )
    return {name: model.get_submodule(norm).weight for name, norm in followers.items() if norm is not None}


def initial_weights(
    model: nn.Module, layers: Sequence[str], rows: Sequence[Measure], initial: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """θ₀ of each layer's weight, where a measure looks at it.

    Raises:
        ValueError: it is not there, of another shape, or the model's own memory.
    """
    found = {}
    for row in (row for row in rows if row.needs_initial):
        for name in layers:
            theta, start = model.get_parameter(weight_of(name)), (initial or {}).get(weight_of(name))
            if start is None or start.shape != theta.shape or start.data_ptr() == theta.data_ptr():
                got = "nothing" if start is None else f"shape {tuple(start.shape)}"
                got = "the model's own memory" if start is not None and start.shape == theta.shape else got
                raise ValueError(
                    f"{row.name} needs θ₀ of {weight_of(name)!r}, of shape {tuple(theta.shape)}, got {got}: pass "
                    "initial= a copy.deepcopy(model.state_dict()) taken before the training"
                )
            found[name] = start.detach().to(theta)
    return found


def _evidence(
    model: nn.Module,
    name: str,
    found: Derivatives,
    scale: Tensor | None,
    initial: Tensor | None,
    left: Tensor | None,
) -> Evidence:
    weight = weight_of(name)
    theta = precise(model.get_parameter(weight).detach())
    return Evidence(
        theta=theta if left is None else theta.masked_fill(~left, 0),
        initial=initial,
        grad=found.grad.get(weight),
        hess_grad=found.hess_grad.get(weight),
        squared_sample_grad=found.squares.get(name),
        flow_grad=found.flow_grad.get(weight),
        scale=scale,
    )


def _scores(
    row: Measure, evidence: dict[str, Evidence], granularity: str, drawn: torch.Generator | None
) -> dict[str, Tensor]:
    found = {}
    for name, one in evidence.items():
        if row.uses == "uniform":
            one = Evidence(one.theta, uniform=_uniform(one.theta, granularity, drawn))
        entries = row.entries(one)
        if granularity == "weight":  # each is a filter of one
            found[name] = row.combine(entries.reshape(-1, 1)).view(entries.shape)
        else:
            found[name] = row.combine(entries.reshape(len(entries), -1))
    return normalised(found) if row.normalised else found


def _uniform(theta: Tensor, granularity: str, drawn: torch.Generator | None) -> Tensor:
    shape = theta.shape if granularity == "weight" else theta.shape[:1]
    if drawn is None:
        return torch.rand(shape, dtype=theta.dtype, device=theta.device)
    return torch.rand(shape, dtype=theta.dtype, generator=drawn).to(theta.device)
