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
from torch.utils.checkpoint import CheckpointFunction

_ONE_AT_A_TIME = threading.RLock()  # what one thread exchanges in torch for a while, another must not take for torch's

_PACKED = (
    "what backward passes need is packed by torch.autograd.graph.saved_tensors_hooks around the "
    "whole loop: put these hooks around forward passes only, or inside the model"
)


@contextmanager
def activations_stay() -> Iterator[None]:
    """Inside, checkpoints and hooks on saved tensors do nothing in this thread; one thread at a time is inside.

    Raises:
        RuntimeError: hooks are in force already.
    """
    with _ONE_AT_A_TIME, torch.autograd.graph.disable_saved_tensors_hooks(_PACKED), _idle_here():
        yield


@contextmanager
def _idle_here() -> Iterator[None]:
    own, leave, here = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__, threading.get_ident()
    anew, idle = CheckpointFunction.apply, []

    def enter_here(hooks: saved_tensors_hooks) -> None:
        if threading.get_ident() != here:
            own(hooks)
        else:
            idle.append(hooks)

    def leave_here(hooks: saved_tensors_hooks, *exception: object) -> None:
        if threading.get_ident() != here or not any(one is hooks for one in idle):
            leave(hooks, *exception)

    def once_here(function: Callable[..., Any], preserves_random_state: bool, *inputs: Any) -> Any:
        if threading.get_ident() != here:
            return anew(function, preserves_random_state, *inputs)
        return _once(function, *inputs)

    with (
        mock.patch.object(saved_tensors_hooks, "__enter__", enter_here),
        mock.patch.object(saved_tensors_hooks, "__exit__", leave_here),
        mock.patch.object(CheckpointFunction, "apply", once_here),
    ):
        yield


def _once(function: Callable[..., Any], *inputs: Any) -> Any:
    """In place of the checkpoints that begin a backward pass within a backward pass.

    It gives a constant, as it is in training, if none of the inputs has a gradient.
    """
    trained = any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        return function(*inputs)
