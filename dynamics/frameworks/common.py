"""What the frameworks' recorders share: a recorder whose model comes later, and metrics under names a record allows.

Each creates its recorder once model and optimizer exist and a checkpoint is loaded. It tells the recorder where an
epoch begins (``begin_epoch``), each batch before its forward pass (``observe``), the loss of a step and the metrics of
an epoch; it flushes before a checkpoint is saved, and closes when the training ends, also by an exception.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..recording.arguments import check_epoch_scalar
from ..recording.recorder import Recorder
from ..recording.resuming import Counted
from ..warning import warn


def recorder_factory(path: str | os.PathLike, **settings: Any) -> Callable[..., Recorder]:
    """A function ``(model, optimizer, step) -> Recorder``; the step counts where a record does not know the parameters.

    Called with ``again=True``, it continues the record at ``path``, as after a training that did not end.

    Raises:
        TypeError: a setting that :class:`Recorder` does not have; raised now, not when the training begins.
    """
    signature(Recorder).bind(path, None, None, **settings)
    return partial(_made, path, settings)  # which processes that are spawned can be sent


def _made(
    path: str | os.PathLike, settings: Mapping[str, Any], model: nn.Module, optimizer: Any, step: int, *,
    again: bool = False,
) -> Recorder:  # fmt: skip
    resumes = bool(settings.get("resume")) and step > 0
    given = ({"step": Counted(step)} if resumes else {}) | dict(settings)
    return Recorder(path, model, optimizer, **given | {"resume": settings.get("resume") or again})


def log_metrics(recorder: Recorder, metrics: Mapping[str, Any]) -> None:
    """Append the scalars among metrics to ``/epochs``; warn of those that a row cannot hold: no reason to end it."""
    fit = {}
    for name, value in simple_scalars(metrics).items():
        try:
            check_epoch_scalar(name, value)
            fit[name] = value
        except ValueError as error:
            warn(f"the metric {name} is not recorded: {error}")
    if fit:
        recorder.log_epoch(**fit)


def simple_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among metrics, ``val/loss`` as ``val_loss``, except epoch and step, which the recorder counts."""
    scalars = {
        re.sub(r"\W", "_", name): float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
    }
    return {name: value for name, value in scalars.items() if name not in ("epoch", "step")}
