"""While a network is probed its activations stay: nothing of them is computed again, moved or packed.

What torch.utils.checkpoint computes again on the way back it computes with the network's own parameters, which may not
be those of the probe. A checkpoint says how much memory is taken, not what is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_PACKED = (
    "what backward passes need is packed, by torch.autograd.graph.saved_tensors_hooks around the whole loop: put them "
    "around forward passes only, or into the model"
)


@contextmanager
def activations_stay() -> Iterator[None]:
    """Inside, checkpoints and hooks on saved tensors do nothing in this thread.

    Raises:
        RuntimeError: hooks are in force already.
    """
    own, leave, here = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__, threading.get_ident()
    idle: list[saved_tensors_hooks] = []

    def enter_here(hooks: saved_tensors_hooks) -> None:
        if threading.get_ident() != here:
            own(hooks)
        else:
            idle.append(hooks)

    def leave_here(hooks: saved_tensors_hooks, *exception: object) -> None:
        if threading.get_ident() != here or not any(one is hooks for one in idle):
            leave(hooks, *exception)

    with (
        torch.autograd.graph.disable_saved_tensors_hooks(_PACKED),
        mock.patch.object(saved_tensors_hooks, "__enter__", enter_here),
        mock.patch.object(saved_tensors_hooks, "__exit__", leave_here),
        mock.patch("torch.utils.checkpoint.CheckpointFunction", _Once),
    ):
        yield


class _Once:
    """In place of the checkpoints that begin a backward pass within a backward pass."""

    @staticmethod
    def apply(function: Callable[..., Any], preserves_random_state: bool, *inputs: Any) -> Any:
        """The function of the inputs; a constant, as it is in training, if none of these has a gradient."""
        trained = any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return function(*inputs)
