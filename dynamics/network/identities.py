"""Identities of units: which units of the original network the units of a shrunk network are.

A shrunk module carries the original indices of its remaining outputs in an attribute. They are copied and pickled with
it, stay out of the state dict, and compose over any number of rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

Layer: TypeAlias = (  # a module whose weight's rows are units, or in a transposed convolution its columns
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
)

_ATTRIBUTE = "original_units"


@dataclass(frozen=True)
class Identity:
    """Original indices of a layer's units, (unit,), ascending, how many it had at first, and whether it is depthwise.

    The last is kept because a depthwise convolution with one channel left looks like any other.
    """

    index: Tensor
    total: int
    depthwise: bool = False


def identities(model: nn.Module) -> dict[str, Identity]:
    """Identity of the units of every convolution and linear layer, by the layer's name."""
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    return {name: identity(module) for name, module in layers.items()}


def is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """Whether a module is a convolution or a linear layer, whose units are the rows of its weight."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)


def keep_units(module: Layer, left: Tensor) -> None:
    """Note that only the units at the indices ``left``, (unit,), of a layer's present units remain."""
    before = identity(module)
    setattr(module, _ATTRIBUTE, replace(before, index=before.index[left.cpu()]))


def layer_named(model: nn.Module, name: str) -> Layer:
    """The layer of that name, which is one of the model's."""
    return model.get_submodule(name)  # type: ignore[return-value]


def identity(module: Layer) -> Identity:
    """Identity of a layer's units; if it was never shrunk, all that it has."""
    count, groups = len(module.weight), getattr(module, "groups", 1)
    whole = Identity(torch.arange(count, device="cpu"), count, depthwise=groups == count > 1)
    return getattr(module, _ATTRIBUTE, whole)


def as_original(values: Mapping[str, Tensor], known: Mapping[str, Identity]) -> dict[str, Tensor]:
    """Apply :func:`expand` to layers with one value per present unit; the values of other layers stay as they are."""
    of_now = {
        layer: value for layer, value in values.items() if layer in known and len(value) == len(known[layer].index)
    }
    return {**values, **expand(of_now, known)}


def expand(values: Mapping[str, Tensor], known: Mapping[str, Identity]) -> dict[str, Tensor]:
    """Values of the present units, (unit,) by layer → of all original units, with False or NaN for those removed.

    Raises:
        ValueError: a layer is not known, or has another number of units.
    """
    expanded = {}
    for layer, value in values.items():
        if layer not in known or value.shape != known[layer].index.shape:
            needed = f"it has {len(known[layer].index)} units" if layer in known else f"layers are {sorted(known)}"
            raise ValueError(f"layer {layer!r} was given values of shape {tuple(value.shape)}, but {needed}")
        fill = False if value.dtype == torch.bool else torch.nan
        expanded[layer] = torch.full((known[layer].total,), fill, dtype=value.dtype, device=value.device)
        expanded[layer][known[layer].index.to(value.device)] = value.detach()
    return expanded
