"""What a forward pass starts from besides parameters and batch, kept to run it again without side effects."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..hardware.random_numbers import RandomState, random_numbers_untouched
from .contents import storage_of
from .kept import kept
from .lending import Tensors, copies, own_of
from .others import Other, OthersAgain, norms_of, same
from .references import modules_of
from .undrawn import undrawn


class Moment:
    """A snapshot of buffers, random generators and what modules keep in plain attributes, such as a hidden state.

    It includes what the ``objective`` refers to, such as a generator of its own; :func:`~dynamics.probing.kept.kept`
    says what.

    Attributes:
        frozen: copies of the parameters that are not trained, which a forward pass may move; only if ``keep_frozen``.
        others: modules outside the model that were called since, each with its state when its last forward pass began.
        replaced: parameters that a forward pass has replaced by others, as found by :meth:`look_for_replaced`.
        moved_others: modules whose parameters were not kept, and had changed when they ran :meth:`again`.
        shares_parameters: whether a module outside that ran :meth:`again` shares parameters with the model.
        changed_beside: whether a module that the objective refers to was changed :meth:`again`, if that was looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        objective: Callable | None = None,
        *,
        keep_frozen: bool = False,
    ) -> None:
        self._model, self._device, self._objective = model, device, objective
        self._ours = set(model.modules())
        self._random, self._attributes = RandomState(device), kept(model.modules(), objective)
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._parameters = {name: one for name, one in model.named_parameters() if isinstance(one, nn.Parameter)}
        self._names = {id(one): name for name, one in self._parameters.items()}
        self._versions = {name: one._version for name, one in self._parameters.items() if one.requires_grad}
        frozen = self._frozen()
        self._norms, self._places = norms_of(frozen), _places(frozen)
        self.frozen = {name: one.detach().clone() for name, one in frozen.items()} if keep_frozen else {}
        self.replaced: dict[str, Tensor] = {}
        self._outside: Mapping[str, Tensor] = {}  # for a forward pass: parameters when its batch was seen
        self.others: dict[nn.Module, Other] = {}
        self.moved_others: set[nn.Module] = set()
        self.shares_parameters = self.changed_beside = False

    def _frozen(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self._model.named_parameters() if not parameter.requires_grad}

    def later(self) -> Moment:
        """The present moment, but with this one's random numbers."""
        moment = Moment(self._model, self._device, self._objective)
        moment._random = self._random
        return moment

    def with_present_numbers(self) -> Moment:
        """This moment, but with the present random numbers."""
        moment = copy.copy(self)
        moment._random, moment.others, moment.moved_others = RandomState(self._device), dict(self.others), set()
        return moment

    def keep_another(self, module: nn.Module, *, parameters: bool) -> None:
        """Keep the state of a module outside the model as it runs; its ``parameters`` too if asked, for these may move.

        The last run counts: a network may run for its own loss, step, and then run for this one. Parameters that it
        shares with the model are the model's, and move with these. Its parts are kept, too, without their parameters,
        because it may run them by their forward methods, which call no hooks; those that are called keep themselves.
        """
        own = {name: one for name, one in own_of(module._parameters).items() if id(one) not in self._names}
        held = copies(own) if parameters else {}
        self._keep(module, held, {} if held else norms_of(own), module)
        for part in module.modules():
            if part not in self._ours and (part not in self.others or self.others[part].by is module is not part):
                self._keep(part, {}, {}, module)

    def _keep(self, module: nn.Module, held: Tensors, norms: Mapping[str, float], by: nn.Module) -> None:
        self.others[module] = Other(kept([module]).put_back, copies(own_of(module._buffers)), held, norms, by)

    def shared(self, module: nn.Module) -> Tensors:
        """The parameters that a module outside shares with the model: the tensors that the model has for them now."""
        names = {own: self._names[id(one)] for own, one in module._parameters.items() if id(one) in self._names}
        now = dict(self._model.named_parameters()) if names else {}
        return {own: now[name] for own, name in names.items() if name in now}

    def of_pass(self, first: Moment | None) -> Moment:
        """Note that this is the moment of a forward pass, whose batch was seen at ``first``; returns itself."""
        self._outside = first._parameters if first else {}
        return self

    def look_for_replaced(self) -> None:
        """Find the parameters of this moment that the model has replaced by others of the same shape since.

        Tensors that ``torch.func.functional_call`` had put there for a forward pass do not count: the model has its own
        parameters again.
        """
        for name, now in self._model.named_parameters():
            was, lent = self._parameters.get(name, now), self._outside.get(name) is now
            if was is not now and not lent and was.shape == now.shape:
                self.replaced[name] = was.detach()

    @property
    def trained(self) -> set[str]:
        """Names of the parameters that were trained at the moment."""
        return set(self._versions)

    @property
    def moved(self) -> bool:
        """Whether a parameter that is not trained has changed since."""
        return not same(self._norms, norms_of(self._frozen()))

    @property
    def touched(self) -> bool:
        """Whether a parameter that is not trained has been written to since, even if with the same numbers."""
        return self._places != _places(self._frozen())

    @property
    def changed(self) -> dict[str, nn.Parameter]:
        """The trained parameters that have been changed in place since, by name."""
        return {
            name: self._parameters[name]
            for name, version in self._versions.items()
            if self._parameters[name]._version != version
        }

    @property
    def changed_outside(self) -> list[Tensor]:
        """Tensors outside the model that the objective refers to, that may be trained, and have changed since."""
        return self._attributes.moved

    def is_as(self, other: Moment) -> bool:
        """Whether a forward pass starts from the same state at both moments, as far as both keep it."""
        theirs = other._buffers | other.frozen
        dense = {name: one for name, one in (self._buffers | self.frozen).items() if one.layout is torch.strided}
        alike = all(torch.equal(ours, theirs[name]) for name, ours in dense.items() if name in theirs)
        beside = self.others.keys() == other.others.keys()
        alike = alike and beside and all(other.others[module] is was for module, was in self.others.items())
        return alike and self._random == other._random and self._attributes.are_as(other._attributes)

    def buffers(self) -> dict[str, Tensor]:
        """A fresh copy of each buffer, by name."""
        return {name: buffer.clone() for name, buffer in self._buffers.items()}

    def drawn(self) -> bool:
        """Whether random numbers were drawn since this moment."""
        return RandomState(self._device) != self._random

    def counted(self) -> bool:
        """Whether what modules or the objective keep has changed since this moment, in place or by something new.

        Buffers do not count.
        """
        return not kept(self._model.modules(), self._objective).are_as(self._attributes)

    def layout(self) -> tuple[Hashable, ...]:
        """Name, shape and type of each tensor that is kept by name."""
        return tuple((name, one.shape, one.dtype) for name, one in (self._buffers | self.frozen).items())

    def take(self, other: Moment) -> None:
        """Copy the other's buffers and frozen parameters into this one's, in place."""
        theirs = other._buffers | other.frozen
        for name, ours in (self._buffers | self.frozen).items():
            ours.copy_(theirs[name])

    @contextmanager
    def again(self, *, present: Collection[Tensor] = (), look: bool = False) -> Iterator[set[nn.Module]]:
        """Inside, random generators and attributes are those of the moment; afterwards they are as they were before.

        Iterators cannot be drawn from.

        The same holds for the state of other modules that run inside, such as a teacher, if it was kept; in any case
        their buffers and attributes are restored afterwards. Parameters that they share with the model are those that
        the model is evaluated with, and those that are ``present`` stay as they are. Yields the set to which these
        modules are added. Modules that other threads run meanwhile are ignored.

        A module that the objective refers to may be run by other methods, which call no hooks, or change before its
        hooks run: it begins as it is at present, and what changed is put back; if ``look``, a change is noted.
        """
        ours = set(self._model.modules())
        with random_numbers_untouched(self._device), ExitStack() as afterwards:  # all of it, the last first
            others = OthersAgain(self, ours, present, afterwards, look=look)
            afterwards.callback(kept(ours, self._objective, afterwards=True).put_back)
            afterwards.callback(self._attributes.now().put_back)
            hook = register_module_forward_pre_hook(others.begins)
            try:
                others.guard(one for one in (*modules_of(self._objective), *self.others) if one not in ours)
                self._attributes.put_back()
                self._random.restore()
                with undrawn(self._model.modules(), self._objective):
                    yield others.called
            finally:
                hook.remove()


def _places(tensors: Tensors) -> dict[str, tuple]:
    """Memory and version of each tensor, by name: one of them changes when the tensor is written to or replaced."""
    dense = {name: one for name, one in tensors.items() if one is not None and not one.is_inference()}
    return {name: (storage_of(one), one._version) for name, one in dense.items()}
