"""Warns of running statistics that lag behind the weights: in eval mode an event then measures another network."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..warning import warn


class RunningStatistics:
    """Compares an event's loss in eval mode with that in training mode; warns once if they are far apart."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._said = model, False

    @property
    def may_lag(self) -> bool:
        """Whether torch's normalisations use batch statistics in training and others in eval mode, and no warning came.

        Layers that stay in eval mode while the model trains do not count. With SyncBatchNorm nothing is compared,
        because its training mode would wait for other processes.
        """
        layers = [one for one in self._model.modules() if isinstance(one, _NormBase) and one.running_mean is not None]
        waits = any(isinstance(one, nn.SyncBatchNorm) for one in layers)
        return any(one.training == self._model.training for one in layers) and not (waits or self._said)

    def compare(self, evaluated: Tensor, training: Tensor) -> None:
        """Compare the loss before an event in eval mode and in training mode.

        They are far apart if the loss in training mode is less than half of that in eval mode. Dropout raises only the
        former, and so causes no warning.
        """
        if not evaluated - training > abs(evaluated) / 2:
            return
        self._said = True
        warn(
            f"the probe's loss is {evaluated:.4g} in eval mode, in which event() measures by default, and "
            f"{training:.4g} in training mode: running statistics, such as BatchNorm's, lag behind the "
            'weights. Use event(..., mode="train") to measure what training sees, or mode="eval" to confirm '
            "eval mode"
        )
