"""Optimizers as a user passes them: one or several, each itself or inside what steps through it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch

_WITHIN = ("optimizer", "base_optimizer", "_base_optimizer", "optim")  # wrappers' attributes for the inner optimizer


def as_given(given: Any) -> list[Any]:
    """The given optimizers, one or several, as a list."""
    return list(given) if isinstance(given, list | tuple) else [given]


def stepping(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself if it has step hooks, else the one with hooks that it wraps.

    Raises:
        TypeError: there is none, or there are several.
    """
    given = optimizer
    while not _has_hooks(optimizer):
        named = [getattr(optimizer, name, None) for name in _WITHIN]
        within = [one for one in named if isinstance(one, torch.optim.Optimizer)][:1] or held_by(optimizer)
        if len(within) != 1:
            advice = f", which wraps {len(within)} optimizers: pass these as a list" if within else ""
            kind = f"{type(given).__module__}.{type(given).__name__}".removeprefix("builtins.")
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {kind}{advice}")
        (optimizer,) = within
    return optimizer


def does_more(wrapper: Any) -> bool:
    """Whether a wrapper's step may do more than step the inner optimizer, as frameworks' wrappers do not."""
    framework = type(wrapper).__module__.partition(".")[0] in ("accelerate", "lightning", "pytorch_lightning")
    own = inspect.getattr_static(type(wrapper), "step", None)
    return not framework and isinstance(own, FunctionType) and isinstance(getattr(wrapper, "__dict__", None), dict)


def with_those_within(given: Iterable[Any]) -> list[Any]:
    """The given optimizers and all that these hold, such as the one that a wrapper steps through; each once."""
    found, ahead = {}, list(given)
    while ahead:
        one = ahead.pop(0)
        if id(one) not in found:
            found[id(one)] = one
            ahead += held_by(one)
    return list(found.values())


def held_by(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers among an object's attributes, each once."""
    held = {id(one): one for one in getattr(optimizer, "__dict__", {}).values()}.values()
    return [one for one in held if isinstance(one, torch.optim.Optimizer)]


def _has_hooks(optimizer: Any) -> bool:
    """Whether it is an initialised torch optimizer: Accelerate's wrapper is an instance without calling __init__."""
    return isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer)
