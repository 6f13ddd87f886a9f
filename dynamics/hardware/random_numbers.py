"""The random generators that a forward pass may draw from, put back to where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """A snapshot of the random generators of torch (CPU and one GPU, of whatever make), numpy and Python."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._gpu = gpu_state(device)

    def __eq__(self, other: object) -> bool:
        """Whether both would draw the same numbers."""
        if not isinstance(other, RandomState):
            return NotImplemented
        pairs = ((self._cpu, other._cpu), (self._gpu, other._gpu))
        tensors = all((one is None) == (two is None) and (one is None or torch.equal(one, two)) for one, two in pairs)
        (_, keys, *rest), (_, other_keys, *other_rest) = self._numpy, other._numpy
        return tensors and self._python == other._python and rest == other_rest and np.array_equal(keys, other_keys)

    __hash__ = None

    def restore(self) -> None:
        """Set the generators to the kept state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        set_gpu_state(self._device, self._gpu)


def gpu_state(device: torch.device) -> Tensor | None:
    """The state of a GPU's own generator; None if the device has none."""
    return torch.get_device_module(device).get_rng_state(device) if _is_gpu(device) else None


def set_gpu_state(device: torch.device, state: Tensor | None) -> None:
    """Set a GPU's own generator, if the device has one, to a state that :func:`gpu_state` returned for a GPU."""
    if _is_gpu(device) and state is not None:
        torch.get_device_module(device).set_rng_state(state, device)


def _is_gpu(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")


@contextmanager
def random_numbers_untouched(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the random generators are afterwards as they were before."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()
