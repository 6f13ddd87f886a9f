"""Masks: which parameters are pruned, and what keeps them at exactly zero while training continues.

The masks of a module's own parameters are a dictionary in an attribute of the module: copied with it, but not part of
the state dict. They are not buffers, because an averaged copy of a model (torch.optim.swa_utils) pairs buffers by
position. Three things keep a pruned parameter at zero: its value is set to zero, its gradient is masked as it arrives,
and its optimizer state is masked once. That suffices for any optimizer whose update of a parameter with zero value,
gradient and state is zero (SGD with momentum and weight decay, Adam, AdamW, ...); of any other there is a warning.
Loaded values are masked, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .identities import layer_named
from .optimizer_state import of_each_entry
from .optimizers import with_those_within
from .zeros import watch_zeros

_MASKS = "_parameter_masks"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def parameter_masks(model: nn.Module) -> dict[str, Tensor]:
    """Mask of each pruned parameter by the parameter's name: True where it is kept, in the parameter's shape.

    This includes the masks of ``torch.nn.utils.prune``, whose parameters are called ``<parameter>_orig``.
    """
    buffers, modules, found = dict(model.named_buffers()), dict(model.named_modules()), {}
    for name, _ in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        ours = _mask(modules[path], leaf) if path in modules else None  # a container may name its parameters with dots
        torchs = buffers.get(f"{name.removesuffix('_orig')}_mask") if name.endswith("_orig") else None
        masks = [mask.bool() for mask in (ours, torchs) if mask is not None]
        if masks:
            found[name] = masks[0] & masks[1] if len(masks) == 2 else masks[0]
    return found


def filters_left(model: nn.Module, layer: str) -> Tensor:
    """Which filters of a layer are not pruned, boolean (filter,)."""
    module = layer_named(model, layer)
    mask = _mask(module, "weight")
    kept = torch.ones_like(module.weight, dtype=torch.bool) if mask is None else mask.bool()
    return kept.flatten(1).any(1)


def _mask(owner: nn.Module, leaf: str) -> Tensor | None:
    """A parameter's own mask, moved to the parameter's device; None if it has none."""
    masks = owner.__dict__.get(_MASKS, {})
    parameter = owner._parameters.get(leaf) if leaf in masks else None  # None if it is made of others since
    if parameter is not None and masks[leaf].device != parameter.device:
        masks[leaf] = masks[leaf].to(parameter.device)
    return masks.get(leaf)


def _pruned(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value and mask of each parameter that is masked by this file, and still there."""
    for path, module in model.named_modules():
        for leaf in module.__dict__.get(_MASKS, {}):
            if (parameter := module._parameters.get(leaf)) is not None:
                yield f"{path}.{leaf}".removeprefix("."), parameter, cast(Tensor, _mask(module, leaf))


def _register(model: nn.Module, name: str, mask: Tensor) -> None:
    owner, leaf = _owner(model, name)
    owner.__dict__.setdefault(_MASKS, {})[leaf] = mask
    _mask_gradient(owner, leaf)
    above = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    # attention uses its output projection's weight without calling that module, so the hook goes on attention, too
    for module in (owner, above) if isinstance(above, nn.MultiheadAttention) else (owner,):
        if not any(hook is _mask_gradients for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_mask_gradients)
    if not any(hook is _mask_loaded for hook in owner._load_state_dict_post_hooks.values()):
        owner.register_load_state_dict_post_hook(_mask_loaded)


class _Masking:
    """The gradient hook of a pruned parameter. Copying a parameter drops its hooks; this type shows if one is left."""

    def __init__(self, owner: nn.Module, leaf: str) -> None:
        self._owner, self._leaf = owner, leaf

    def __call__(self, grad: Tensor) -> Tensor:
        mask = _mask(self._owner, self._leaf)
        if grad.layout is not torch.sparse_coo:
            return torch.where(mask, grad, 0)  # unlike a product, this removes NaN and infinity, too
        grad = grad.coalesce()  # a sparse embedding's
        places, values = grad.indices(), grad.values()
        kept = torch.where(mask[tuple(places)], values, 0)
        return torch.sparse_coo_tensor(places, kept, grad.shape, is_coalesced=True, check_invariants=False)


