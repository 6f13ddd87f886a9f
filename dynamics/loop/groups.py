"""The optimizers' parameter groups: which parameters they hold, and the learning rate, flow time and decay of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..float64 import widened
from ..network.blocks import Vector, is_any_missing
from ..network.layers import Layers
from ..network.optimizers import does_more
from ..warning import warn

Group = Mapping[str, Any]


class _Settings(NamedTuple):
    """A group's settings right before its optimizer stepped: a scheduler may change them right after."""

    rate: float
    flow_step: float
    decay: float


class _CachedSetting(NamedTuple):
    """One setting of each group that is trained, and the same per layer or block: cached, because it seldom changes."""

    trained: Mapping[int, Group]
    groups: list[Group]
    numbers: list[float] | None = None
    over: Any = None


class Groups:
    """The parameter groups of one or more optimizers, by parameter and by layer; looked up again when they change.

    A parameter is trained in a step if an optimizer that stepped holds it and was given a gradient for it. ``given``
    are the optimizers as the user passed them, each itself or what steps through it.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], given: Sequence[Any], layers: Layers) -> None:
        self._optimizers, self._layers = optimizers, layers
        self._rescaling = [
            one
            for one, outer in zip(optimizers, given, strict=True)
            if _rescales(one) or (outer is not one and does_more(outer))
        ]
        self._of: tuple | None = None
        self._rest: dict[tuple[int, ...], list[int]] = {}
        self._rescaled: set[int] = set()  # groups, by id, of optimizers that do not step along the gradient
        self.outside: list[torch.nn.Parameter] = []  # parameters that are not the model's, such as a loss's own
        self._trained: list[Mapping[int, Group]] = [{} for _ in optimizers]
        self._settings: dict[int, _Settings] = {}  # by the group's id
        self._known: dict[str, _CachedSetting] = {}  # the last of each kind
        self._decays: list[object] = []  # what the groups were, and the decay of each parameter
        self._decay = torch.empty(0)

    @property
    def several(self) -> bool:
        """Whether there are several optimizers."""
        return len(self._optimizers) > 1

    def refresh(self) -> None:
        """Look up which group each parameter is in, if a group or the model changed."""
        groups = [group for one in self._optimizers for group in one.param_groups]  # load_state_dict replaces them
        now = (self._layers.version, *((id(group), *map(id, group["params"])) for group in groups))
        if now == self._of:
            return
        known, self._of = self._of, now
        self._rescaled = {id(group) for one in self._rescaling for group in one.param_groups}
        index_of = {id(parameter): index for index, parameter in enumerate(self._layers.parameters)}
        self._group_of = [
            {
                index_of[id(parameter)]: group
                for group in one.param_groups
                for parameter in group["params"]
                if id(parameter) in index_of
            }
            for one in self._optimizers
        ]
        held = {id(parameter): parameter for group in groups for parameter in group["params"]}
        if known is not None and not self._layers.has_any(held.values()):
            warn(
                "the optimizer that the recorder was given no longer holds any of the model's parameters, so it "
                "trains nothing: they were replaced, as load_state_dict(assign=True) does. Create the optimizer "
                "after that"
            )
        every = list(range(len(self._layers.parameters)))
        self._held = [None if list(groups) == every else list(groups) for groups in self._group_of]
        self.outside = [parameter for key, parameter in held.items() if key not in index_of]
        self._rest = {}

    def parameters(self) -> list[Tensor]:
        """The model's parameters that an optimizer holds now."""
        held = set(map(id, self.of_anything()))
        return [parameter for parameter in self._layers.parameters if id(parameter) in held]

    def of_anything(self) -> list[torch.nn.Parameter]:
        """All parameters that an optimizer holds now, those outside the model included."""
        return [one for of in self._optimizers for group in of.param_groups for one in group["params"]]

    def held(self, number: int) -> list[int] | None:
        """Indices of the parameters that an optimizer holds; None if that is all of them, in their order."""
        return self._held[number]

    def rest(self, stepped: Sequence[int]) -> list[int]:
        """Indices of the parameters that no optimizer which stepped holds."""
        if tuple(stepped) not in self._rest:
            held = {index for number in stepped for index in self._group_of[number]}
            self._rest[tuple(stepped)] = [i for i in range(len(self._layers.parameters)) if i not in held]
        return self._rest[tuple(stepped)]

    def note_settings(self, number: int) -> None:
        """Note the settings of an optimizer's groups; it is about to step by these."""
        for group in self._optimizers[number].param_groups:
            self._settings[id(group)] = _Settings(_rate(group), self._flow_step(group), _decay(group))

    def gradient(self, number: int, into: Vector) -> None:
        """Copy g of an optimizer's parameters, as it will be applied: without a gradient scaler's factor."""
        groups, held, parameters = self._group_of[number], self._held[number], self._layers.parameters
        grads = [one.grad for one in (parameters if held is None else [parameters[index] for index in held])]
        into.take(grads, among=held)
        if is_any_missing(grads):
            pairs = zip(groups.items(), grads, strict=True)
            groups = {index: group for (index, group), grad in pairs if grad is not None}
        self._trained[number] = groups
        scale = getattr(self._optimizers[number], "grad_scale", None)  # set during a fused step only
        if scale is not None:
            torch._foreach_div_(into.views if held is None else [into.views[index] for index in held], scale)

    def skips(self, number: int) -> Tensor | None:
        """1 if a gradient scaler makes an optimizer skip its step, else 0; None if unknown, as outside a fused step."""
        found = getattr(self._optimizers[number], "found_inf", None)
        return None if found is None else widened(found.detach().reshape(()))

    def trained(self, stepped: Sequence[int]) -> Mapping[int, Group]:
        """The group of each parameter that the optimizers trained when they ``stepped``, by the parameter's index."""
        if len(stepped) == 1:
            return self._trained[stepped[0]]
        return {index: group for number in stepped for index, group in self._trained[number].items()}

    def learning_rate(self, trained: Mapping[int, Group]) -> np.ndarray:
        """η of each layer, (layer,): 0 where nothing is trained, NaN where a layer's parameters differ in it.

        It is NaN, too, where the optimizer's groups have no learning rate.
        """
        return self._spread(trained, "rate", self._by_layer)

    def flow_step(self, trained: Mapping[int, Group]) -> np.ndarray:
        """Flow time of a step in each layer, (layer,), as :meth:`learning_rate`; NaN where the optimizer has none."""
        return self._spread(trained, "flow_step", self._by_layer)

    def decay(self, trained: Mapping[int, Group]) -> Tensor:
        """Weight decay λ of each block, (block,); 0 where nothing is trained. Sent to the device only on a change."""
        return self._spread(trained, "decay", self._by_block)

    def _spread(
        self,
        trained: Mapping[int, Group],
        number: str,
        over: Callable[[Mapping[int, float]], Any],
    ) -> Any:
        """``over`` of the setting called ``number``, by index of each trained parameter; computed anew on a change."""
        known = self._known.get(number)
        if known is None or known.trained is not trained:
            known = _CachedSetting(trained, list({id(group): group for group in trained.values()}.values()))
        numbers = [getattr(self._settings[id(group)], number) for group in known.groups]
        if known.numbers != numbers:
            of_group = dict(zip(map(id, known.groups), numbers, strict=True))
            found = over({index: of_group[id(group)] for index, group in trained.items()})
            known = self._known[number] = known._replace(numbers=numbers, over=found)
        return known.over

    def _by_layer(self, rates: Mapping[int, float]) -> np.ndarray:
        found: list[set[float]] = [set() for _ in self._layers.names]
        for index, rate in rates.items():
            found[self._layers.layer_of_parameter[index]].add(rate)
        return np.array([0.0 if not rates else rates.pop() if len(rates) == 1 else np.nan for rates in found])

    def _by_block(self, decays: Mapping[int, float]) -> Tensor:
        of_each = [decays.get(index, 0.0) for index in range(len(self._layers.parameters))]
        if [self._of, *of_each] != self._decays:
            self._decays = [self._of, *of_each]
            self._decay = self._layers.per_block(of_each)
        return self._decay

    def first(self) -> tuple[int, float]:
        """Layer of the first optimizer's first parameter in the model, and flow time of a step in its first group."""
        self.refresh()
        first = next(iter(self._group_of[0]), 0)
        return self._layers.layer_of_parameter[first], self._flow_step(self._optimizers[0].param_groups[0])

    def first_flow_step(self) -> float:
        """Flow time of the last step in the first optimizer's first group; before any step, of the next one."""
        group = self._optimizers[0].param_groups[0]
        said = self._settings.get(id(group))
        return self._flow_step(group) if said is None else said.flow_step

    def _flow_step(self, group: Group) -> float:
        """Flow time of a step: η, or with SGD's momentum β its long-run sum η(1−dampening)/(1−β).

        It is negative for gradient ascent, and NaN for optimizers that do not step along the gradient.
        """
        if id(group) in self._rescaled:
            return np.nan
        momentum = _number(group.get("momentum"))
        rate = -_rate(group) if group.get("maximize") else _rate(group)
        return rate * (1 - _number(group.get("dampening"))) / (1 - momentum) if 0 < momentum < 1 else rate

    def ascend(self) -> bool:
        """Whether a group maximizes the objective."""
        return any(group.get("maximize") for one in self._optimizers for group in one.param_groups)


def _rate(group: Group) -> float:
    return _number(group.get("lr"), np.nan)


def _decay(group: Group) -> float:
    return _number(group.get("weight_decay"))


def _number(value: Any, absent: float = 0.0) -> float:
    """A setting as a float: ``absent`` if it is None, NaN if it is not a number."""
    try:
        return absent if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        return np.nan


def _rescales(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps may leave the gradient's direction: only SGD, and subclasses with SGD's own step, never do."""
    return inspect.unwrap(type(optimizer).step) is not inspect.unwrap(torch.optim.SGD.step)
