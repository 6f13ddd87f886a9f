"""When a model's forward pass begins, by hooks that copies of the model and compilers never see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardPasses:
    """Calls ``begins`` with the module whose forward pass begins, if gradients may come of it, else ``evaluates``.

    The module is the model. Of one that cannot be called, a ModuleDict say, or that is trained by methods of other
    names, it is the part that runs first. The hooks are there from :meth:`watch` to :meth:`leave`: who scripts the
    model otherwise meets none.
    """

    def __init__(self, model: nn.Module, begins: Callable[[nn.Module], None], evaluates: Callable[[], None]) -> None:
        self._model, self._begins, self._evaluates = model, begins, evaluates
        self._hook = _OfOneModel(torch.compiler.disable(self._run))
        self._hooks: list[RemovableHandle] = []
        self.count = 0  # of all that were seen, with gradients or without

    def watch(self) -> None:
        """From now on.

        Raises:
            RuntimeError: the model is a ScriptModule.
        """
        if not self._hooks:
            parts = [part for part in self._model.modules() if part is not self._model]
            self._hook_on(*([self._model] if _can_be_called(self._model) else parts))

    def _hook_on(self, *modules: nn.Module) -> None:
        self._hooks = [module.register_forward_pre_hook(self._hook) for module in modules]

    def _run(self, module: nn.Module, inputs: tuple) -> None:
        self.count += 1
        if torch.jit.is_tracing():
            return
        if not torch.is_grad_enabled():
            self._evaluates()
            return
        if len(self._hooks) > 1:  # from now on this part stands for the model
            self.leave()
            self._hook_on(module)
        self._begins(module)

    def leave(self) -> None:
        """No more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _OfOneModel:
    """A hook before forward passes that copies of the module, and what is saved of it, have no part in."""

    def __init__(self, runs: Callable[[nn.Module, tuple], None]) -> None:
        self._runs = runs

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        if not torch.compiler.is_compiling():  # what is compiled with it would go without it, or not be compiled at all
            self._runs(module, inputs)

    def __reduce__(self) -> tuple:
        return getattr, ({}, "get")  # a copy's gives the inputs back as they are


def _can_be_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def trains(module: nn.Module) -> bool:
    """Whether a part of it is in training mode."""
    return any(part.training for part in module.modules())
