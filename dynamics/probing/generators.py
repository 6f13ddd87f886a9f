"""Random generators and sequences of quasi-random numbers, also within a library's tools, such as transforms."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .contents import Saved, Saver, may_be_kept, save_array, save_object, save_tensor
from .ownership import CONTAINERS, OF_OTHERS, entries, held, is_users, own_attributes, size
from .walk import MOST, walk

_OF_CODE = (type, ModuleType, FunctionType, MethodType, BuiltinMethodType)


def saver_of_generator(value: Any) -> Saver | None:
    """A saver of a random generator's state; None for any other object."""
    if isinstance(value, torch.Generator):
        return partial(_save_generator, value.get_state, value.set_state)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return partial(_save_generator, partial(getattr, bits, "state"), partial(setattr, bits, "state"))
    if isinstance(value, np.random.RandomState):
        return partial(_save_generator, value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return partial(_save_generator, value.getstate, value.setstate)
    return None


def _save_generator(get: Callable[[], Any], put: Callable[[Any], object]) -> Saved:
    state = get()
    return partial(put, state), [state]


def draws(value: Any) -> bool:
    """Whether an object is a random generator, or counts how many quasi-random numbers it has drawn."""
    return saver_of_generator(value) is not None or is_sequence(value)


def savers_of_drawing(value: Any) -> list[Saver]:
    """Savers of an object that :func:`draws`."""
    if (generator := saver_of_generator(value)) is not None:
        return [generator]
    own = [one for one in held(value) if not isinstance(one, nn.Module)]
    tensors = [partial(save_tensor, one) for one in own if isinstance(one, Tensor) and may_be_kept(one)]
    arrays = [partial(save_array, one) for one in own if isinstance(one, np.ndarray) and one.flags.writeable]
    generators = [save for save in map(saver_of_generator, own) if save is not None]
    return [partial(save_object, value), *tensors, *arrays, *generators]


def is_sequence(value: Any) -> bool:
    """Whether an object counts how many quasi-random numbers it has drawn, as torch's and SciPy's do."""
    return isinstance(own_attributes(value).get("num_generated"), int)


def is_tool(value: Any) -> bool:
    """Whether an object of a library can be called, as a transform can."""
    return callable(value) and not (isinstance(value, (*_OF_CODE, *OF_OTHERS)) or is_users(type(value)))


def drawing(tool: Any) -> list[Any]:
    """What :func:`draws` in a library's object that can be called, and in such objects that it holds."""
    found: list[Any] = []

    def look(value: Any) -> Iterable[Any]:
        if draws(value):
            found.append(value)
        elif is_tool(value):
            lists = (entries(one) for one in held(value) if isinstance(one, CONTAINERS) and size(one) <= MOST)
            return [*held(value), *chain.from_iterable(lists)]
        return ()

    walk([tool], look, bounded=True)
    return found
