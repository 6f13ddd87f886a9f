"""Masks: which parameters are pruned, and what keeps them at exactly zero while training goes on.

A mask is a boolean buffer ``<parameter>_mask`` on the module that owns the parameter; it moves with the module and
stays out of the state dict. (A deep copy of the module has the mask, but not yet what masks the gradient.) While it is
there, three things hold a pruned parameter at zero under any optimizer whose update of a parameter with zero value,
gradient and state is zero (SGD with momentum and weight decay, Adam, AdamW, ...): its value is zero, its gradient is
masked as it arrives, and its optimizer state is masked once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_SUFFIX = "_mask"


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def parameter_masks(model: nn.Module) -> dict[str, Tensor]:
    """Mask of each pruned parameter by the parameter's name: True where it is kept, same shape."""
    buffers = dict(model.named_buffers())
    return {name: buffers[name + _SUFFIX] for name, _ in model.named_parameters() if name + _SUFFIX in buffers}


def _register(owner: nn.Module, leaf: str) -> Tensor:
    parameter = getattr(owner, leaf)
    mask = torch.ones_like(parameter, dtype=torch.bool)
    owner.register_buffer(leaf + _SUFFIX, mask, persistent=False)
    parameter.register_hook(lambda grad: grad * getattr(owner, leaf + _SUFFIX))
    return mask


@torch.no_grad()
def apply_masks(model: nn.Module, keep: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Prune: set parameters to zero where ``keep`` is False, for good, with their gradient and optimizer state.

    ``keep`` maps parameter names to boolean tensors of the parameter's shape. A later call can only prune more.
    """
    for name, kept in keep.items():
        owner, leaf = _owner(model, name)
        mask = getattr(owner, leaf + _SUFFIX, None)
        if mask is None:
            mask = _register(owner, leaf)
        mask.logical_and_(kept.to(mask.device))
        parameter = getattr(owner, leaf)
        _zero(parameter, mask)
        if parameter.grad is not None:
            _zero(parameter.grad, mask)
        for state in (optimizer.state.get(parameter, {}) if optimizer is not None else {}).values():
            if isinstance(state, Tensor) and state.shape == mask.shape:
                _zero(state, mask)


def _zero(tensor: Tensor, mask: Tensor) -> None:
    """Zero where not kept; assigned, not multiplied: no −0, and NaN goes too."""
    tensor.masked_fill_(~mask, 0)