def _mask_gradient(owner: nn.Module, leaf: str) -> None:
    parameter = getattr(owner, leaf)  # a frozen one gets its hook in the first forward pass after it is unfrozen
    if parameter.requires_grad and not any(
        isinstance(hook, _Masking) for hook in (parameter._backward_hooks or {}).values()
    ):
        parameter.register_hook(_Masking(owner, leaf))


def _mask_gradients(owner: nn.Module, inputs: tuple) -> None:
    """Forward pre-hook: restores the gradient hook of a copied or replaced parameter."""
    if not torch.compiler.is_compiling():
        for module in (owner, *owner.children()):
            for leaf in module.__dict__.get(_MASKS, {}):
                if isinstance(module._parameters.get(leaf), nn.Parameter):  # not a tensor from functional_call
                    _mask_gradient(module, leaf)


@torch.no_grad()
def _mask_loaded(owner: nn.Module, keys: tuple) -> None:
    """Hook after load_state_dict: what a module loads, such as its initial weights, is pruned as the module is."""
    for leaf in owner.__dict__.get(_MASKS, {}):
        parameter, mask = getattr(owner, leaf), _mask(owner, leaf)
        if hasattr(parameter, "to_local"):  # sharded (FSDP2) after it was pruned: its mask is still whole
            mesh, placements = parameter.device_mesh, parameter.placements
            mask = torch.distributed.tensor.distribute_tensor(mask, mesh, placements, src_data_rank=None).to_local()
            parameter = parameter.to_local()
        _zero(parameter, mask)


@torch.no_grad()
def apply_masks(model: nn.Module, keep: Mapping[str, Tensor], *optimizers: torch.optim.Optimizer) -> None:
    """Prune: set parameters to zero for good where ``keep`` is False, with their gradients and optimizer state.

    ``keep`` maps parameter names to boolean tensors of the parameter's shape. A later call can only prune more.
    Optimizers that steps go through, in a wrapper such as Lookahead, are masked with it. One that moves what is pruned
    all the same, because it mixes entries as Shampoo does, is warned of.

    Raises:
        TypeError: an optimizer is none, such as a list of some.
        ValueError: an optimizer keeps quantised numbers of a parameter. Nothing is then pruned.
    """
    pruned = [name for name, kept in keep.items() if not kept.all() or _mask(*_owner(model, name)) is not None]
    called = {getattr(*_owner(model, name)): name for name in pruned}
    states = of_each_entry(called, with_those_within(optimizers))
    newly = False
    for name, kept in keep.items():
        owner, leaf = _owner(model, name)
        parameter, mask = getattr(owner, leaf), _mask(owner, leaf)
        if mask is None:
            mask = torch.ones_like(parameter, dtype=torch.bool)
            _register(model, name, mask)
        kept = kept.to(mask.device, torch.bool)
        newly |= bool((mask & ~kept).any())
        mask.logical_and_(kept)
        for tensor in (parameter, parameter.grad, *states.get(parameter, ())):
            if tensor is not None:
                _zero(tensor, mask)
    if newly:
        watch_zeros(model, optimizers, _pruned)


def lift_masks(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Unprune: where ``keep`` is True a parameter is free again. It continues from zero; masks change in place."""
    masks = parameter_masks(model)
    for name, kept in keep.items():
        if name in masks:
            masks[name].logical_or_(kept.to(masks[name].device))


def _zero(tensor: Tensor, mask: Tensor) -> None:
    """Set to zero where the mask is False; unlike a product, this leaves no −0 and no NaN."""
    tensor.masked_fill_(~mask, 0)


def replace_mask(model: nn.Module, name: str, kept: Tensor | None) -> None:
    """Replace a parameter's mask, after the parameter's shape changed, say; None removes it and its hooks."""
    owner, leaf = _owner(model, name)
    if kept is not None:
        _register(model, name, kept)
        return
    masks = owner.__dict__[_MASKS]
    del masks[leaf]
    _drop(getattr(owner, leaf)._backward_hooks, lambda hook: isinstance(hook, _Masking))
    if not masks:
        _drop(owner._forward_pre_hooks, lambda hook: hook is _mask_gradients)
        _drop(owner._load_state_dict_post_hooks, lambda hook: hook is _mask_loaded)


def _drop(hooks: MutableMapping[int, Any] | None, unwanted: Callable[[Any], bool]) -> None:
    for key in [key for key, hook in (hooks or {}).items() if unwanted(hook)]:
        del hooks[key]
