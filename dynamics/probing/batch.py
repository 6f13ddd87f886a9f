"""One batch, whatever collections and objects it consists of: its tensors, its size, copies of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..hardware.memory_order import channels_first
from .undrawn import UndrawnIterator, is_iterator


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all tensors in its tuples, lists and mappings on the device, and all else that has a ``to``."""

    def sent(other: Any) -> Any:
        return other.to(device) if callable(getattr(type(other), "to", None)) else other

    return mapped(batch, lambda tensor: tensor.to(device, non_blocking=True), sent)


def as_measured(batch: Any, device: torch.device) -> Any:
    """The batch on the device, in the memory format in which losses are evaluated."""
    return mapped(to_device(batch, device), channels_first)


def copied(batch: Any) -> Any:
    """A copy of the batch: of every tensor, and of all else that a loop may change in place."""
    return mapped(batch, _copy_of_tensor, _copy)


def _copy_of_tensor(tensor: Tensor) -> Tensor:
    """A copy, which is a leaf that requires gradients if the tensor is one: a loss may differentiate by its inputs."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad and tensor.is_leaf)


def _copy(value: Any) -> Any:
    """A copy of an array or an object; if it cannot be copied, the object itself or, of an iterator, a stand-in."""
    try:
        return copy.deepcopy(value)
    except Exception:  # it may be anything
        return UndrawnIterator(value) if is_iterator(value) else value


def layout(batch: Any) -> Hashable:
    """The structure of a batch: everything but the values of its tensors.

    Raises:
        TypeError: it holds something other than dense tensors, collections of them, strings and numbers.
    """
    if type(batch) in (Tensor, nn.Parameter) and batch.layout is torch.strided:
        return batch.shape, batch.stride(), batch.dtype
    if isinstance(batch, Mapping):
        return type(batch), tuple((key, layout(value)) for key, value in batch.items())
    if isinstance(batch, tuple | list):
        return type(batch), tuple(layout(value) for value in batch)
    if batch is None or isinstance(batch, str | int | float):
        return type(batch), batch
    raise TypeError(f"a batch holds a {type(batch).__name__}")


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in the batch."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(batch, note)
    return found


def mapped(
    batch: Any, function: Callable[[Tensor], Tensor], of_others: Callable[[Any], Any] = lambda other: other
) -> Any:
    """A copy of the batch with ``function`` of every tensor in its collections, and ``of_others`` of other objects."""
    inner = partial(mapped, function=function, of_others=of_others)
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):  # torch wants batch_sizes on the CPU
        return type(batch)(inner(batch.data), batch.batch_sizes, *map(inner, batch[2:]))
    if isinstance(batch, Mapping):
        values = {key: inner(value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return values
        return _with_values(batch, values)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inner, batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map(inner, batch))
    return batch if isinstance(batch, str | bytes | int | float | None) else of_others(batch)


def _with_values(batch: MutableMapping, values: Mapping) -> MutableMapping:
    """A copy of a mapping that is no plain dict, such as a tokenizer's output, with these values."""
    other = copy.copy(batch)
    for name, own in getattr(other, "__dict__", {}).items():
        if type(own) is dict and own is vars(batch).get(name):  # else the batch itself would get the values
            vars(other)[name] = dict(own)
    other.update(values)
    return other


def sample_count(batch: Any) -> int:
    """Length of the first tensor in the batch, or of a list that is an entry of it; 1 if there is neither."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    parts = (value for value in values if isinstance(value, Tensor | Mapping | tuple | list))
    return next((len(part) if isinstance(part, list) else sample_count(part) for part in parts), 1)
