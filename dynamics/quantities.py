"""The formulas of the recorded quantities: pure functions of θ, g, Δθ and of Hessian products.

Each vector is a tensor (block, entry) that holds all parameters. A formula gives one number per block, and
:func:`sums` adds these up in each layer; so every quantity adds up over ``layer`` to that of the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from .float64 import widened

_CACHED_BLOCKS = 512  # 2 MB of each vector, which fit into a CPU's cache
_GPU_BLOCKS = 2**16  # 256 MB of each vector: larger products would take memory, and a few more launches no time


@dataclass(frozen=True)
class Vectors:
    """What a formula may use. Only the vectors that its quantity needs have to be given."""

    theta: Tensor | None = None  # θ, before the step
    grad: Tensor | None = None  # g
    update: Tensor | None = None  # Δθ, the step taken
    start: Tensor | None = None  # θ₀
    applied: Tensor | None = None  # ĝ, the gradient that the optimizer was given
    decay: Tensor | None = None  # λ of each block, shape (block,)
    hess_grad: Tensor | None = None  # Hg
    hess_update: Tensor | None = None  # HΔθ
    removal: Tensor | None = None  # δ
    hess_removal: Tensor | None = None  # Hδ
    third_removal: Tensor | None = None  # T[δ,δ], where T is the derivative of H
    hess_grad_change: Tensor | None = None  # first-order change of Hg by the removal
    removed: Tensor | None = None  # 1 on the coordinates that an event removes, else 0
    kept: Tensor | None = None  # 1 on the coordinates that are not pruned, else 0
    scratch: Tensor | None = None  # buffer for products: memory fresh from the system is slow
    _dots: dict[tuple[str, str], Tensor] = field(default_factory=dict, init=False)

    def dot(self, left: str, right: str) -> Tensor:
        """Inner product of two of the vectors in each block, (block,); computed once."""
        if (left, right) not in self._dots:
            self._dots[left, right] = self.product(getattr(self, left), getattr(self, right)).sum(-1)
        return self._dots[left, right]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Entrywise product; the next product or difference may overwrite it."""
        return torch.mul(left, right, out=self.scratch)

    def difference(self, left: Tensor, right: Tensor) -> Tensor:
        """Entrywise difference; the next product or difference may overwrite it."""
        return torch.sub(left, right, out=self.scratch)

    def split(self, blocks: int) -> Iterator[Vectors]:
        """Yield pieces of ``blocks`` blocks, which share one scratch buffer."""
        given = {part.name: getattr(self, part.name) for part in fields(self) if part.init}
        pieces = {name: vector.split(blocks) for name, vector in given.items() if vector is not None}
        shape = next(parts for parts in pieces.values() if parts[0].ndim == 2)[0]
        scratch = torch.empty_like(shape)
        for parts in zip(*pieces.values(), strict=True):
            yield Vectors(**dict(zip(pieces, parts, strict=True)), scratch=scratch[: len(parts[0])])


def _param_grad_first_order(v: Vectors) -> Tensor:
    """θᵀg over what is kept, with θ + δ and g + Hδ to first order, minus θᵀg over all, (block,)."""
    kept = v.removal * v.grad + v.theta * v.hess_removal
    return (kept * (1 - v.removed) - v.theta * v.grad * v.removed).sum(-1)


def _param_hess_grad_first_order(v: Vectors) -> Tensor:
    """θᵀHg over what is kept, with θ + δ and Hg to first order, minus θᵀHg over all, (block,)."""
    kept = v.removal * v.hess_grad + v.theta * v.hess_grad_change
    return (kept * (1 - v.removed) - v.theta * v.hess_grad * v.removed).sum(-1)


FORMULAS: dict[str, Callable[[Vectors], Tensor]] = {
    "param_sqnorm": lambda v: v.dot("theta", "theta"),
    "param_sqnorm_rate": lambda v: -2 * v.dot("theta", "grad"),
    "grad_sqnorm": lambda v: v.dot("grad", "grad"),
    "param_grad": lambda v: v.dot("theta", "grad"),
    "abs_param_grad": lambda v: v.product(v.theta, v.grad).abs_().sum(-1),
    "distance_sqnorm": lambda v: v.difference(v.theta, v.start).square_().sum(-1),
    "decay_sqnorm": lambda v: v.decay * v.dot("theta", "theta"),
    "update_sqnorm": lambda v: v.dot("update", "update"),
    "param_update": lambda v: v.dot("theta", "update"),
    "grad_update": lambda v: v.dot("grad", "update"),
    "applied_grad_sqnorm": lambda v: v.dot("applied", "applied"),
    "grad_applied_grad": lambda v: v.dot("grad", "applied"),
    "grad_hess_grad": lambda v: v.dot("grad", "hess_grad"),
    "param_hess_grad": lambda v: v.dot("theta", "hess_grad"),
    "update_hess_update": lambda v: v.dot("update", "hess_update"),
    "grad_removal": lambda v: v.dot("grad", "removal"),
    "removal_hess_removal": lambda v: v.dot("removal", "hess_removal"),
    "grad_hess_removal": lambda v: v.dot("removal", "hess_grad"),
    "kept_grad_hess_removal": lambda v: (v.grad * (1 - v.removed) * v.hess_removal).sum(-1),
    "grad_sqnorm_second_order": lambda v: ((v.hess_removal.square() + v.grad * v.third_removal) * (1 - v.removed)).sum(
        -1
    ),
    "param_grad_first_order": _param_grad_first_order,
    "param_grad_second_order": lambda v: (
        (v.removal * v.hess_removal + v.theta * v.third_removal / 2) * (1 - v.removed)
    ).sum(-1),
    "param_hess_grad_first_order": _param_hess_grad_first_order,
    "removed_grad_sqnorm": lambda v: (v.grad.square() * v.removed).sum(-1),
    "removed": lambda v: v.removed.sum(-1),
    "remaining": lambda v: v.kept.sum(-1),
}


def sums(names: Sequence[str], vectors: Vectors, layer_of: Tensor, layers: int) -> Tensor:
    """The named quantities, one or more, per layer: (name, layer).

    ``layer_of`` (block,) holds the index of the layer that owns each block's parameter. Blocks are added up in float64
    if the device has it. On a CPU all formulas read a piece of the vectors while it is in the cache.
    """
    most = _CACHED_BLOCKS if layer_of.is_cpu else _GPU_BLOCKS
    pieces = [vectors] if len(layer_of) <= most else vectors.split(most)
    values = torch.cat([torch.stack([FORMULAS[name](piece) for name in names]) for piece in pieces], dim=-1)
    values = widened(values)
    return values.new_zeros(len(names), layers).index_add_(-1, layer_of, values)
