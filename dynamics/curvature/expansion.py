"""Exact gradients and Hessian products of a loss around fixed parameters: pure functions, no hooks, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import named
from ..hardware.memory_order import channels_first
from ..hardware.precision import full_precision, precise
from ..warning import warn
from .differences import extrapolated, norm
from .graph import ONCE, BackwardPass, check_differentiable, on_the_way_back
from .higher_order import HigherOrder

_NOT_TWICE = (  # parts of autograd's messages when an operation has no further derivative
    "is not implemented", "double backward", "once_differentiable", "support automatic differentiation",
)  # fmt: skip

LossFunction = Callable[[dict[str, Tensor]], Tensor]


def lacks_derivative(error: RuntimeError) -> bool:
    """Whether the error says that autograd has no further derivative of an operation."""
    return any(reason in str(error) for reason in _NOT_TWICE)


def _say(which: str, error: RuntimeError) -> None:
    """Warn that a derivative failed, unless the error says that there is none."""
    if not lacks_derivative(error):
        warn(f"the {which} derivative of the loss failed with {named(error)}")


class Expansion:
    """The second-order expansion L(θ+δ) ≈ L + gᵀδ + ½ δᵀHδ of a mean loss around θ.

    ``losses`` are functions θ ↦ scalar loss, one per batch; ``weights`` are their shares, which sum to 1. With several
    batches nothing is kept between products, so that memory stays that of one batch. With one batch the graph of its
    gradient is kept, and a product costs one backward pass through it.

    Where autograd has no second derivative of an operation (some recurrent kernels), products are central differences
    of gradients, and ``exact`` becomes False. A parameter that the loss does not use has g = 0 and Hv = 0. The
    parameters are copied, so later changes of the model's own tensors have no effect here.
    """

    def __init__(self, losses: Sequence[LossFunction], weights: Sequence[float], theta: Mapping[str, Tensor]) -> None:
        self._losses = list(zip(losses, weights, strict=True))
        self.theta = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
        self._leaves = list(self.theta.values())
        self._graph: _Gradient | None = None
        self.exact = True
        self.loss, self.grad = self._loss_and_grad()

    @full_precision()
    def _loss_and_grad(self) -> tuple[Tensor, list[Tensor]]:
        keep = len(self._losses) == 1
        total_loss: Any = 0.0
        total_grad = _zero_sums(self._leaves)
        for loss_of, weight in self._losses:
            found = self._first(loss_of) if keep else _gradient(loss_of, self.theta)
            self.exact = self.exact and found.exact
            total_loss = total_loss + weight * precise(found.loss.detach())
            torch._foreach_add_(total_grad, [part.detach() for part in found.grad], alpha=weight)
            self._graph = found if keep and self.exact else None
        return total_loss, total_grad

    def _first(self, loss_of: LossFunction) -> _Gradient:
        """A gradient with its graph; if the backward pass is not differentiable, without a graph and not exact."""
        try:
            return _gradient(loss_of, self.theta, create_graph=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            found = _gradient(loss_of, self.theta)
            _say("second", error)
            return found._replace(exact=False)

    @full_precision()
    def hessian_product(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """Hv, one tensor per parameter, by a second backward pass: H v = ∂(gᵀv)/∂θ (Pearlmutter 1994).

        If there is none, Hv is extrapolated from central differences of g along v, of error O(ε⁴) in the distance ε.
        """
        vector = [channels_first(v) for v in vector]
        if self.exact:
            try:
                return self._second_backward(vector)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _say("second", error)
                self.exact, self._graph = False, None
        return self._difference(vector)

    @full_precision()
    def third_products(self, direction: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """T[u, v] = ∂(vᵀHu)/∂θ for a constant direction u and each v, by a third backward pass: how Hv changes along u.

        It is NaN if autograd has no third derivative of an operation.
        """
        totals = [_zero_sums(self._leaves) for _ in vectors]
        direction, *vectors = ([channels_first(v) for v in vector] for vector in (direction, *vectors))
        try:
            for loss_of, weight in self._losses:
                parts = self._third_backward(loss_of, direction, vectors)
                for total, part in zip(totals, parts, strict=True):
                    torch._foreach_add_(total, part, alpha=weight)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _say("third", error)
            return [[torch.full_like(leaf, torch.nan) for leaf in self._leaves] for _ in vectors]
        return totals

    @torch.enable_grad()
    def _third_backward(
        self, loss_of: LossFunction, direction: Sequence[Tensor], vectors: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        found = self._twice(loss_of)
        with on_the_way_back(found.loss, self._leaves) as way:
            product = self._along(found.grad, direction, create_graph=True)
            products = [self._along(product, vector, retain_graph=True) for vector in vectors]
        self._check_whole(way)
        return products

    def _twice(self, loss_of: LossFunction) -> _Gradient:
        """A gradient with its graph, computed anew; raises RuntimeError if the graph is not whole."""
        found = _gradient(loss_of, self.theta, create_graph=True)
        if not found.exact:
            raise RuntimeError(ONCE)
        return found

    def _check_whole(self, way: BackwardPass) -> None:
        """Raise RuntimeError if a part of the network ran again, so that the derivative is incomplete."""
        for leaf in self._leaves:
            leaf.grad = None
        way.check_whole()

    def _along(self, parts: Sequence[Tensor], vector: Sequence[Tensor], **graph: Any) -> list[Tensor]:
        """Gradient of the inner product of ``parts``, which depend on θ, with a constant vector."""
        check_differentiable(parts)
        slope: Any = sum((part * v.conj()).sum().real for part, v in zip(parts, vector, strict=True))  # complex: x + iy
        if not slope.requires_grad:  # constant in θ, as the loss is a polynomial of lower degree
            return [torch.zeros_like(leaf) for leaf in self._leaves]
        return list(torch.autograd.grad(slope, self._leaves, allow_unused=True, materialize_grads=True, **graph))

    def _difference(self, vector: Sequence[Tensor]) -> list[Tensor]:
        length, size = norm(vector), norm(self._leaves)
        if not length:
            return [torch.zeros_like(leaf) for leaf in self._leaves]
        unit = torch.finfo(size.dtype).eps ** (1 / 3)
        return extrapolated(partial(self._central, vector), (unit * (1 + size) / length).item(), unit)

    def _central(self, vector: Sequence[Tensor], distance: float) -> list[Tensor]:
        """(g(θ+εv) − g(θ−εv))/2ε for ε = distance."""
        ahead, behind = self._gradient_at(vector, distance), self._gradient_at(vector, -distance)
        return list(torch._foreach_div(torch._foreach_sub(ahead, behind), 2 * distance))

    @torch.no_grad()
    def _gradient_at(self, vector: Sequence[Tensor], distance: float) -> list[Tensor]:
        """g(θ + distance · v)."""
        moved = torch._foreach_add([leaf.detach() for leaf in self._leaves], list(vector), alpha=distance)
        losses, weights = zip(*self._losses, strict=True)
        return mean_gradient(losses, weights, dict(zip(self.theta, moved, strict=True)))[1]

    def _second_backward(self, vector: Sequence[Tensor]) -> list[Tensor]:
        total_product = _zero_sums(self._leaves)
        for loss_of, weight in self._losses:
            kept = self._graph is not None
            found = self._graph if kept else self._twice(loss_of)
            check_differentiable(found.grad)
            pairs = [(part, v) for part, v in zip(found.grad, vector, strict=True) if part.requires_grad]
            if not pairs:  # a loss that is linear in every parameter
                continue
            with on_the_way_back(found.loss, self._leaves) as way:
                product = torch.autograd.grad(
                    [part for part, _ in pairs],
                    self._leaves,
                    [v for _, v in pairs],
                    retain_graph=kept,
                    allow_unused=True,
                    materialize_grads=True,
                )
            self._check_whole(way)
            torch._foreach_add_(total_product, list(product), alpha=weight)
        return total_product


class _Gradient(NamedTuple):
    """A loss and its gradient; ``exact``: whether the gradient's graph is complete."""

    loss: Tensor
    grad: list[Tensor]
    exact: bool


