"""Modules outside the model, such as a loss, a teacher or another network: a step's moment includes their state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..curvature.ordinary import is_batched
from .moment import Moment
from .objective import Objective, cross_entropy_objective


class Bystanders:
    """Keeps the state of modules outside the model as they run, in the moment of the batch that they run on.

    The first time, every module that runs is kept; afterwards only those that the objective was found to run. The
    parameters of a module are kept if they are no more than those that the model trains, or if they were found to move
    between a forward pass and its step.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model = model
        self._most = sum(one.numel() for one in model.parameters() if one.requires_grad)
        runs_others = objective is not cross_entropy_objective
        self._known: weakref.WeakSet[nn.Module] | None = None if runs_others else weakref.WeakSet()
        self._moving: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hook: RemovableHandle | None = None

    def watch(self, moment: Callable[[], Moment | None], asleep: Callable[[], bool]) -> None:
        """Watch until :meth:`leave`; ``moment()`` returns the moment of the batch that a module runs on, or None."""
        if self._hook is not None or not (self._known is None or len(self._known)):
            return
        ours = set(self._model.modules())

        def runs(module: nn.Module, inputs: tuple) -> None:
            if torch.compiler.is_compiling() or is_batched() or module in ours or asleep():
                return
            if getattr(module, "_orig_mod", None) is self._model:  # a global hook would make torch compile it again
                self._known = weakref.WeakSet()
                self.leave()
                return
            if not (self._known is None or module in self._known):
                return
            if (at := moment()) is not None:
                with suppress(Exception):  # a module may be anything; then its state when the probe runs has to do
                    at.keep_another(module, parameters=module in self._moving or self._are_few(module))

        self._hook = register_module_forward_pre_hook(runs)

    def _are_few(self, module: nn.Module) -> bool:
        return sum(one.numel() for one in module._parameters.values() if one is not None) <= self._most

    def of_objective(self, modules: Iterable[nn.Module]) -> None:
        """Note which modules the objective runs; only these are kept from now on."""
        self._known = weakref.WeakSet(modules)

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Note which modules move between a forward pass and its step: from now on their parameters are kept."""
        self._moving.update(modules)

    def leave(self) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
