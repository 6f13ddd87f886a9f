"""Vectors over all parameters at once: blocks of 1024 numbers, so that one operation serves a whole network.

Each parameter starts a new block, the rest of its last one is zero; so sums over blocks add up to sums over parameters
and over layers, whatever the number of parameters, their shapes, memory formats and types.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .captured import Repeated

BLOCK = 1024
_OWN = {Tensor, torch.nn.Parameter}


def plain(tensor: Tensor) -> Tensor:
    """The tensor as this process holds it: dense, the local shard of a distributed one; one that repeats counts once.

    Of a tensor that is replicated over processes only the first holds it.
    """
    if type(tensor) in _OWN and tensor.layout is torch.strided:  # asked of every parameter at every step
        return tensor
    if hasattr(tensor, "to_local"):
        placed = zip(tensor.placements, tensor.device_mesh.get_coordinate(), strict=True)
        local = tensor.to_local()
        return local[:0] if any(place.is_replicate() and index for place, index in placed) else local
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


class Layout:
    """Where the entries of each parameter stand among the blocks: in the parameter's own order in memory.

    A complex parameter counts as pairs of real numbers, so that ‖θ‖² = Σ|θᵢ|² and θᵀg = Re Σ θ̄ᵢgᵢ.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        tensors = [plain(tensor.detach()) for tensor in tensors]
        self.shapes = [tensor.shape for tensor in tensors]
        self._strides = [torch.empty_like(tensor, device="meta").stride() for tensor in tensors]
        self._complex = [tensor.is_complex() for tensor in tensors]
        self._sizes = [tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors]
        self.counts = [-(-size // BLOCK) for size in self._sizes]
        double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
        self.dtype = torch.float64 if double else torch.float32
        self.device = tensors[0].device
        self._on_one_gpu = self.device.type == "cuda" and all(tensor.device == self.device for tensor in tensors)

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
        return Vector(blocks, views, on_one_gpu=self._on_one_gpu)


class Vector:
    """One vector over all parameters: ``blocks`` (block, 1024), and ``views`` of it, one in each parameter's shape."""

    def __init__(self, blocks: Tensor, views: list[Tensor], *, on_one_gpu: bool) -> None:
        self.blocks, self.views, self.on_one_gpu = blocks, views, on_one_gpu
        self._repeated = Repeated()

    def take(self, tensors: Sequence[Tensor | None], among: Sequence[int] | None = None) -> Vector:
        """Copy tensors, one a parameter, into the vector; None counts as zero. ``among`` names the parameters."""
        views = self.views if among is None else [self.views[index] for index in among]
        if any(tensor is None for tensor in tensors):
            absent = [view for view, tensor in zip(views, tensors, strict=True) if tensor is None]
            torch._foreach_zero_(absent)
            views = [view for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
            tensors = [tensor for tensor in tensors if tensor is not None]
        if tensors:
            self._copy(views, [plain(tensor) for tensor in tensors])
        return self

    def _copy(self, views: list[Tensor], tensors: list[Tensor]) -> None:
        copy = partial(torch._foreach_copy_, views, tensors)
        if not self.on_one_gpu or not _OWN.issuperset(map(type, tensors)):  # of others a pointer may say nothing
            copy()
            return
        pointers = [*map(Tensor.data_ptr, views), *map(Tensor.data_ptr, tensors)]
        layouts = [*map(Tensor.stride, tensors), *(tensor.dtype for tensor in tensors)]
        self._repeated(copy, pointers + layouts, self.blocks.device)
