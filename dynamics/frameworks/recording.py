"""What the frameworks' recorders share: a recorder whose model comes later, and metrics as a record can name them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from numbers import Real
from typing import Any

from torch import Tensor

from ..recorder import Recorder


def recording(path: str | os.PathLike, **settings: Any) -> Callable[..., Recorder]:
    """A function ``(model, optimizer) -> Recorder``.

    Raises:
        TypeError: a setting that :class:`Recorder` does not have; now, not when the training begins.
    """
    signature(Recorder).bind(path, None, None, **settings)
    return partial(Recorder, path, **settings)


def simple_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among metrics, ``val/loss`` as ``val_loss``; the epoch is left out, for the recorder counts it."""
    scalars = {
        re.sub(r"\W", "_", name): float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    }
    scalars.pop("epoch", None)
    return scalars