def _gradient(loss_of: LossFunction, theta: dict[str, Tensor], *, create_graph: bool = False) -> _Gradient:
    """Loss and gradient at θ; not exact if a part of the network ran again in the backward pass.

    An operation that runs it again may accumulate its parameters' gradients itself: these are in the ``.grad`` of θ's
    leaves then, and are added.
    """
    leaves = list(theta.values())
    with torch.enable_grad():
        with HigherOrder() if create_graph else nullcontext():
            loss = loss_of(theta)
        if not loss.requires_grad:
            raise ValueError("the loss depends on no trainable parameter")
        with on_the_way_back(loss, leaves) as way:
            grad = list(
                torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True, materialize_grads=True)
            )
    if way.again:
        grad = [part.detach() if leaf.grad is None else part.detach() + leaf.grad
                for part, leaf in zip(grad, leaves, strict=True)]  # fmt: skip
        for leaf in leaves:
            leaf.grad = None
    return _Gradient(loss if create_graph else loss.detach(), grad, not way.again)


@torch.no_grad()
@full_precision()
def mean_gradient(
    losses: Sequence[LossFunction], weights: Sequence[float], theta: Mapping[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """L = Σ_b w_b L_b at θ and its gradient, one tensor per parameter."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in theta.items()}
    total_loss: Any = 0.0
    total_grad = _zero_sums(leaves.values())
    for loss_of, weight in zip(losses, weights, strict=True):
        found = _gradient(loss_of, leaves)
        total_loss = total_loss + weight * precise(found.loss)
        torch._foreach_add_(total_grad, found.grad, alpha=weight)
    return total_loss, total_grad


def _zero_sums(leaves: Iterable[Tensor]) -> list[Tensor]:
    """Zeros in the leaves' shapes, in float32 at least, to which gradients are added."""
    return [precise(torch.zeros_like(leaf)) for leaf in leaves]


@full_precision()
def mean_loss(losses: Sequence[LossFunction], weights: Sequence[float], theta: Mapping[str, Tensor]) -> Tensor:
    """Σ_b w_b L_b(θ), a scalar without graph; gradients are enabled inside, because a loss may take some itself."""
    with torch.enable_grad():
        copies = {name: tensor.detach().clone() for name, tensor in theta.items()}  # the loss may write to them
        leaves = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in copies.items()}
        terms = (weight * precise(loss_of(leaves).detach()) for loss_of, weight in zip(losses, weights, strict=True))
        return sum(terms)  # type: ignore[return-value]  # not 0, as there is a batch
