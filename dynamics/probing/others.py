"""Modules outside the model, such as a teacher: how they run again as they did, and have their state afterwards."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..curvature.ordinary import is_batched
from .contents import PutBack
from .kept import kept
from .lending import Guard, Tensors, lent, may_keep, put

if TYPE_CHECKING:
    from .moment import Moment


class Other(NamedTuple):
    """A module outside the model as it ran: its attributes, buffers and parameters.

    Of parameters that are not kept, ``norms`` tell whether they have moved since. ``by``: the module that was called,
    itself or the one that it is a part of, and may have been run by.
    """

    attributes: PutBack
    buffers: Tensors
    parameters: Tensors
    norms: Mapping[str, float]
    by: nn.Module


class OthersAgain:
    """The modules outside the model in an evaluation at a moment; ``afterwards`` gets what puts their state back.

    Attributes:
        called: those that were called, and the parts that these may have run.
    """

    def __init__(
        self, moment: Moment, ours: set[nn.Module], present: Collection[Tensor], afterwards: ExitStack, *, look: bool
    ) -> None:
        self._moment, self._ours, self._afterwards, self._look = moment, ours, afterwards, look
        self._stay = {id(one) for one in present}
        self._thread = threading.get_ident()
        self._saved: set[nn.Module] = set()
        self._elsewhere: set[nn.Module] = set()  # run by other threads meanwhile
        self._guards: list[Guard] = []
        self.called: set[nn.Module] = set()
        afterwards.callback(self._put_back_guarded)

    def guard(self, modules: Iterable[nn.Module]) -> None:
        """Put the present state of modules back at the very end, when calls have left what they entered."""
        same: dict[int, Tensor] = {}
        for module in dict.fromkeys(modules):
            if may_keep(module) and not isinstance(module, torch.jit.ScriptModule):
                self._guards.append(Guard(module))
                self._guards[-1].lend(same)

    def _put_back_guarded(self) -> None:
        here = [guard for guard in self._guards if guard.module not in self._elsewhere]
        self._moment.changed_beside |= self._look and any(guard.has_changed() for guard in here)
        for guard in self._guards:
            guard.leave() if guard.module in self._elsewhere else guard.put_back()

    def begins(self, module: nn.Module, inputs: tuple) -> None:
        """Hook of all modules: give one outside the model the state that it had at the moment."""
        if threading.get_ident() != self._thread:
            self._elsewhere.update(module.modules())
        elif module not in self._ours and module not in self.called:
            self.called.add(module)
            if is_batched():  # torch.func has put tensors into the module that are not its own
                return
            self._save(module.modules())  # a part may be run by its forward method, which calls no hook
            known = self._moment.others
            self._begin(module, known.get(module, Other(_nothing, module._buffers, {}, {}, module)))
            for part in module.modules():
                if part not in self.called and part in known and known[part].by is module:
                    self.called.add(part)
                    self._begin(part, known[part])

    def _save(self, modules: Iterable[nn.Module]) -> None:
        """Put the present state of modules back afterwards."""
        if new := [module for module in modules if not (module in self._ours or module in self._saved)]:
            self._saved.update(new)
            self._afterwards.callback(kept(new, afterwards=True).put_back)
            for module in new:
                self._afterwards.callback(lent(module._buffers, module._buffers))

    def _begin(self, module: nn.Module, was: Other) -> None:
        moment, now = self._moment, module._parameters
        if not same(was.norms, norms_of({name: now.get(name) for name in was.norms})):
            moment.moved_others.add(module)
        self._afterwards.callback(lent(module._buffers, was.buffers))
        shared = moment.shared(module)
        moment.shares_parameters |= bool(shared)
        self._afterwards.callback(put(now, shared))
        theirs = {name: one for name, one in was.parameters.items() if id(now.get(name)) not in self._stay}
        self._afterwards.callback(lent(now, theirs))
        was.attributes()


@torch.no_grad()
def norms_of(tensors: Tensors) -> dict[str, float]:
    """The norm of each dense floating-point tensor, by name: it shows cheaply whether the tensor has changed."""
    told = {
        name: one
        for name, one in tensors.items()
        if one is not None and one.layout is torch.strided and one.is_floating_point()
    }
    precise = {name: torch.promote_types(one.dtype, torch.float32) for name, one in told.items()}
    norms = {name: torch.linalg.vector_norm(one, dtype=precise[name]).cpu() for name, one in told.items()}
    return {name: norm.item() for name, norm in norms.items()}


def same(norms: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether norms are unchanged; tensors that are gone, or whose norm was NaN, count as unchanged."""
    return all(now.get(name, norm) == norm or norm != norm for name, norm in norms.items())


def _nothing() -> None:
    pass
