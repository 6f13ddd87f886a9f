"""What optimizers keep of each entry of a parameter, such as its momentum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .optimizers import held_by, with_those_within


def of_each_entry(parameters: Mapping[Tensor, str], optimizers: Iterable[Any]) -> dict[Tensor, list[Tensor]]:
    """The tensors of each parameter's state that have its shape, so that an entry of them belongs to one of its own.

    A square matrix of a square parameter is left out if what is called the same has another shape than its parameter
    elsewhere: it has the same by chance, as the preconditioners of Shampoo have.

    Raises:
        TypeError: one of the optimizers is none.
        ValueError: some of them are quantised, so that no one knows which number stands for zero.
    """
    found: dict[Tensor, list[Tensor]] = {parameter: [] for parameter in parameters}
    for optimizer in optimizers:
        named = {key: dict(_named(kept)) for key, kept in state_of(optimizer).items()}
        others = {
            name
            for key, tensors in named.items()
            for name, tensor in tensors.items()
            if isinstance(key, Tensor) and tensor.numel() != 1 and tensor.shape != key.shape
        }
        for parameter, called in parameters.items():
            for name, tensor in named.get(parameter, {}).items():
                by_chance = name in others and tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
                if tensor.shape == parameter.shape and not by_chance:
                    _check(tensor, f"{type(optimizer).__name__} keeps {name[-1]!r} of {called!r}")
                    found[parameter].append(tensor)
    return found


def state_of(optimizer: Any) -> MutableMapping[Any, Any]:
    """What an optimizer keeps, by parameter; nothing if it only steps through another.

    Raises:
        TypeError: it is no optimizer.
    """
    state = getattr(optimizer, "state", {} if held_by(optimizer) else None)
    if not isinstance(state, MutableMapping):
        raise TypeError(f"an optimizer, or what steps through one, has a state by parameter; got {optimizer!r:.60}")
    return state


def drop_state(optimizers: Iterable[Any], parameters: Iterable[Tensor]) -> None:
    """Drop what optimizers, and those that these hold, keep of parameters.

    What a wrapper itself keeps of those that an optimizer within it holds stays, such as Lookahead's slow weights.
    """
    ours = set(parameters)
    for optimizer in with_those_within(optimizers):
        groups = [group for inner in held_by(optimizer) for group in inner.param_groups]
        dropped = ours.difference(*(group["params"] for group in groups))
        state = state_of(optimizer)
        if dropped.issuperset(state):
            state.clear()
        for parameter in dropped.intersection(state):
            del state[parameter]


def _named(state: Any, *path: Any) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors of a parameter's state by name, with those in dictionaries within it."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from _named(value, *path, name)


def _check(tensor: Tensor, said: str) -> None:
    known = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool
    if is_traceable_wrapper_subclass(tensor) or not known:
        kind = str(tensor.dtype).removeprefix("torch.") if type(tensor) is Tensor else type(tensor).__name__
        raise ValueError(
            f"{said} as {kind}, whose entries cannot be set to zero: drop the state as you prune, with "
            "Pruner(..., keep_state=False) or optimizer.state.clear(). Nothing is pruned yet"
        )
