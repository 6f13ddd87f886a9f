"""Checks on the graph of a loss: whether it depends on the tensors the loss was evaluated with, and on no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

ONCE = "an operation of the loss is once_differentiable"
_LENT = "_lent_on_the_way_back"
_KNOWN = ("torch", __package__.partition(".")[0])  # packages whose autograd functions never rerun a network

_FOREIGN = (
    "the loss uses a parameter of the model, of shape {shape}, that was taken out of it beforehand "
    "(into a list, a dictionary, an object): take parameters from the model each time the loss is "
    "evaluated, as attributes of their modules or from model.named_parameters()"
)


@dataclass
class BackwardPass:
    """Whether a part of the network ran ``again`` in a backward pass."""

    again: bool = False

    def check_whole(self) -> None:
        """Raise RuntimeError if one did, because the derivative is incomplete then."""
        if self.again:
            raise RuntimeError(ONCE)


def nodes(results: Iterable[Tensor]) -> Iterator[torch.autograd.graph.Node]:
    """Every node of the graphs that lead to the results, once."""
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [result.grad_fn for result in results]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


def check_differentiable(results: Iterable[Tensor]) -> None:
    """Raise RuntimeError if a part has no derivative: autograd would silently treat it as a constant."""
    if any(node.name() == "torch::autograd::Error" for node in nodes(results)):
        raise RuntimeError(ONCE)


def may_run_again(loss: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether the graph has a custom autograd function, such as a reversible block or an adjoint equation.

    These may run a part of the network again in a backward pass.

    Raises:
        ValueError: the loss depends on one of the model's own ``parameters``, although others were in their place.
    """
    own, found = {id(parameter) for parameter in parameters}, False
    for node in nodes([loss]):
        if isinstance(node, BackwardCFunction):
            found = found or node._forward_cls.__module__.partition(".")[0] not in _KNOWN
        elif (variable := getattr(node, "variable", None)) is not None and id(variable) in own:
            raise ValueError(_FOREIGN.format(shape=tuple(variable.shape)))
    return found


def rounding(loss: Tensor) -> float:
    """The rounding unit of the coarsest data type in the loss's graph; autocast may have rounded on the way."""
    types = {one.dtype for node in nodes([loss]) for one in node._input_metadata}
    return max((torch.finfo(one).eps for one in types if one.is_floating_point or one.is_complex), default=0.0)


@contextmanager
def hooks_on_tensors() -> Iterator[list[Callable]]:
    """Yields a list of the hooks registered on tensors inside; these may change gradients in any way."""
    hooks: list[Callable] = []
    own = Tensor.register_hook

    def register_hook(tensor: Tensor, hook: Callable) -> RemovableHandle:
        hooks.append(hook)
        return own(tensor, hook)

    Tensor.register_hook = register_hook
    try:
        yield hooks
    finally:
        Tensor.register_hook = own


def lend_on_the_way_back(loss: Tensor, lent: Callable[[], AbstractContextManager]) -> None:
    """Have :func:`on_the_way_back` enter ``lent()`` for this loss, so that what runs again finds the probe's state."""
    setattr(loss, _LENT, lent)


@contextmanager
def on_the_way_back(loss: Tensor, leaves: Iterable[Tensor]) -> Iterator[BackwardPass]:
    """A context for backward passes from the loss; tells afterwards whether a part of the network ran again in them.

    It did if a module ran, or if something else accumulated gradients in the leaves; these gradients are left there.
    """
    way, lent = BackwardPass(), getattr(loss, _LENT, None)
    if lent is None:
        yield way
        return

    def runs(module: nn.Module, inputs: tuple) -> None:
        way.again = True

    with lent():
        hook = register_module_forward_pre_hook(runs)
        try:
            yield way
        finally:
            hook.remove()
            way.again = way.again or any(leaf.grad is not None for leaf in leaves)
