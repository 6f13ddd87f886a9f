"""A step at a probe of its batches: the loss's own gradient, and curvature along that and along the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from .own_operations import doubt
from .step import Measurement
from .warn_once import WarnOnce

_ENTRIES, _NUMBERS = 2**16, 2**22  # of gradients that are compared: of each, and of those of all batches at most
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
        have been turned around for that. Replicas that apply gradients of their own (local SGD) have the mean.
        """
        own = self._layers.vector(grad, without=self._step.rest)
        found = torch.stack([self._cosines(own), self._cosines(_clipped_as(self._step.grad.blocks, own))])
        (cosines,) = self._processes.mean([(found.abs() if self._groups.ascend() else found).amax(0)])
        return tuple(cosines.tolist())

    def _cosines(self, own: Tensor) -> Tensor:
        """Of a gradient with the one applied: over all, and the mean over layers, (2,)."""
        names = ("grad_applied_grad", "grad_sqnorm", "applied_grad_sqnorm")
        vectors = Vectors(grad=own, applied=self._step.grad.blocks)
        product, square, applied = self._layers.evaluate(names, vectors).values()
        lengths = (square[applied != 0].sum() * applied.sum()).sqrt()
        cosine = product.sum() / lengths.where((lengths != 0) | ~(applied.sum() > 0), 1.0)
        in_layers = product / square.sqrt().where(square != 0, 1.0)
        return torch.stack([cosine, in_layers.sum() / applied.sqrt().sum()])

    def entries(self, probe: Probe, batches: int) -> tuple[Tensor, Tensor]:
        """Some entries of the gradients of a probe's batches, (entry, batch), and of the one applied, (entry,).

        So many that those of all ``batches`` together, of other processes', too, are not too many.
        """
        applied = self._step.grad.blocks
        most = min(_ENTRIES, _NUMBERS // batches)
        some = slice(None, None, applied.numel() // most | 1)  # odd, for parameters begin at multiples of 1024
        columns = []
        for one in probe.one_by_one():
            grad = self._layers.vector(self.gradient(one)[1], without=self._step.rest)
            columns.append(grad.flatten()[some].double().cpu())
        return torch.stack(columns, 1), applied.flatten()[some].double().cpu()

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
            f"curvature along steps that change frozen parameters, first {name!r}, is NaN, because these have "
            "no gradient. Momentum or weight decay changes them where .grad is zero instead of None; "
            "zero_grad() sets it to None",
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
            self._look_at_own_operations(probe, grad, values["grad_hess_grad"])
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
                    f"curvature by gates failed with {named(error)}; Hessian products, which are slower, are used "
                    "instead",
                    "gates",
                )
            return self._by_products(probe, grad, vectors, names)

    def _look_at_own_operations(self, probe: Probe, grad: dict[str, Tensor], grad_hess_grad: Tensor) -> None:
        """Say, once, where there is a doubt: at the 1st step, 2nd, 4th..., as they may pass on more as time goes on."""
        self._of_own_operations += 1
        if self._of_own_operations.bit_count() > 1:
            return
        found = None
        with suppress(Exception):  # it only tells: what was measured stays
            found = doubt(probe, self._layers.named(self._step.theta), grad, grad_hess_grad)
        if found and (found.gradient or self._of_own_operations == 1):
            self._warn_once(found.text, "own gradient" if found.gradient else "own operation")

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


def shares(grads: Tensor, applied: Tensor) -> list[float]:
    """In what shares gradients, (entry, batch), add up to the one applied, (entry,), but for its length; or [].

    By least squares. A step may be of other batches all the same: the gradient in these shares tells.
    """
    if grads.any(1).sum() < 2 * grads.shape[1] or not (grads.isfinite().all() and applied.isfinite().all()):
        return []  # so few entries may add up to anything
    found = torch.linalg.lstsq(grads, applied[:, None]).solution[:, 0]
    if found.max() <= 0 or found.min() < -_ROUNDING * found.max():
        return []
    found = found.clamp(min=0)
    return (found / found.sum()).tolist()


def _clipped_as(applied: Tensor, own: Tensor) -> Tensor:
    """A gradient with its entries cut where the applied one's are: at the largest size, which several have then."""
    sizes = applied.abs()
    most = sizes.max()
    cut = sizes == most
    rest = own.where(~cut & (applied != 0), 0.0)
    length = ((rest * applied).sum() / rest.square().sum()).abs().nan_to_num(1.0)  # cut in length before, perhaps
    return torch.where(cut.sum() > 1, (own * length).clamp(-most, most), own)
