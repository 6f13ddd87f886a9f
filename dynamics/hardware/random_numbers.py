"""The random generators that a forward pass may draw from, put back to where they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomState:
    """A snapshot of the random generators of torch (CPU and one GPU, of whatever make), numpy and Python."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if has_random_numbers(device) else None
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._gpu = torch.get_device_module(device).get_rng_state(device) if self._device else None

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
        if self._device:
            torch.get_device_module(self._device).set_rng_state(self._gpu, self._device)


def has_random_numbers(device: torch.device) -> bool:
    """Whether the device draws random numbers from a generator of its own, as a GPU does."""
    return device.type not in ("cpu", "meta")


@contextmanager
def random_numbers_untouched(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the random generators are afterwards as they were before."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()
