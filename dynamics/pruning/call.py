"""How a model is called on inputs of which it may need several."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs, given its input or, if ``forward`` needs several, a tuple, list or mapping of these."""
    try:
        inspect.signature(model.forward).bind(inputs)
    except TypeError:  # it needs more
        if isinstance(inputs, tuple | list):
            return model(*inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
    return model(inputs)
