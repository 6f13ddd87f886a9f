"""What a forward pass starts from besides parameters and batch, kept so that it can be run again without a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_REGISTRIES = frozenset(vars(nn.Module())) - {"training"}


class RandomState:
    """The state of the random number generators of torch, on CPU and one device, numpy and Python, to be set again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if self._device else None

    def restore(self) -> None:
        """Set the generators to the kept state."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._device:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextmanager
def random_numbers_untouched(device: torch.device) -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards as they were."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


class Moment:
    """Buffers, random numbers and what modules keep in plain attributes, such as a hidden state, as they are now.

    Attributes are kept by reference, lists, dictionaries and sets by a shallow copy.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._random = RandomState(device)
        self._attributes = _attributes(model)
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def buffers(self) -> dict[str, Tensor]:
        """A fresh copy of each buffer, by name."""
        return {name: buffer.clone() for name, buffer in self._buffers.items()}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, random numbers and attributes are those of the moment; afterwards they are as they were before."""
        attributes = _attributes(self._model)
        with random_numbers_untouched(self._device):
            try:
                _set_attributes(self._attributes)
                self._random.restore()
                yield
            finally:
                _set_attributes(attributes)


def _attributes(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    return [(module, _copied(vars(module))) for module in model.modules()]


def _set_attributes(attributes: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, kept in attributes:
        own = vars(module)
        for name in own.keys() - kept.keys() - _REGISTRIES:
            del own[name]
        own.update(_copied(kept))


def _copied(own: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in own.items() if name not in _REGISTRIES}
    return {name: value.copy() if type(value) in (list, dict, set) else value for name, value in plain.items()}
