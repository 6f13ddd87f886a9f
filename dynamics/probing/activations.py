"""Keeps activations in memory while a network is probed: none is recomputed, offloaded or packed.

In a backward pass torch.utils.checkpoint recomputes activations with the network's own parameters, which may not be the
probe's. Without checkpoints the result is the same; only more memory is taken.
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

_ONE_AT_A_TIME = threading.RLock()  # else a second thread would take the first one's patches of torch for the originals

_PACKED = (
    "what backward passes need is packed by torch.autograd.graph.saved_tensors_hooks around the "
    "whole loop: put these hooks around forward passes only, or inside the model"
)


@contextmanager
def activations_stay() -> Iterator[None]:
    """Inside, checkpoints and hooks on saved tensors do nothing in this thread; one thread at a time is inside.

    Raises:
        RuntimeError: hooks on saved tensors are active already.
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
    """Runs a function in place of a reentrant checkpoint, whose backward pass would start another one inside itself.

    Like that checkpoint, it returns a constant if no input requires a gradient.
    """
    trained = any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        return function(*inputs)
