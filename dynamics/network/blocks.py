"""Vectors over all parameters at once: blocks of 1024 numbers, so that one operation serves a whole network.

Each parameter starts a new block, and the rest of its last block is zero; so sums over blocks add up to sums over
parameters and over layers, whatever the number of parameters, their shapes, memory formats and types.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024
_OWN, _STRIDED = {Tensor, torch.nn.Parameter}, {torch.strided}


def is_any_missing(tensors: Sequence[Tensor | None]) -> bool:
    """Whether any of the tensors is None."""
    return type(None) in set(map(type, tensors))


def plain(tensors: list[Tensor]) -> list[Tensor]:
    """The part of each tensor that this process accounts for, dense; of a distributed tensor, its local shard.

    A tensor that is replicated over processes counts in the first of them only; in the others its part is empty. Where
    each process holds a term of a sum (a partial placement), as of a gradient under sequence parallelism, the terms are
    added up, which all processes have to call together.
    """
    # called for every parameter and gradient at every step, so the usual case runs no Python code for each tensor
    if _OWN.issuperset(map(type, tensors)) and _STRIDED.issuperset(map(attrgetter("layout"), tensors)):
        return tensors
    return [_plain(tensor) for tensor in tensors]


def _plain(tensor: Any) -> Tensor:
    if hasattr(tensor, "to_local"):
        if any(place.is_partial() for place in tensor.placements):
            from torch.distributed.tensor import Replicate  # imported already where tensors are distributed; slow else

            whole = [Replicate() if place.is_partial() else place for place in tensor.placements]
            tensor = tensor.redistribute(placements=whole)
        placed = zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
        local = tensor.to_local()
        return local[:0] if any(place.is_replicate() and index for place, index in placed) else local
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


class Layout:
    """Where the entries of each parameter are in the blocks; there they keep the parameter's own order in memory.

    A complex parameter counts as pairs of real numbers, so that ‖θ‖² = Σ|θᵢ|² and θᵀg = Re Σ θ̄ᵢgᵢ.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        tensors = plain([tensor.detach() for tensor in tensors])
        self.shapes = [tensor.shape for tensor in tensors]
        self._strides = [torch.empty_like(tensor, device="meta").stride() for tensor in tensors]
        self._complex = [tensor.is_complex() for tensor in tensors]
        self._sizes = [tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors]
        self.counts = [-(-size // BLOCK) for size in self._sizes]
        double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        self.device = tensors[0].device
        self.on_one_gpu = self.device.type == "cuda" and all(tensor.device == self.device for tensor in tensors)

    def zeros(self) -> Vector:
        """A new vector, zero everywhere."""
        blocks = torch.zeros(sum(self.counts), BLOCK, dtype=self.dtype, device=self.device)
        views, start = [], 0
        for shape, stride, size, count, is_complex in zip(
            self.shapes, self._strides, self._sizes, self.counts, self._complex, strict=True
        ):
            part = blocks.view(-1)[start * BLOCK : start * BLOCK + size]
            part = torch.view_as_complex(part.view(-1, 2)) if is_complex else part
            views.append(part.as_strided(shape, stride))
            start += count
        return Vector(blocks, views)


class Vector:
    """One vector over all parameters: ``blocks`` (block, 1024), and ``views`` of it, one in each parameter's shape."""

    def __init__(self, blocks: Tensor, views: list[Tensor]) -> None:
        self.blocks, self.views = blocks, views

    def take(self, tensors: list[Tensor] | list[Tensor | None], among: Sequence[int] | None = None) -> Vector:
        """Copy tensors, one per parameter, into the vector; None counts as zero.

        ``among`` holds the parameters' indices, by default all.
        """
        views = self.views if among is None else [self.views[index] for index in among]
        if is_any_missing(tensors):
            torch._foreach_zero_([view for view, tensor in zip(views, tensors, strict=True) if tensor is None])
            views = [view for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
            tensors = [tensor for tensor in tensors if tensor is not None]
        if tensors:
            torch._foreach_copy_(views, plain(tensors))
        return self
