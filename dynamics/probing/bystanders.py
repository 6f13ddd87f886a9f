"""Modules outside the model, such as a loss, a teacher or another network: their state is part of a step's moment."""

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
    """Keeps what modules outside the model have as they run, in the moment of the batch that they run on.

    The first time all that run are kept, afterwards those that the objective was found to run: what others have is none
    of its business. Their parameters are kept where they are no more than those that the model trains, or were found to
    move between a forward pass and its step.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self._model = model
        self._most = sum(one.numel() for one in model.parameters() if one.requires_grad)
        runs_others = objective is not cross_entropy_objective
        self._known: weakref.WeakSet[nn.Module] | None = None if runs_others else weakref.WeakSet()
        self._moving: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._hook: RemovableHandle | None = None

    def watch(self, moment: Callable[[], Moment | None], asleep: Callable[[], bool]) -> None:
        """From now until :meth:`leave`; ``moment()`` is that of the batch in question, if there is one."""
        if self._hook is not None or not (self._known is None or len(self._known)):
            return
        ours = set(self._model.modules())

        def runs(module: nn.Module, inputs: tuple) -> None:
            if torch.compiler.is_compiling() or is_batched() or module in ours or asleep():
                return
            if getattr(module, "_orig_mod", None) is self._model:  # compiled with the hook, it would be compiled twice
                self._known = weakref.WeakSet()
                self.leave()
                return
            if not (self._known is None or module in self._known):
                return
            if (at := moment()) is not None:
                with suppress(Exception):  # it may be anything; then what it has by the time of the probe has to do
                    at.keep_another(module, parameters=module in self._moving or self._are_few(module))

        self._hook = register_module_forward_pre_hook(runs)

    def _are_few(self, module: nn.Module) -> bool:
        return sum(one.numel() for one in module._parameters.values() if one is not None) <= self._most

    def of_objective(self, modules: Iterable[nn.Module]) -> None:
        """Say which ones the objective runs."""
        self._known = weakref.WeakSet(modules)

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Say which ones move: from now on their parameters are kept."""
        self._moving.update(modules)

    def leave(self) -> None:
        """Look no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
