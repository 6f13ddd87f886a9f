"""A step at a probe of its batches: the loss's own gradient, and curvature along that and along the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .. import schema
from ..curvature.expansion import Expansion, lacks_derivative
from ..errors import named
from ..loop.groups import Groups
from ..loop.processes import Processes
from ..network.layers import Layers
from ..probing.probe import Probe
from ..quantities import FORMULAS, Vectors
from .step import Measurement
from .warn_once import WarnOnce

_ENTRIES = 2**16  # of gradients that are compared
_ROUNDING = 1e-4  # of shares
_SECOND = tuple(row.name for row in schema.quantities("curvature") if row.order == 2)


class ProbedStep:
    """What a probe says of the ``step`` that is measured: the quantities of ``/curvature`` that were asked for."""

    def __init__(
        self, step: Measurement, layers: Layers, groups: Groups, processes: Processes, names: Sequence[str]
    ) -> None:
        self._step, self._layers, self._groups, self._processes = step, layers, groups, processes
        self._names = [name for name in names if name in FORMULAS]
        self._others = [name for name in names if name not in FORMULAS]
        self._outside: list[tuple[Tensor, Tensor]] = []
        self._warn_once = WarnOnce()
        self._of_own_operations = 0  # how many steps were, so far

    @property
    def places(self) -> tuple[int, ...] | None:
        """Where in memory a probe finds the parameters; None where these places do not tell all.

        The loss may have parameters of its own, which are put back each time, and sparse ones have several places.
        """
        if self._outside or any(parameter.layout is not torch.strided for parameter in self._layers.parameters):
            return None
        return self._layers.version, *(parameter.data_ptr() for parameter in self._layers.parameters)

    @property
    def on_one_gpu(self) -> bool:
        """Whether all parameters are on one GPU."""
        return self._layers.on_one_gpu

    def gradient(self, probe: Probe) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss before the step and its own gradient g, by parameter name."""
        with self._outside_as_before():
            return probe.gradient(self._layers.named(self._step.theta))

    def keep_outside(self) -> None:
        """Keep what the optimizers train beside the model: the step moves it, and the loss may depend on it."""
        self._outside = [(parameter, parameter.detach().clone()) for parameter in self._groups.outside]

    @contextmanager
    def _outside_as_before(self) -> Iterator[None]:
        after = [(parameter, parameter.detach().clone()) for parameter, _ in self._outside]
        try:
            for parameter, before in self._outside:
                parameter.copy_(before)
            yield
        finally:
            for parameter, present in after:
                parameter.copy_(present)

    def mean(self, grad: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of a gradient over replicas."""
        return dict(zip(grad, self._processes.mean(list(grad.values())), strict=True))

    def alignment(self, grad: dict[str, Tensor]) -> tuple[float, float]:
        """Cosine of a gradient with the one applied, over what was trained; 0 if it is zero in all of that.

        And the mean of the layers' cosines, weighted by what was applied there, for layers may be clipped each by
        itself. Each is that of the gradient as it is or, where that is nearer, clipped by value as the applied one is.
        NaN where it is not finite, or nothing was applied. Its sign says nothing where an optimizer ascends: a loss may
        have been turned around for that.
        """
        own = self._layers.vector(grad, without=self._step.rest)
        found = torch.stack([self._cosines(own), self._cosines(_clipped_as(self._step.grad.blocks, own))])
        return tuple((found.abs() if self._groups.ascend() else found).amax(0).tolist())

    def _cosines(self, own: Tensor) -> Tensor:
        """Of a gradient with the one applied: over all, and the mean over layers, (2,)."""
        names = ("grad_applied_grad", "grad_sqnorm", "applied_grad_sqnorm")
        vectors = Vectors(grad=own, applied=self._step.grad.blocks)
        product, square, applied = self._layers.evaluate(names, vectors).values()
        lengths = (square[applied != 0].sum() * applied.sum()).sqrt()
        cosine = product.sum() / lengths.where((lengths != 0) | ~(applied.sum() > 0), 1.0)
        in_layers = product / square.sqrt().where(square != 0, 1.0)
        return torch.stack([cosine, in_layers.sum() / applied.sqrt().sum()])

    def shares(self, probe: Probe) -> list[float]:
        """In what shares the gradients of a probe's batches add up to the one applied, but for its length; or [].

        Least squares over some of their entries. A step may be of other batches all the same: the gradient in these
        shares tells.
        """
        applied = self._step.grad.blocks
        some = slice(None, None, applied.numel() // _ENTRIES | 1)  # odd, for parameters begin at multiples of 1024
        columns = []
        for one in probe.one_by_one():
            grad = self._layers.vector(self.gradient(one)[1], without=self._step.rest)
            columns.append(grad.flatten()[some].double().cpu())
        grads, target = torch.stack(columns, 1), applied.flatten()[some].double().cpu()
        if grads.any(1).sum() < 2 * len(probe) or not (grads.isfinite().all() and target.isfinite().all()):
            return []  # so few entries may add up to anything
        found = torch.linalg.lstsq(grads, target[:, None]).solution[:, 0]
        if found.max() <= 0 or found.min() < -_ROUNDING * found.max():
            return []
        shares = found.clamp(min=0)
        return (shares / shares.sum()).tolist()

    def curvature_values(self, probe: Probe, loss: Tensor, grad: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quantities of ``/curvature``, each (layer,), or a scalar."""
        vectors = Vectors(
            theta=self._step.theta.blocks,
            grad=self._layers.vector(grad),
            update=self._step.update.blocks,
            applied=self._step.grad.blocks,
        )
        values = self._layers.evaluate([name for name in self._names if name not in _SECOND], vectors)
        if second := [name for name in self._names if name in _SECOND]:
            with self._outside_as_before():
                values |= self._second_order(probe, grad, vectors, second)
        others = {
            "loss_before": lambda: loss,
            "loss_after": lambda: probe.loss(self._after()),
            "approximate": lambda: torch.zeros(()),
        }
        return {name: others[name]() for name in self._others} | values

    def unless_frozen_move(self, probe: Probe, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quantities of ``/curvature``; those along the step are NaN where it moves what the probe holds fixed."""
        update = self._layers.named(self._step.update)
        moved = {name: part.nan_to_num(0).any() for name, part in update.items() if name not in probe.trained}
        if not (moved and torch.stack(list(moved.values())).any()):
            return values
        name = next(name for name, moves in moved.items() if moves)
        self._warn_once(
            f"curvature along steps that move frozen parameters, {name!r} first, is NaN: they have no gradient. By "
            "momentum or weight decay an optimizer moves them on where .grad is zero and not None; zero_grad() makes "
            "it None",
            "frozen",
        )
        unknown = [name for name in ("grad_update", "update_hess_update") if name in values]
        return values | {name: torch.full_like(values[name], torch.nan) for name in unknown}

    def _after(self) -> dict[str, Tensor] | None:
        """θ + Δθ by parameter name; None where the model still has it.

        A step of some of several optimizers ends when the next begins, and much may have happened until then.
        """
        if not self._groups.several:
            return None
        after = self._layers.zeros()
        torch.add(self._step.theta.blocks, self._step.update.blocks, out=after.blocks)
        return self._layers.named(after)

    def _second_order(
        self, probe: Probe, grad: dict[str, Tensor], vectors: Vectors, names: list[str]
    ) -> dict[str, Tensor]:
        values = self._by_gates_or_products(probe, grad, vectors, names)
        if probe.own_operations and "grad_hess_grad" in values:
            self._of_own_operations += 1
            if self._of_own_operations.bit_count() == 1:  # the 1st, 2nd, 4th...: it may pass on more as time goes on
                self._compare(probe, grad, values["grad_hess_grad"])
        return values

    def _by_gates_or_products(
        self, probe: Probe, grad: dict[str, Tensor], vectors: Vectors, names: list[str]
    ) -> dict[str, Tensor]:
        try:
            return self._by_gates(probe, grad, names)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not lacks_derivative(error):
                self._warn_once(
                    f"curvature by gates failed with {named(error)}; Hessian products, slower, take their place",
                    "gates",
                )
            return self._by_products(probe, grad, vectors, names)

    def _compare(self, probe: Probe, grad: dict[str, Tensor], grad_hess_grad: Tensor) -> None:
        """Say, once, where the change of the loss along g is not what g says, or gᵀHg not the change of g.

        Some operations pass on another gradient than their own, and some backward passes have no derivative.
        """
        theta = self._layers.named(self._step.theta)
        length, size = (float(torch.nn.utils.get_total_norm(list(one.values()))) for one in (grad, theta))
        if not length:  # nothing is passed on
            return
        exact, bound = float(grad_hess_grad.sum()), float(grad_hess_grad.abs().sum())
        rounding = probe.rounding
        # far enough for rounding, near enough for g to change by a part of it
        epsilon = min(rounding ** (1 / 3) * (1 + size) / max(length, 1e-300), length**2 / max(100 * bound, 1e-300))
        losses, slopes = zip(
            *(self._along(probe, theta, grad, distance) for distance in (-epsilon, 0.0, epsilon)), strict=True
        )
        noise, passed_on = 10 * rounding / epsilon, slopes[1]
        bent = abs(slopes[0] + slopes[2] - 2 * slopes[1]) / 2
        slope, change = (losses[2] - losses[0]) / (2 * epsilon), (slopes[2] - slopes[0]) / (2 * epsilon)
        rounded = max(abs(losses[1]), 1.0)  # a loss near zero is what is left of numbers that are not
        if _differ(passed_on, slope, 0.05, noise * rounded + bent):
            self._warn_once(
                "an operation or hook of your own passes on another gradient than that of what it computes, as do "
                f"gradient reversal and straight-through estimators: along g the loss changes by {slope:.4g}, and by "
                f"{passed_on:.4g} as g says. Predictions of how the loss changes are by the gradient that is passed "
                "on, not of the loss that is measured, and it has no curvature",
                "own gradient",
            )
        elif self._of_own_operations == 1 and _differ(exact, change, 0.1, noise * length**2 + 3 * bent / epsilon):
            self._warn_once(
                "curvature of an operation of your own is not the change of its gradient: gᵀHg is "
                f"{exact:.4g} by its backward pass, and {change:.4g} by differences of gradients. One that passes on "
                "another gradient than its own has none; one whose backward pass, or hook on a tensor, autograd cannot "
                "differentiate says so as a function with @torch.autograd.function.once_differentiable, and "
                "differences are recorded",
                "own operation",
            )

    def _along(
        self, probe: Probe, theta: dict[str, Tensor], direction: dict[str, Tensor], distance: float
    ) -> tuple[float, float]:
        """The loss so far along a direction from θ, and its slope there as its gradient says."""
        there = {name: one + distance * direction[name] if name in direction else one for name, one in theta.items()}
        loss, grad = probe.gradient(there)
        return loss.item(), sum((grad[name].double() * direction[name]).sum().item() for name in direction)

    def _by_gates(self, probe: Probe, grad: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        directions = [grad] if {"grad_hess_grad", "param_hess_grad"} & set(names) else []
        directions += [self._layers.named(self._step.update)] if "update_hess_update" in names else []
        layers = self._layers
        found = probe.products(layers.named(self._step.theta), directions, layers.layer_of, len(layers))
        values = {
            "grad_hess_grad": found.hess[0], "param_hess_grad": found.param_hess[0],
            "update_hess_update": found.hess[-1],
        }  # fmt: skip
        return {name: values[name] for name in names}

    def _by_products(
        self, probe: Probe, grad: dict[str, Tensor], vectors: Vectors, names: list[str]
    ) -> dict[str, Tensor]:
        expansion = probe.expand(self._layers.named(self._step.theta))
        hess_grad = hess_update = None
        if {"grad_hess_grad", "param_hess_grad"} & set(names):
            hess_grad = self._product(expansion, grad)
        if "update_hess_update" in names:
            hess_update = self._product(expansion, self._layers.named(self._step.update))
        values = self._layers.evaluate(names, replace(vectors, hess_grad=hess_grad, hess_update=hess_update))
        return values | ({} if expansion.exact else {"approximate": torch.ones(())})

    def _product(self, expansion: Expansion, vector: Mapping[str, Tensor]) -> Tensor:
        aligned = [vector.get(name, torch.zeros_like(leaf)) for name, leaf in expansion.theta.items()]
        return self._layers.vector(dict(zip(expansion.theta, expansion.hessian_product(aligned), strict=True)))


def _differ(one: float, other: float, share: float, noise: float) -> bool:
    return abs(one - other) > share * max(abs(one), abs(other)) + noise


def _clipped_as(applied: Tensor, own: Tensor) -> Tensor:
    """A gradient with its entries cut where the applied one's are: at the largest size, which several have then."""
    sizes = applied.abs()
    most = sizes.max()
    cut = sizes == most
    rest = own.where(~cut & (applied != 0), 0.0)
    length = ((rest * applied).sum() / rest.square().sum()).abs().nan_to_num(1.0)  # cut in length before, perhaps
    return torch.where(cut.sum() > 1, (own * length).clamp(-most, most), own)
