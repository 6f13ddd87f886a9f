"""How a model is called on inputs of which it may take several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs, given one input, or a tuple or list of several, or a mapping of these by name.

    What its ``forward`` does not take in that way is one input: a pair, or a mapping whose keys name no arguments.
    """
    if isinstance(inputs, tuple | list) and _takes(model, *inputs):
        return model(*inputs)
    if isinstance(inputs, Mapping) and all(isinstance(key, str) for key in inputs) and _takes(model, **inputs):
        return model(**inputs)
    return model(inputs)


def _takes(model: nn.Module, *inputs: Any, **named: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*inputs, **named)
    except TypeError:
        return False
    return True
