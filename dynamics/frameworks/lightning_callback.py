"""A callback that records what Lightning's Trainer trains."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..recording.recorder import Recorder
from .common import log_metrics, recorder_factory

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callbacks() -> list[type]:
    """The class Callback, which exists twice: the Trainer of each package needs its own.

    It is that of the package that the user has imported, or else of the first one installed.
    """
    if loaded := [name for name in _PACKAGES if name in sys.modules]:
        return [import_module(name).Callback for name in loaded]
    try:
        return [import_module(_PACKAGES[0]).Callback]
    except ModuleNotFoundError:
        return [import_module(_PACKAGES[1]).Callback]


class LightningRecorder(*_callbacks()):
    """Records a fit.

    ::

        trainer = L.Trainer(callbacks=[LightningRecorder("run.zarr", curvature_every=64)])

    ``loss`` in ``/steps`` is what ``training_step`` returns (with LBFGS, the first of several times), and ``/epochs``
    holds what each training epoch, and each validation within one, added to ``trainer.callback_metrics``. Curvature is
    that of ``objective(module, batch)``: Lightning cannot run ``training_step`` outside its loop, so the default is the
    cross-entropy of ``(inputs, labels)`` with ``module(inputs)`` as logits. During a fit, ``recorder`` is its
    :class:`dynamics.Recorder`.

    Args:
        path: where the record goes, a new folder.
        settings: the keyword arguments of :class:`dynamics.Recorder`.
    """

    def __init__(self, path: str | os.PathLike, **settings: Any) -> None:
        self.recorder: Recorder | None = None
        self._make_recorder = recorder_factory(path, **settings)
        self._losses: list[Tensor] = []
        self._evaluated: list[Tensor] = []  # of one batch: LBFGS asks for its loss several times
        self._stepped = 0
        self._begun = False  # whether a batch has been seen
        self._metrics: dict[str, Any] = {}  # that were logged
        self._before_validation: dict[str, Any] = {}
        self._epoch_ended = False

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Begin recording: the optimizers exist, and a checkpoint has been loaded."""
        self.recorder = self._make_recorder(
            trainer.model, trainer.optimizers, trainer.global_step // len(trainer.optimizers)
        )
        if pl_module.automatic_optimization and trainer.world_size == 1:  # else it may be a part of the step's
            self.recorder.trust_loss()
        self._losses, self._stepped = [], trainer.global_step
        self._metrics, self._epoch_ended, self._begun = {}, False, False

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Log the previous epoch."""
        self._log_epoch(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Observe the batch; the first one begins an epoch: after a checkpoint, nothing else may tell of its start."""
        if batch_idx == 0 or not self._begun:
            self.recorder.begin_epoch(anew=batch_idx == 0)
        self._begun = True
        self._evaluated = []
        self.recorder.observe(batch)

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Tensor) -> None:
        """Keep the loss at the parameters from which the step starts: the first, if the optimizer asks for several."""
        if pl_module.automatic_optimization:
            self._evaluated = [*self._evaluated[:1], loss.detach()]

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After a step, log the mean loss of its batches; each arrives divided by the number of batches per step.

        If the module itself optimizes, it may skip batches, which the recorder finds out.
        """
        if outputs and outputs.get("loss") is not None:
            loss = self._evaluated[0] if len(self._evaluated) > 1 else outputs["loss"].detach()
            if pl_module.automatic_optimization:
                self._losses.append(loss * trainer.accumulate_grad_batches)
            else:
                self.recorder.log(loss=loss)
        if trainer.global_step > self._stepped:
            if self._losses:
                self.recorder.log(loss=torch.stack(self._losses).mean())
            self._losses, self._stepped = [], trainer.global_step

    def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Note the metrics there are, which are not the validation's."""
        self._before_validation = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Log a validation amid an epoch; what one at its end found is logged with the epoch."""
        if self.recorder and not (trainer.sanity_checking or trainer.is_last_batch):
            self._log_metrics(trainer, self._before_validation)

    def on_train_epoch_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Note that the epoch ended; it is logged later, because the module's own hook runs after this one."""
        self._epoch_ended = True

    def on_save_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Write what was recorded: a training that resumes from the checkpoint needs it."""
        if self.recorder:
            self._log_epoch(trainer)
            self.recorder.flush()

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Close the record."""
        self._close(trainer)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Close the record."""
        self._close(trainer)

    def _log_epoch(self, trainer: Any) -> None:
        """Log the metrics of the epoch that has ended."""
        if self._epoch_ended:
            self._epoch_ended = False
            self._log_metrics(trainer, self._metrics)

    def _log_metrics(self, trainer: Any, before: dict[str, Any]) -> None:
        """Log the metrics that are not those ``before``."""
        new = {name: value for name, value in trainer.callback_metrics.items() if value is not before.get(name)}
        self._metrics = self._metrics | new
        log_metrics(self.recorder, new)

    def _close(self, trainer: Any) -> None:
        if self.recorder:
            self._log_epoch(trainer)
            recorder, self.recorder = self.recorder, None
            recorder.close()
