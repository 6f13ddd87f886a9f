"""Looks whether what is pruned stays at zero while optimizers step, and warns of one that moves it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..warning import warn
from .optimizers import stepping

Pruned = Callable[[nn.Module], Iterable[tuple[str, Tensor, Tensor]]]


def watch_zeros(model: nn.Module, optimizers: Iterable[Any], pruned: Pruned) -> None:
    """Look after steps of the optimizers from now on; ``pruned(model)`` is each pruned parameter's name, it, its mask.

    What cannot be hooked is not watched.
    """
    for given in optimizers:
        try:
            optimizer = stepping(given)
        except TypeError:
            continue
        looks = [hook for hook in optimizer._optimizer_step_post_hooks.values() if isinstance(hook, _Look)]
        for look in looks:
            if look.model() is None:
                look.remove()
        if of_model := [look for look in looks if look.model() is model]:
            of_model[0].steps = 0
        else:
            _Look(model, optimizer, type(given).__name__, pruned)


class _Look:
    """Hook of an optimizer. It looks after the first step, the second, fourth, eighth ...: a GPU is waited for."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, name: str, pruned: Pruned) -> None:
        self.model, self.steps = weakref.ref(model), 0
        self._name, self._pruned, self._said = name, pruned, False
        self.remove = optimizer.register_step_post_hook(self).remove

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        model = self.model()
        if model is None or torch.compiler.is_compiling() or _is_captured():
            return
        self.steps += 1
        if self._said or self.steps & (self.steps - 1):
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter, mask in self._pruned(model):
            if id(parameter) in held and _is_whole(parameter, mask):
                values = parameter.detach().masked_fill(mask, 0)
                if moved := int(values.count_nonzero()):
                    self._said = True
                    warn(
                        f"{moved} of {int((~mask).sum())} pruned entries of {name!r} are not zero after a step of "
                        f"{self._name}, the largest of them {float(values.abs().max()):.2g}. They stay at zero only if "
                        "nothing else sets them, and the optimizer updates each entry by its own gradient and state. "
                        "Dropping that state as you prune may be enough: Pruner(..., keep_state=False). If not, set "
                        "them to zero after each step: apply_masks(model, parameter_masks(model), optimizer), both "
                        "from dynamics.pruning"
                    )
                    return


def _is_whole(parameter: Tensor, mask: Tensor) -> bool:
    """Whether the parameter is here, and not sharded or replaced by one of another shape."""
    return not hasattr(parameter, "to_local") and parameter.shape == mask.shape and not parameter.is_meta


def _is_captured() -> bool:
    """Whether a CUDA graph is being captured, in which nothing can be looked at."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
