"""Shrinking: a network with silenced filters becomes a smaller one that computes the same and trains the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...network.identities import Identity, expand, identities, is_layer, keep_units
from ...network.masks import parameter_masks, replace_mask
from ...network.optimizer_state import state_of
from ...network.optimizers import as_given, with_those_within
from ...network.structure import check_initialised, check_whole
from ...network.wrappers import unwrap
from ...words import counted
from ..candidates.weights import weight_of
from .cut import find_cut, rows_left, take

_PARAMETRIZED = "parametrizations."  # part of the name of a parameter that a layer's own is made of
_MADE_PERMANENT = {  # by that part, or by the end of the name
    _PARAMETRIZED: "parametrize.remove_parametrizations(module, name)",
    "_orig": "prune.remove(module, name)",
    "weight_g": "remove_weight_norm(module)",
    "weight_v": "remove_weight_norm(module)",
}


@dataclass(frozen=True)
class Shrunk:
    """What is left of a network.

    ``units`` holds, for every convolution and linear layer, the original indices of its units, (unit,): those in the
    network as it was before it was ever shrunk, where it had ``totals`` of them. ``kept`` holds, for every parameter
    that got smaller this time, which of its entries are left: flat indices into the old one, in the new shape.
    """

    units: dict[str, Tensor]
    totals: dict[str, int]
    kept: dict[str, Tensor]

    def __repr__(self) -> str:
        left, whole = sum(map(len, self.units.values())), sum(self.totals.values())
        return f"<Shrunk: {left} of {whole} units left in {counted(len(self.units), 'layer')}>"

    def expand(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of the units left, (unit,) by layer → of all original units, with False or NaN for those removed.

        ``event.units(alive=shrunk.expand(pruned.alive), scores=shrunk.expand(pruned.scores))`` records an event of the
        smaller network in rows of the original one.
        """
        return expand(values, {name: Identity(index, self.totals[name]) for name, index in self.units.items()})


def shrink(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    inputs: Any = None,
) -> Shrunk:
    """Remove silenced filters from a model, in place, and what belongs to them from the optimizer.

    Logits, gradients and the next updates of what is left are those of the masked network, up to rounding, for
    optimizers that update every entry independently (SGD, Adam, AdamW, ...). Parameters that get smaller become new
    objects, in the model and in the optimizer's groups, with their gradients and optimizer state; the optimizer itself
    and its hooks stay. A silenced filter that cannot be removed, because another layer writes to the same channel (in a
    residual sum) or gates it (squeeze and excitation), stays with its mask.

    Args:
        model: convolutions, linear layers and BatchNorm, pruned by :class:`Pruner`. It may be compiled.
        optimizer: the one that trains it, or a list of several.
        inputs: inputs that the model takes, to follow its channels: one or, if its ``forward`` needs several, a
            tuple of these, or a mapping by name. By default two 32 × 32 images of noise.

    Raises:
        ModuleNotFoundError: torch-pruning is not installed.
        ValueError: a silenced filter's channel feeds into something that cannot be shrunk, which is named; or the model
            does not run on the inputs. Model and optimizer are then untouched.
    """
    optimizers = [] if optimizer is None else with_those_within(as_given(optimizer))
    _check_plain(model)
    model = unwrap(model)
    inputs = _noise(model) if inputs is None else inputs
    with torch.enable_grad():
        cut = find_cut(model, inputs)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in cut.kept}
    for one in optimizers:
        _check_state(one, parameters)
    masks = parameter_masks(model)
    _keep_identities(model, cut.kept)
    for name, kept in cut.kept.items():
        _replace(model, name, kept, optimizers)
    for name, sizes in cut.sizes.items():
        vars(model.get_submodule(name)).update(sizes)
    for name, mask in masks.items():
        mask = take(mask, cut.kept[name]) if name in cut.kept else mask
        replace_mask(model, name, None if mask.all() else mask)
    known = identities(model)
    units = {name: identity.index for name, identity in known.items()}
    totals = {name: identity.total for name, identity in known.items()}
    return Shrunk(units, totals, {name: cut.kept[name] for name in parameters})


def _check_plain(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel keeps its own list of parameters: shrink model.module, then wrap it again"
        )
    check_initialised(unwrap(model))
    check_whole(unwrap(model), "shrink")
    for name, _ in unwrap(model).named_parameters():
        kind = _PARAMETRIZED if _PARAMETRIZED in name else name
        if ways := [way for end, way in _MADE_PERMANENT.items() if kind.endswith(end)]:
            raise ValueError(
                f"{name} is turned into the layer's own parameter by torch.nn.utils: make that permanent first, with "
                f"torch.nn.utils.{ways[0]}"
            )


def _noise(model: nn.Module) -> Tensor:
    """Noise, (2, C, 32, 32) for the C input channels of the first convolution, from a generator of its own."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(
            "shrink() has to run the model, which has no 2D convolution to take an input's shape from: pass "
            "inputs=<a batch that it takes>"
        )
    noise = torch.randn(2, first.in_channels, 32, 32, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(first.weight)


def _check_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    for parameter, state in state_of(optimizer).items():
        if not isinstance(parameter, Tensor):  # what is kept of all parameters, by a name
            state = {parameter: state}
        for key, value in state.items():
            shape = value.shape if isinstance(value, Tensor) else torch.Size()
            of_all = isinstance(value, list | tuple | dict) and bool(value)  # LBFGS keeps one history of all parameters
            if names and (of_all or (parameter in names and shape.numel() != 1 and shape != parameter.shape)):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of {names.get(parameter, 'its parameters')} in a shape "
                    "of its own, so it cannot be carried over: optimizer.state.clear() drops what it keeps. Model and "
                    "optimizer are left as they were"
                )


def _keep_identities(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    for name, module in model.named_modules():
        index = kept.get(weight_of(name))
        if is_layer(module) and index is not None and len(index) < len(module.weight):
            keep_units(module, rows_left(index, module.weight))


@torch.no_grad()
def _replace(model: nn.Module, name: str, kept: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a smaller tensor in place of a parameter or buffer, in the model and in the optimizers' groups and state."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, leaf)
    new = take(old, kept)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
        new.grad = None if old.grad is None else take(old.grad, kept)
        for optimizer in optimizers:
            _replace_in(optimizer, old, new, kept)
    setattr(owner, leaf, new)


def _replace_in(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, kept: Tensor) -> None:
    for group in getattr(optimizer, "param_groups", ()):
        group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
    states = state_of(optimizer)
    if old in states:
        states[new] = {
            key: take(value, kept) if isinstance(value, Tensor) and value.shape == old.shape else value
            for key, value in states.pop(old).items()
        }
