"""Notices when a model's forward pass begins, by hooks that copies of the model and compilers never see."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardPasses:
    """Calls ``begins`` when a forward pass with gradients begins, ``evaluates`` when one without gradients does.

    ``begins`` gets the module that runs: the model or, if that has no ``forward``, as a ModuleDict has none, the
    submodule that runs first. Hooks are on the model only from :meth:`watch` to :meth:`leave`, so that it can be
    scripted at other times.
    """

    def __init__(self, model: nn.Module, begins: Callable[[nn.Module], None], evaluates: Callable[[], None]) -> None:
        self._model, self._begins, self._evaluates = model, begins, evaluates
        self._hook = _OfOneModel(torch.compiler.disable(self._run))
        self._hooks: list[RemovableHandle] = []
        self.count = 0  # of all forward passes that were seen, with gradients or without

    def watch(self) -> None:
        """Watch from now on; a forward pass that has begun, but not ended yet, begins as if it did so now.

        Raises:
            RuntimeError: the model is a ScriptModule.
        """
        if not self._hooks:
            parts = [part for part in self._model.modules() if part is not self._model]
            self._hook_on(*([self._model] if _can_be_called(self._model) else parts))
            if _is_running(self._model):  # the hooks of this pass were looked up before
                self._run(self._model, ())

    def _hook_on(self, *modules: nn.Module) -> None:
        self._hooks = [module.register_forward_pre_hook(self._hook) for module in modules]

    def _run(self, module: nn.Module, inputs: tuple) -> None:
        self.count += 1
        if torch.jit.is_tracing():
            return
        if not torch.is_grad_enabled():
            self._evaluates()
            return
        if len(self._hooks) > 1:  # from now on this submodule stands for the model
            self.leave()
            self._hook_on(module)
        self._begins(module)

    def leave(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class _OfOneModel:
    """A forward pre-hook that is not copied or pickled with the module."""

    def __init__(self, runs: Callable[[nn.Module, tuple], None]) -> None:
        self._runs = runs

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        if not torch.compiler.is_compiling():  # compiled code would leave the hook out, or fail to compile
            self._runs(module, inputs)

    def __reduce__(self) -> tuple:
        return getattr, ({}, "get")  # a copy becomes dict.get of an empty dict, which returns the inputs unchanged


def _can_be_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _is_running(module: nn.Module) -> bool:
    """Whether this thread is within a call of the module: in its forward method or in a hook of it."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
    return False


def trains(module: nn.Module) -> bool:
    """Whether any of its modules is in training mode."""
    return any(part.training for part in module.modules())
