"""Objectives: scalar losses of a model and a batch, which training minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Objective = Callable[[nn.Module, Any], Tensor]


def cross_entropy_objective(model: nn.Module, batch: tuple[Tensor, Tensor], temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy of softmax(model(inputs) / T) for a batch ``(inputs, labels)``: a scalar.

    Raises:
        ValueError: the batch is not such a pair, there is only one class, or labels hold negative numbers, as in a
            regression, which needs another loss.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, tuple | list | dict) else ""
        got, listed = f"{type(batch).__name__}{many}", "pass a list of such batches; " * isinstance(batch, Tensor)
        raise ValueError(
            f"the cross-entropy needs batches (inputs, labels), got a {got}: {listed}for another loss pass objective="
        )
    inputs, labels = batch
    outputs = model(inputs)
    if outputs.ndim > 1 and outputs.shape[1] < 2:
        raise ValueError(f"the cross-entropy of one class is always 0, got outputs of shape {tuple(outputs.shape)}")
    if labels.is_floating_point() and _is_negative(labels):
        raise ValueError("labels hold negative numbers, so they are not class probabilities")
    return F.cross_entropy(outputs / temperature, labels)


def scalar(returned: Any) -> Tensor:
    """The scalar loss that an objective has returned.

    Raises:
        ValueError: it has returned something else.
    """
    if isinstance(returned, Tensor) and returned.numel() == 1:
        return returned.reshape(())
    if isinstance(returned, Tensor):
        got = f"one of shape {tuple(returned.shape)}: return its mean, for example"
    elif isinstance(returned, Mapping):
        keys = ", ".join(map(repr, returned))
        got = f"a {type(returned).__name__} with the keys {keys:.80}: return the loss alone, which is one of its values"
    elif isinstance(returned, tuple | list):
        got = f"a {type(returned).__name__} of {len(returned)}: return the loss alone"
    elif isinstance(returned, Number):
        got = f"the number {returned!r:.20}, which has no gradient: return the tensor, without item()"
    else:
        got = f"{returned!r:.60}: return the loss"
    raise ValueError(f"an objective must return a scalar loss, got {got}")


def _is_negative(values: Tensor) -> bool:
    """Whether any value is negative; not checked during a CUDA graph capture, before which the batch ran eagerly."""
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing()) and bool((values < 0).any())
