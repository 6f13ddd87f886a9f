"""What optimizers keep of each entry of a parameter, such as its momentum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def of_each_entry(parameters: Mapping[Tensor, str], optimizers: Iterable[Any]) -> dict[Tensor, list[Tensor]]:
    """The tensors of each parameter's state that have its shape, so that an entry of them belongs to one of its own.

    What is called the same but has another shape than its parameter elsewhere, such as the preconditioners of Shampoo,
    has that of a square one by chance, and is left out.

    Raises:
        ValueError: some of them are quantised, so that no one knows which number stands for zero.
    """
    found: dict[Tensor, list[Tensor]] = {parameter: [] for parameter in parameters}
    for optimizer in optimizers:
        named = {key: dict(_named(kept)) for key, kept in getattr(optimizer, "state", {}).items()}
        others = {
            name
            for key, tensors in named.items()
            for name, tensor in tensors.items()
            if isinstance(key, Tensor) and tensor.numel() != 1 and tensor.shape != key.shape
        }
        for parameter, called in parameters.items():
            for name, tensor in named.get(parameter, {}).items():
                if tensor.shape == parameter.shape and name not in others:
                    _check(tensor, f"{type(optimizer).__name__} keeps {name[-1]!r} of {called!r}")
                    found[parameter].append(tensor)
    return found


def _named(state: Any, *path: Any) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors of a parameter's state by name, with those in dictionaries within it."""
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, Mapping):
        for name, value in state.items():
            yield from _named(value, *path, name)


def _check(tensor: Tensor, said: str) -> None:
    if is_traceable_wrapper_subclass(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        kind = str(tensor.dtype).removeprefix("torch.") if type(tensor) is Tensor else type(tensor).__name__
        raise ValueError(
            f"{said} as {kind}, whose entries cannot be set to zero: drop the state as you prune, with "
            "Pruner(..., keep_state=False) or optimizer.state.clear(). Nothing is pruned yet"
        )
