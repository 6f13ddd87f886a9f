"""The pruner: ranks all units of a network, removes exactly as many of the lowest as asked, and keeps them removed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..network.identities import layer_named
from ..network.masks import apply_masks, filters_left, lift_masks, parameter_masks
from ..network.optimizer_state import drop_state
from ..network.optimizers import as_given
from ..network.structure import has_any
from ..network.wrappers import unwrap
from ..probing.batch import sample_count
from ..probing.objective import Objective, cross_entropy_objective
from ..warning import warn
from .candidates.units import masks_of, units_of
from .candidates.weights import weight_of, within
from .cost import Cost, network_cost
from .importance.measures import find_measure
from .importance.request import check_settings, initial_weights
from .importance.scores import at_temperature, paper_temperature, scores
from .plan import Pruning, units_left
from .protocol import find_protocol
from .schedule import check_sparsity
from .selection import Ranked, capacity, count_left, lowest, without

_FLOOR = {"filter": 0.05, "weight": 0.0}


class Pruner:
    """Prunes filters or weights by one global ascending ranking of raw scores across layers (the paper's protocol).

    Exactly as many units are pruned as asked; ties are broken by layer, then index. A unit once silenced never revives.
    Every layer keeps its best units down to ``floor`` of its size, at least one. Filters of the model's ``protected``
    layers, and of a convolution that is the network's output, count towards the total but are never pruned. The total
    is the network as it is when the Pruner is made: masked units count as pruned, shrunk ones no longer count.

    Args:
        model: see :func:`scores`.
        optimizer: one, or a list of several, whose state is masked along with the parameters; None if nothing is
            trained afterwards. What is pruned stays at zero if the optimizer leaves zeros alone whose gradient and
            state are zero: torch's do, except LBFGS, and Muon where single weights are pruned. Of any that does not
            there is a warning.
        measure: a name from :data:`MEASURES`.
        granularity: "filter", or "weight" for single weights of all convolutions and linear layers.
        objective: ``objective(model, batch) -> scalar loss`` that importance refers to; see :func:`scores`.
        temperature: T of the cross-entropy; None means the paper's for this measure.
        mode: "eval" or "train", in which importance is scored.
        floor: share of each layer's units that is always kept; None means 5% of filters, and one weight.
        protected: names of layers, or of modules with all their layers, that are neither counted nor pruned.
        keep_state: True keeps the momentum and moments of what remains; False drops all of the optimizer's state, as
            the paper's code does.
        protocol: a name from :data:`PROTOCOLS`: "default", or "reference" for the quirks of the paper's code.
        initial: parameters at initialisation by name, for a measure that uses θ₀; they are copied, so
            ``model.state_dict()`` of a fresh model will do.
        seed: seed of the measure "random".

    Raises:
        ValueError: an unknown measure, granularity or protocol, floor outside [0, 1], a temperature with a loss other
            than the cross-entropy, an optimizer of another model, or a model that cannot be pruned safely; the message
            names the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        measure: str,
        *,
        granularity: str = "filter",
        objective: Objective = cross_entropy_objective,
        temperature: float | None = None,
        mode: str = "eval",
        floor: float | None = None,
        protected: Iterable[str] = (),
        keep_state: bool = True,
        protocol: str = "default",
        initial: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        self._measure, self._protocol = find_measure(measure), find_protocol(protocol)
        if granularity not in _FLOOR or (granularity == "weight" and protocol != "default"):
            raise ValueError(
                f"granularity must be 'filter', or 'weight' with protocol 'default'; got {granularity!r} with "
                f"protocol {protocol!r}"
            )
        floor = _FLOOR[granularity] if floor is None else floor
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {floor}: 0.05 keeps at least 5% of every layer")
        self._model, self._keep_state = model, keep_state
        self._floor = 0 if self._protocol.floor_by_index else floor
        self._optimizers = [] if optimizer is None else as_given(optimizer)
        _check_trained(model, self._optimizers)
        self._protected = within(unwrap(model), protected)
        temperature = paper_temperature(self._measure, objective) if temperature is None else temperature
        check_settings(temperature, mode, granularity)
        at_temperature(objective, temperature)
        self._settings: dict[str, Any] = {
            "objective": objective,
            "temperature": temperature,
            "mode": mode,
            "granularity": granularity,
            "initial": {k: v.detach().clone() for k, v in (initial or {}).items() if self._measure.needs_initial},
            "seed": seed,
        }
        self._protocol_name = protocol
        self._units = units_of(unwrap(model), granularity, self._protected)
        initial_weights(unwrap(model), self._units, [self._measure], self._settings["initial"])
        self._dense: Cost | None = None
        self.alive = self._standing()

    def __repr__(self) -> str:
        return f"<Pruner by {self._measure.name}: {units_left(self.alive, self._settings['granularity'])}>"

    def _standing(self) -> dict[str, Tensor]:
        """Which units of each layer are not pruned, according to its weight's mask; all if it has none."""
        model = unwrap(self._model)
        if self._settings["granularity"] == "filter":
            return {name: filters_left(model, name).cpu() for name in self._units}
        masks, shapes = parameter_masks(model), {name: layer_named(model, name).weight.shape for name in self._units}
        whole = {name: torch.ones(shape, dtype=torch.bool, device="cpu") for name, shape in shapes.items()}
        return {name: masks.get(weight_of(name), kept).cpu().clone() for name, kept in whole.items()}

    def _check_sizes(self, alive: Mapping[str, Tensor]) -> None:
        """Raise ValueError if ``alive`` has other units than the model has now."""
        layers = dict(unwrap(self._model).named_modules())
        for name, kept in alive.items():
            shape = getattr(getattr(layers.get(name), "weight", None), "shape", torch.Size())
            if shape[: kept.ndim] != kept.shape:
                raise ValueError(
                    f"layer {name!r} had units of shape {tuple(kept.shape)} when this Pruner or plan was made, and "
                    f"now has {tuple(shape[: kept.ndim])}: make a new Pruner after a shrink"
                )

    @property
    def residual(self) -> bool:
        """Whether the channels of some layer end in a sum."""
        return any(layer is not None and layer.summed for layer in self._units.values())

    def prune(self, sparsity: float, batches: Iterable[Any] | None = None) -> Pruning:
        """:meth:`plan` and :meth:`apply`: remove units until the share ``sparsity`` of all is pruned.

        Raises:
            ValueError: as :meth:`plan`. The model is then untouched.
        """
        pruning = self.plan(sparsity, batches)
        if (
            sparsity
            and self._protocol_name == "default"
            and all(map(torch.equal, pruning.alive.values(), self.alive.values()))
        ):
            warn(
                f"nothing is pruned: a sparsity of {sparsity:.1%} was asked for, and {pruning.sparsity:.1%} of "
                "all units are already gone. Sparsity includes earlier prunings: share_left(sparsity, rounds, "
                "round) says what is to be left after each of several rounds"
            )
        self.apply(pruning)
        return pruning

    def plan(self, sparsity: float, batches: Iterable[Any] | None = None) -> Pruning:
        """Score all units, and say which to prune so that the share ``sparsity`` is pruned; the model is not changed.

        If as much is already pruned, nothing more is.

        Raises:
            ValueError: sparsity outside [0, 1), or more than the floors allow; a measure without the data it needs;
                scores that are not finite; or a model that was shrunk since this Pruner was made.
        """
        check_sparsity(sparsity)
        self._check_sizes(self.alive)
        shape, batches = _input_shape(batches)
        found = scores(self._model, batches, self._measure.name, protected=self._protected, **self._settings)
        self.alive = self._standing()  # others may prune the model, too: another Pruner, apply_masks
        ranked = {name: self._ranked(name, values.cpu().double().flatten()) for name, values in found.items()}
        standing = {name: layer.standing for name, layer in ranked.items()}
        quota = self._possible(ranked, sparsity)
        gone = lowest(ranked, quota, ties=self._protocol.prune_ties)
        alive = {name: kept.view(self.alive[name].shape) for name, kept in without(standing, gone).items()}
        reached = 1 - count_left(alive) / sum(kept.numel() for kept in alive.values())
        found = {name: values.cpu() for name, values in found.items()}
        return Pruning(found, alive, sparsity, reached, *self._costs(alive, shape), self._described(batches))

    def check(self, sparsity: float) -> None:
        """Raise ValueError where the network, as it is, cannot be pruned to this sparsity; no scores are needed."""
        check_sparsity(sparsity)
        unscored = {
            name: torch.zeros(alive.numel(), dtype=torch.float64, device="cpu") for name, alive in self.alive.items()
        }
        self._possible({name: self._ranked(name, zeros) for name, zeros in unscored.items()}, sparsity)

    def apply(self, pruning: Pruning) -> None:
        """Silence for good the units that a plan prunes, and mask or drop the optimizer's state.

        Raises:
            ValueError: the model was shrunk since the plan was made, or the state that is kept is quantised. The model
                is then untouched.
        """
        self._check_sizes(pruning.alive)
        model = unwrap(self._model)
        if not self._keep_state:
            drop_state(self._optimizers, model.parameters())
        apply_masks(model, self._touched(pruning.alive), *self._optimizers)
        if self._protocol.revive_silenced:
            lift_masks(model, masks_of(model, self._units, pruning.alive))
        self.alive = self._standing()

    def _possible(self, ranked: dict[str, Ranked], sparsity: float) -> int:
        """How many units are to be pruned.

        Raises:
            ValueError: more than the floors allow.
        """
        quota = self._quota(ranked, sparsity)
        if quota > (most := capacity(ranked)):
            raise ValueError(
                f"sparsity {sparsity} asks for {quota} more units to be pruned, but only {most} can be: every "
                f"layer keeps {self._kept_anyway()}, and protected layers keep all; choose a lower sparsity"
            )
        return quota

    def _kept_anyway(self) -> str:
        """What every layer keeps, in words."""
        units = f"of its {self._settings['granularity']}s"
        if self._protocol.floor_by_index and not self.residual:
            return f"the last 5% {units}, rounded down, and one more"
        return f"{self._floor:.0%} {units}, at least one" if self._floor else f"one {units}"

    def _ranked(self, name: str, values: Tensor) -> Ranked:
        """A layer as the ranking sees it, by the protocol's rules; ``values`` are its scores, (unit,)."""
        layer, standing = self._units[name], self.alive[name].flatten()
        if self._protocol.revive_silenced and layer.summed:
            standing = torch.ones_like(standing)
        if not torch.isfinite(values[standing]).all():
            raise ValueError(
                f"the scores of {self._measure.name} are not finite in layer {name!r}: check whether the training "
                "has diverged"
            )
        by_index = self._protocol.floor_by_index and not self.residual
        return Ranked(
            scores=-values if self._measure.highest_first else values,
            standing=standing,
            keep=int(0.05 * len(values)) + 1 if by_index else max(1, math.ceil(self._floor * len(values))),
            by_index=by_index,
            weight=1 + layer.copies if self._protocol.count_copies else 1,
            movable=layer is None or not (layer.head or name in getattr(unwrap(self._model), "protected", ())),
        )

    def _quota(self, ranked: dict[str, Ranked], sparsity: float) -> int:
        """How many more units are to be pruned, each counted with its layer's weight."""
        total = sum(layer.weight * len(layer.standing) for layer in ranked.values())
        left = sum(layer.weight * int(layer.standing.sum()) for layer in ranked.values())
        return max(left - round(total * (1 - sparsity)), 0)

    def _costs(self, alive: dict[str, Tensor], shape: Sequence[int] | None) -> tuple[Cost | None, Cost | None]:
        """Cost of the network after the pruning, and before anything was pruned; None if no suitable input is known."""
        if shape is None:
            return None, None
        model = unwrap(self._model)
        try:
            if self._dense is None:
                self._dense = network_cost(model, shape, {})
            masks = {} if self._protocol.revive_silenced else parameter_masks(model)
            planned = {name: kept & masks.get(name, kept) for name, kept in self._touched(alive).items()}
            return network_cost(model, shape, masks | planned), self._dense
        except Exception:  # the model takes other inputs than the batch's first tensor alone: only the objective knows
            return None, None

    def _described(self, batches: Iterable[Any] | None) -> dict[str, str | float]:
        described: dict[str, str | float] = {
            "measure": self._measure.name,
            "granularity": self._settings["granularity"],
            "protocol": self._protocol_name,
        }
        if self._measure.needs_data:
            described |= {"score_mode": self._settings["mode"], "score_temperature": self._settings["temperature"]}
            if isinstance(batches, Sequence):
                described["score_samples"] = sum(map(sample_count, batches))
        return described

    def _touched(self, alive: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name → which of its entries are kept, for layers that have lost units."""
        lessened = {name: kept for name, kept in alive.items() if not kept.all()}
        return masks_of(unwrap(self._model), self._units, lessened)


def _check_trained(model: nn.Module, optimizers: Sequence[Any]) -> None:
    """Raise ValueError if no optimizer holds a parameter of the model."""
    groups = [group for one in optimizers for group in getattr(one, "param_groups", ())]  # a wrapper may have none
    if groups and not has_any(model, (parameter for group in groups for parameter in group["params"])):
        raise ValueError(
            "the optimizer holds none of the model's parameters, so another one would move what is pruned: "
            "pass the optimizer that trains this model, created with its present parameters"
        )


def _input_shape(batches: Iterable[Any] | None) -> tuple[torch.Size | None, Iterable[Any] | None]:
    """The shape of an input without the batch dimension, and all batches.

    The shape is None unless the first entry of the first batch is a floating-point tensor.
    """
    if batches is None:
        return None, None
    iterator = iter(batches)
    first = next(iterator, None)
    if iterator is batches and first is not None:
        batches = itertools.chain([first], iterator)
    known = isinstance(first, Sequence) and isinstance(first[0], Tensor) and first[0].is_floating_point()
    return first[0].shape[1:] if known else None, batches
