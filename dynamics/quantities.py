"""The formulas of the recorded quantities: pure functions of θ, g, Δθ and of Hessian products.

Each vector is a list of tensors, one a parameter. A formula gives one number a parameter, and :func:`layer_sums` adds
them up over the layers; so every quantity adds up over ``layer`` to that of the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = Sequence[Tensor]


@dataclass(frozen=True)
class Vectors:
    """What a formula may use. Only the vectors that its quantity needs have to be given."""

    theta: Vector = ()  # θ, before the step
    grad: Vector = ()  # g
    update: Vector = ()  # Δθ, the step taken
    start: Vector = ()  # θ₀
    decay: Tensor | None = None  # λ of each parameter, shape (parameter,)
    hess_grad: Vector = ()  # Hg
    hess_update: Vector = ()  # HΔθ
    removal: Vector = ()  # δ
    hess_removal: Vector = ()  # Hδ
    removed: Vector = ()  # 1 on the coordinates that an event removes, else 0
    kept: Vector = ()  # 1 on the coordinates that are not pruned, else 0


def dot(left: Vector, right: Vector) -> Tensor:
    """Inner product of each pair of tensors, shape (parameter,)."""
    return total([_precise(a) * _precise(b) for a, b in zip(left, right, strict=True)])


def total(vector: Vector) -> Tensor:
    """Sum of each tensor's entries, shape (parameter,), added up in float64 where the device has it."""
    return torch.stack([tensor.sum(dtype=torch.float32 if tensor.is_mps else torch.float64) for tensor in vector])


def _precise(tensor: Tensor) -> Tensor:
    """Half precision is multiplied in single precision: its products would over- and underflow."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def times(left: Vector, right: Vector) -> list[Tensor]:
    """Entrywise product."""
    return list(torch._foreach_mul(list(left), list(right)))


def minus(left: Vector, right: Vector) -> list[Tensor]:
    """Entrywise difference."""
    return list(torch._foreach_sub(list(left), list(right)))


def sqnorm(vector: Vector) -> Tensor:
    """Squared norm of each tensor, shape (parameter,)."""
    return dot(vector, vector)


FORMULAS: dict[str, Callable[[Vectors], Tensor]] = {
    "param_sqnorm": lambda v: sqnorm(v.theta),
    "param_sqnorm_rate": lambda v: -2 * dot(v.theta, v.grad),
    "grad_sqnorm": lambda v: sqnorm(v.grad),
    "param_grad": lambda v: dot(v.theta, v.grad),
    "abs_param_grad": lambda v: total(
        [(_precise(theta) * _precise(grad)).abs() for theta, grad in zip(v.theta, v.grad, strict=True)]
    ),
    "distance_sqnorm": lambda v: sqnorm(minus(v.theta, v.start)),
    "decay_sqnorm": lambda v: v.decay * sqnorm(v.theta),
    "update_sqnorm": lambda v: sqnorm(v.update),
    "param_update": lambda v: dot(v.theta, v.update),
    "grad_update": lambda v: dot(v.grad, v.update),
    "grad_hess_grad": lambda v: dot(v.grad, v.hess_grad),
    "param_hess_grad": lambda v: dot(v.theta, v.hess_grad),
    "update_hess_update": lambda v: dot(v.update, v.hess_update),
    "grad_removal": lambda v: dot(v.grad, v.removal),
    "removal_hess_removal": lambda v: dot(v.removal, v.hess_removal),
    "grad_hess_removal": lambda v: dot(v.removal, v.hess_grad),
    "removed_grad_sqnorm": lambda v: dot(times(v.grad, v.removed), v.grad),
    "removed_grad_hess_removal": lambda v: dot(times(v.grad, v.removed), v.hess_removal),
    "removed": lambda v: total(v.removed),
    "remaining": lambda v: total(v.kept),
}


def layer_sums(per_parameter: Tensor, layer_of: Tensor, layers: int) -> Tensor:
    """Add up (..., parameter) over the parameters of each layer: (..., layer).

    ``layer_of`` (parameter,) holds the index of the layer that owns each parameter.
    """
    sums = per_parameter.new_zeros(*per_parameter.shape[:-1], layers)
    return sums.index_add_(-1, layer_of, per_parameter)


def evaluate(names: Iterable[str], vectors: Vectors, layer_of: Tensor, layers: int) -> dict[str, Tensor]:
    """The named quantities per layer: name → tensor of shape (layer,)."""
    names = list(names)
    if not names:
        return {}
    values = torch.stack([FORMULAS[name](vectors) for name in names])
    return dict(zip(names, layer_sums(values, layer_of, layers).unbind(), strict=True))
