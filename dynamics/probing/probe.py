"""Evaluates an objective at any parameters without side effects on buffers, random numbers, mode or gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.expansion import Expansion, mean_gradient, mean_loss
from ..curvature.gates import Products, gated_products
from ..curvature.graph import hooks_on_tensors, lend_on_the_way_back, may_run_again, rounding
from ..curvature.ordinary import masked, with_masked_gradient
from ..hardware.memory_order import channels_first
from ..network.exchanged import exchanged
from ..network.hooks import unlogged
from ..network.masks import parameter_masks
from ..network.wrappers import forward_unwrapped, unwrap
from .batch import as_measured, copied, layout, sample_count, tensors_of, to_device
from .differentiable import differentiable_twice
from .lending import may_keep
from .mode import mode_of
from .moment import Moment
from .objective import Objective, scalar

Theta = Mapping[str, Tensor]


class Probe:
    """An objective on fixed batches as a function of the parameters.

    Buffers, pruning masks and plain attributes of modules are those of the moment when the probe is made, or of the
    given ``moments``, one per batch, whatever happens to the model later. Every evaluation leaves them and the random
    generators as they are (BatchNorm in training mode updates no running statistics), draws the moment's random numbers
    (the dropout mask of the training step), and masks the gradients: a pruned parameter is a constant, zero unless
    something moves it all the same, so it has no gradient; nor has a frozen one (``requires_grad=False``), or one that
    the forward pass itself replaces by another. Batches are weighted by their number of samples, or equally, or
    :meth:`in_shares`. Nothing runs compiled, because compiled code has no second derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        batches: Sequence[Any],
        *,
        mode: str | None = None,
        moments: Sequence[Moment] | None = None,
        by_samples: bool = True,
    ) -> None:
        self._model = unwrap(model)
        self._mode = mode
        self._objective = objective
        self._device = next(self._model.parameters()).device
        moments = moments or [Moment(self._model, self._device, objective)] * len(batches)
        counts = [sample_count(batch) if by_samples else 1 for batch in batches]
        counts = counts if any(counts) else [1] * len(counts)  # all batches are empty
        self._weights = [count / sum(counts) for count in counts]
        self._masks = {name: mask.clone() for name, mask in parameter_masks(self._model).items()}
        self._moved = frozenset(_off_zero(self._model, self._masks))
        self._trained = {name for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        if not self._trained:  # a loop may freeze its network again before the optimizer steps, as StyleGAN's does
            self._trained = set().union(*(moment.trained for moment in moments))
        self._at = list(zip(batches, moments, strict=True))
        for moment in moments:
            moment.look_for_replaced()
        self._fixed = False
        self.others: set[nn.Module] = set()  # modules outside the model that evaluations have run
        self.own_operations = False  # whether the loss goes through operations or hooks of someone's own
        self.rounding = 0.0  # of the loss, if so: the unit of the coarsest type on the way
        self.doubted = False  # whether evaluations look for what modules or the objective count, in milliseconds
        self.repeatable = True  # unless an evaluation drew random numbers, or what it ran keeps or shares something

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._at)

    @property
    def device(self) -> torch.device:
        """Device on which the objective is evaluated."""
        return self._device

    @property
    def trained(self) -> set[str]:
        """Names of the parameters that are not constants."""
        return self._trained

    @property
    def moved_others(self) -> set[nn.Module]:
        """Modules outside the model that were evaluated with other parameters than they had at the moment."""
        return {module for _, moment in self._at for module in moment.moved_others}

    @property
    def kind(self) -> Hashable:
        """All that determines, besides model and objective, which operations an evaluation runs; None if unknown."""
        try:
            batches = [(layout(batch), moment.layout()) for batch, moment in self._at]
        except TypeError:
            return None
        modes = [module.training for module in self._model.modules()]
        settings = tuple(modes), self._mode, tuple(self._masks), self._moved, frozenset(self._trained)
        return tuple(batches), self.shares, *settings

    @property
    def shares(self) -> tuple[float, ...]:
        """Each batch's share in the mean."""
        return tuple(self._weights)

    @property
    def share(self) -> float:
        """Sum of its batches' shares in the mean: 1, unless it is one of several replicas' probes :meth:`in_shares`."""
        return sum(self._weights)

    def in_shares(self, shares: Sequence[float]) -> Probe:
        """The probe with its batches in these shares of the mean."""
        probe = copy.copy(self)
        probe._weights = list(shares)
        return probe

    def one_by_one(self) -> Iterator[Probe]:
        """A probe of each of its batches."""
        for at in self._at:
            probe = self.in_shares([1.0])
            probe._at = [at]
            yield probe

    def fixed(self) -> Probe:
        """The probe itself; from now on all it reads has fixed addresses on the device, and random numbers are ignored.

        Its evaluations may be captured then, if the model draws none and keeps no state outside its buffers.
        """
        self._fixed = True
        self._at = [(to_device(batch, self._device), moment) for batch, moment in self._at]
        return self

    def free(self) -> None:
        """Undo :meth:`fixed`."""
        self._fixed = False

    def take(self, other: Probe) -> None:
        """Copy batches, moments and masks of another probe of the same kind into this one's tensors, in place."""
        for (batch, moment), (from_batch, from_moment) in zip(self._at, other._at, strict=True):
            for into, tensor in zip(tensors_of(batch), tensors_of(from_batch), strict=True):
                into.copy_(tensor, non_blocking=True)
            moment.take(from_moment)
        for name, mask in self._masks.items():
            mask.copy_(other._masks[name])

    @property
    def _losses(self) -> list[Callable[..., Tensor]]:
        """L_b as a function of θ, one per batch; not cached, because a probe that refers to itself would live on."""
        return [partial(self._loss, batch, moment) for batch, moment in self._at]

    def _loss(
        self,
        batch: Any,
        moment: Moment,
        theta: Theta,
        *,
        zero: Collection[str] = (),
        present: Collection[Tensor] = (),
    ) -> Tensor:
        """The loss at θ; in the parameters named in ``zero``, pruned entries are known to be zero.

        Parameters of other modules are those of the moment, unless they are ``present``.
        """
        fixed = {name: frozen.clone() for name, frozen in moment.frozen.items()}
        free = {name: t if name in self._trained else fixed.get(name, t).detach() for name, t in theta.items()}
        free |= {name: replaced.clone() for name, replaced in moment.replaced.items() if name in free}
        pruned = {
            name: (masked if name in zero else with_masked_gradient)(free[name], mask)
            for name, mask in self._masks.items()
            if name in free
        }
        values = free | pruned | moment.buffers()
        again: AbstractContextManager[set[nn.Module]] = (
            nullcontext(set()) if self._fixed else moment.again(present=present, look=self.doubted and self.repeatable)
        )
        with differentiable_twice(), again as others, forward_unwrapped(self._model), _without_gradients(self._model):
            given = as_measured(copied(batch), self._device)
            with (
                exchanged(self._model, values),
                mode_of(self._model, self._mode),
                unlogged(self._model),
                hooks_on_tensors() as hooks,
            ):
                loss = self._objective(self._model, given)
            self.others |= others
            if hooks:
                self.repeatable, self.own_operations = False, True
            if self.repeatable and not self._fixed:
                kept = moment.shares_parameters or any(map(may_keep, self.others))
                self.repeatable = not (moment.drawn() or kept or (self.doubted and moment.counted()))
            loss = scalar(loss)
            if may_run_again(loss, self._model.parameters()):
                self.repeatable, self.own_operations = False, True
                now = Moment(self._model, self._device, self._objective)
                lend_on_the_way_back(loss, partial(self._lent, values, now))
            if self.own_operations:
                self.rounding = max(self.rounding, rounding(loss))
        self.repeatable = self.repeatable and not moment.changed_beside
        return loss

    @contextmanager
    def _lent(self, values: Theta, moment: Moment) -> Iterator[None]:
        """Inside, the model has the tensors it was evaluated with, and the state after that: for backward passes."""
        with differentiable_twice(), moment.again(), exchanged(self._model, values), mode_of(self._model, self._mode):
            yield

    def _theta(self, theta: Theta | None) -> Theta:
        """θ: the given parameters and, for the others, the model's present ones; each in the parameter's type.

        Integer parameters, such as packed weights, are no coordinates of θ: they stay as they are.
        """
        given = theta or {}
        own = [
            (name, one) for name, one in self._model.named_parameters() if one.is_floating_point() or one.is_complex()
        ]
        typed = {name: given.get(name, parameter).detach().to(parameter.dtype) for name, parameter in own}
        return {name: channels_first(tensor) for name, tensor in typed.items()}

    def expand(self, theta: Theta | None = None) -> Expansion:
        """Loss, gradient and Hessian products around θ, by default the model's present parameters."""
        return Expansion(self._losses, self._weights, self._theta(theta))

    def loss(self, theta: Theta | None = None, *, present: Collection[Tensor] = ()) -> Tensor:
        """Mean loss at θ, by default the model's present parameters, with these ``present`` ones of other modules."""
        losses = [partial(loss_of, present=present) for loss_of in self._losses]
        return mean_loss(losses, self._weights, self._theta(theta))

    def gradient(self, theta: Theta) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss at θ and its gradient, by parameter name."""
        theta = self._theta(theta)
        loss, grad = mean_gradient(self._losses, self._weights, theta)
        return loss, dict(zip(theta, grad, strict=True))

    def products(self, theta: Theta, directions: Sequence[Theta], layer_of: Mapping[str, int], layers: int) -> Products:
        """Second derivatives of the mean loss at θ along directions, by layer, as ``gated_products`` returns them.

        A parameter that is not in ``layer_of`` is constant. Entries that were pruned, and zero, when the probe was made
        have to be zero at θ, too.
        """
        theta = self._theta(theta)
        frozen = {name for name in theta if name not in self._trained or name not in layer_of}
        known = [name for name in theta if name not in frozen]
        whole = [
            {name: channels_first(direction[name].to(theta[name].dtype)) for name in known} for direction in directions
        ]
        total: list[Tensor] | None = None
        zero = self._masks.keys() - self._moved  # a parameter times a mask keeps its gates, which is cheaper
        losses = [partial(loss_of, zero=zero) for loss_of in self._losses]
        for loss_of, weight in zip(losses, self._weights, strict=True):
            products = gated_products(loss_of, theta, whole, layer_of, layers, frozen=frozen)
            parts = [weight * part for part in products]
            total = parts if total is None else [one + other for one, other in zip(total, parts, strict=True)]
        return Products(*total)


def _off_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters whose pruned entries something has moved off zero.

    Not of those that the model masks itself, as torch.nn.utils.prune does.
    """
    parameters, own = dict(model.named_parameters()), [name for name in masks if not name.endswith("_orig")]
    moved = [((parameters[name] != 0) & ~masks[name]).any() for name in own]
    return [name for name, off in zip(own, _listed(moved), strict=True) if off]


def _listed(booleans: Sequence[Tensor]) -> list[bool]:
    """Scalar tensors as Python booleans, with a single wait for the GPU."""
    return torch.stack([one.to(booleans[0].device) for one in booleans]).tolist() if booleans else []


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, the parameters' ``.grad`` is None, because the objective may zero them; afterwards they are restored.

    Torch's ``zero_grad()`` of the model does nothing: the tensors that stand in for its parameters have no ``.grad``,
    and torch warns of whoever looks for one.
    """
    owners = [one for one in model.parameters() if one.is_leaf and one.grad is not None]
    alike = [one for one in owners if (one.shape, one.dtype) == (one.grad.shape, one.grad.dtype)]  # can be restored
    grads = [(parameter, parameter.grad) for parameter in alike]
    attributes = vars(model)
    is_torchs = type(model).zero_grad is nn.Module.zero_grad and "zero_grad" not in attributes
    try:
        if is_torchs:
            attributes["zero_grad"] = _zero_nothing
        for parameter, _ in grads:
            parameter.grad = None
        yield
    finally:
        if is_torchs:
            attributes.pop("zero_grad", None)
        for parameter, grad in grads:
            parameter.grad = grad


def _zero_nothing(set_to_none: bool = True) -> None:
    pass
