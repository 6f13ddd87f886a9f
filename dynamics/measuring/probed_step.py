"""A step measured at a probe of its batches: the loss's own gradient, and curvature along that and along the step."""

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

_ENTRIES, _NUMBERS = 2**16, 2**22  # most gradient entries compared to fit shares: of each batch, and of all together
_ROUNDING = 1e-4  # of shares, relative to the largest
_SECOND = tuple(row.name for row in schema.quantities("curvature") if row.order == 2)


class ProbedStep:
    """Measures the requested quantities of ``/curvature`` for the present ``step``, at a probe."""

    def __init__(
        self, step: Measurement, layers: Layers, groups: Groups, processes: Processes, names: Sequence[str]
    ) -> None:
        self._step, self._layers, self._groups, self._processes = step, layers, groups, processes
        self._names = [name for name in names if name in FORMULAS]
        self._others = [name for name in names if name not in FORMULAS]
        self._outside: list[tuple[Tensor, Tensor]] = []
        self._warn_once = WarnOnce()
        self._of_own_operations = 0  # number of steps so far whose loss went through the user's own operations

    @property
    def places(self) -> tuple[int, ...] | None:
        """Memory addresses at which a probe finds the parameters; None where these do not suffice.

        They do not if the loss has parameters of its own, which are put back each time, or if parameters are sparse,
        and so have several addresses.
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
        """Keep the parameters outside the model that the optimizers train: a step moves them, the loss may use them."""
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
        """Cosine of a gradient with the applied one, over what was trained, and the mean of the layers' cosines.

        The mean is weighted by the norms of the applied gradient in the layers, because each layer may be clipped by
        itself. Each number is that of the gradient as it is or, if that is larger, of the gradient clipped by value as
        the applied one is. A cosine is 0 if the gradient is zero in all that was trained, and NaN if it is not finite
        or nothing was applied. Where an optimizer maximizes, the absolute value is taken, because the loss may have
        been negated for that. Over replicas that apply gradients of their own (local SGD), it is the mean.
        """
        own = self._layers.vector(grad, without=self._step.rest)
        found = torch.stack([self._cosines(own), self._cosines(_clipped_as(self._step.grad.blocks, own))])
        (cosines,) = self._processes.mean([(found.abs() if self._groups.ascend() else found).amax(0)])
        return tuple(cosines.tolist())

    def _cosines(self, own: Tensor) -> Tensor:
        """The two cosines of :meth:`alignment` for a gradient as it is, (2,)."""
        names = ("grad_applied_grad", "grad_sqnorm", "applied_grad_sqnorm")
        vectors = Vectors(grad=own, applied=self._step.grad.blocks)
        product, square, applied = self._layers.evaluate(names, vectors).values()
        lengths = (square[applied != 0].sum() * applied.sum()).sqrt()
        cosine = product.sum() / lengths.where((lengths != 0) | ~(applied.sum() > 0), 1.0)
        in_layers = product / square.sqrt().where(square != 0, 1.0)
        return torch.stack([cosine, in_layers.sum() / applied.sqrt().sum()])

    def entries(self, probe: Probe, batches: int) -> tuple[Tensor, Tensor]:
        """Some entries of the gradients of a probe's batches, (entry, batch), and of the applied one, (entry,).

        Their number is limited such that all ``batches``, those of other processes included, fit into memory together.
        """
        applied = self._step.grad.blocks
        most = min(_ENTRIES, _NUMBERS // batches)
        some = slice(None, None, applied.numel() // most | 1)  # odd, because parameters begin at multiples of 1024
        columns = []
        for one in probe.one_by_one():
            grad = self._layers.vector(self.gradient(one)[1], without=self._step.rest)
            columns.append(grad.flatten()[some].cpu().double())
        return torch.stack(columns, 1), applied.flatten()[some].cpu().double()

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
            "loss_after": lambda: self._loss_after(probe),
            "approximate": lambda: torch.zeros((), device="cpu"),
        }
        return {name: others[name]() for name in self._others} | values

    def unless_frozen_move(self, probe: Probe, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The quantities of ``/curvature``; those along the step are NaN if it moves what the probe holds constant."""
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

    def _loss_after(self, probe: Probe) -> Tensor:
        """The loss at θ + Δθ; NaN if the objective fails there, which the loop may leave before it goes on."""
        try:
            return probe.loss(self._after(), present=self._groups.outside)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.on_one_gpu and torch.cuda.is_current_stream_capturing():
                raise
            self._warn_once(
                f"loss_after is NaN where a step leads to parameters at which the objective fails, first with "
                f"{named(error)}. If the loop moves them to where it is defined after each step, let the optimizer do "
                "that in a hook, optimizer.register_step_post_hook, before the recorder is made: then it counts as a "
                "part of the step",
                "after",
            )
            return torch.full((), torch.nan, device="cpu")

    def _after(self) -> dict[str, Tensor] | None:
        """θ + Δθ by parameter name; None for a single optimizer, after whose step the model still has it.

        A step of some of several optimizers only ends when the next begins, and the model may have changed by then.
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
        """Warn once if an own operation's derivatives are in doubt; checked at the 1st, 2nd, 4th, 8th... such step.

        It is checked again because an operation may change what it passes on as training goes on.
        """
        self._of_own_operations += 1
        if self._of_own_operations.bit_count() > 1:
            return
        found = None
        with suppress(Exception):  # only for the warning: a failure must not cost the measurement
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
        return values | ({} if expansion.exact else {"approximate": torch.ones((), device="cpu")})

    def _product(self, expansion: Expansion, vector: Mapping[str, Tensor]) -> Tensor:
        aligned = [vector.get(name, torch.zeros_like(leaf)) for name, leaf in expansion.theta.items()]
        return self._layers.vector(dict(zip(expansion.theta, expansion.hessian_product(aligned), strict=True)))


def shares(grads: Tensor, applied: Tensor) -> list[float]:
    """Least-squares shares in which gradients, (entry, batch), add up to the applied one, (entry,), up to its length.

    Empty if some are negative, or there are too few entries. The step may still be of other batches: only the gradient
    in these shares shows that.
    """
    if grads.any(1).sum() < 2 * grads.shape[1] or not (grads.isfinite().all() and applied.isfinite().all()):
        return []  # so few entries fit any gradient
    found = torch.linalg.lstsq(grads, applied[:, None]).solution[:, 0]
    if found.max() <= 0 or found.min() < -_ROUNDING * found.max():
        return []
    found = found.clamp(min=0)
    return (found / found.sum()).tolist()


def _clipped_as(applied: Tensor, own: Tensor) -> Tensor:
    """A gradient clipped by value like the applied one, which was clipped if several entries share the largest size."""
    sizes = applied.abs()
    most = sizes.max()
    cut = sizes == most
    rest = own.where(~cut & (applied != 0), 0.0)
    length = ((rest * applied).sum() / rest.square().sum()).abs().nan_to_num(1.0)  # may have been scaled before
    return torch.where(cut.sum() > 1, (own * length).clamp(-most, most), own)
