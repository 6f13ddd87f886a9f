"""A callback that records what Hugging Face's Trainer trains."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from ..hardware.random_numbers import random_numbers_untouched
from ..loop.processes import replica_of
from ..probing.batch import sample_count
from ..probing.objective import Objective
from ..recording.recorder import Recorder
from .common import recorder_factory, simple_scalars

_SPREAD = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class TrainerRecorder(TrainerCallback):
    """Records a training. With data parallelism over several processes, the first writes one record for all.

    ::

        Trainer(..., callbacks=[TrainerRecorder("run.zarr")]).train()

    A batch is what the Trainer gives the model. ``loss`` in ``/steps`` is the one that the Trainer logs (every step's
    with ``logging_steps=1``); the metrics of an evaluation are in the row of the step before it. During a training,
    ``recorder`` is its :class:`dynamics.Recorder`. The Trainer does not tell callbacks of exceptions: after one,
    :meth:`close` or ``with TrainerRecorder(...) as callback`` closes the record; otherwise the next training continues
    it.

    Args:
        path: where the record goes, a new folder.
        objective: ``objective(model, batch) -> scalar loss``, the batch a mapping; by default the loss that the model
            returns for it. If it changes with the batch's ``num_items_in_batch``, it is taken to be divided by that, as
            the Trainer wants it, and so to be the batch's share of the step's loss.
        settings: further keyword arguments of :class:`dynamics.Recorder`.
    """

    def __init__(self, path: str | os.PathLike, *, objective: Objective | None = None, **settings: Any) -> None:
        self.recorder: Recorder | None = None
        self._objective = objective or _loss_of_model
        self._shares: bool | None = None if objective else True  # whether it is divided by num_items_in_batch
        self._make_recorder = recorder_factory(path, objective=self._share_of_the_step, **settings)
        self._hook: RemovableHandle | None = None
        self._samples, self._processes = 0, 1
        self._within_epoch = False
        self._began = 0  # after so many steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Begin recording: the optimizer exists, and a checkpoint has been loaded.

        Raises:
            ValueError: parameters are sharded, so that no process holds all of them.
        """
        again = self.recorder is not None  # as auto_find_batch_size does
        self.close()
        if (kind := AcceleratorState().distributed_type) in _SPREAD:
            raise ValueError(
                f"TrainerRecorder needs all parameters in one process, but {kind.value} shards them: train with "
                "data parallelism, or without this callback"
            )
        self._within_epoch = bool((state.epoch or 0) % 1)  # the checkpoint's
        self._began = state.global_step
        self._processes = args.world_size if args.average_tokens_across_devices else 1
        model, optimizer = training["model"], training["optimizer"]
        self.recorder = self._make_recorder(replica_of(model) or model, optimizer, state.global_step, again=again)
        if args.logging_strategy == "steps" and args.logging_steps == 1 and args.world_size == 1:
            self.recorder.trust_loss()  # else it is a mean over steps, or processes
        self._hook = model.register_forward_pre_hook(self._observe, with_kwargs=True, prepend=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Count the epoch, unless a checkpoint was saved within it."""
        if self.recorder:
            self.recorder.begin_epoch(anew=not self._within_epoch)
        self._within_epoch = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Count the step's samples from 0."""
        self._samples = 0

    @torch.compiler.disable
    def _observe(self, model: nn.Module, args: tuple, batch: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled() and not self.recorder.measuring:
            batch = _by_name(model, args) | batch if args else batch
            self._samples += sample_count(batch)
            self.recorder.observe(batch)

    def _share_of_the_step(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The objective of a batch, scaled so that the recorder's mean over batches is the step's loss.

        A loss that is given ``num_items_in_batch``, the number of the whole step's items, is the batch's share of the
        step's loss, and the Trainer adds these up.
        """
        loss = self._objective(model, batch)
        if "num_items_in_batch" not in batch:
            return loss
        if self._shares is None:
            self._shares = _depends_on_count(self._objective, model, batch)
        return loss * (self._processes * self._samples / sample_count(batch)) if self._shares else loss

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **training: Any) -> None:
        """Log the training loss, unless it is the objective that logs."""
        if self.recorder and "loss" in logs and not self.recorder.measuring:
            self.recorder.log(loss=logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **training: Any) -> None:
        """Log the metrics of an evaluation; one before the first step has no row."""
        if self.recorder and state.global_step > self._began:
            self.recorder.log(**simple_scalars(metrics))

    def on_save(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Write what was recorded: a training that resumes from the checkpoint needs it."""
        if self.recorder:
            self.recorder.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **training: Any) -> None:
        """Close the record."""
        self.close()

    def close(self) -> None:
        """Close the record and detach everything; nothing happens if it is already closed."""
        recorder, self.recorder = self.recorder, None
        if recorder:
            self._hook.remove()
            recorder.close()

    def __enter__(self) -> TrainerRecorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@torch.no_grad()
def _depends_on_count(objective: Objective, model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether a batch's loss is another if the step has twice as many items, and draws the same random numbers."""
    more = {**batch, "num_items_in_batch": 2 * batch["num_items_in_batch"]}
    losses = []
    for one in (batch, more):
        with random_numbers_untouched(next(model.parameters()).device):
            losses.append(float(objective(model, one)))
    return not math.isclose(*losses, rel_tol=1e-4)


def _loss_of_model(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model returns for a batch."""
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise ValueError(
            f"the model returned no loss for a batch of {sorted(batch)}. Curvature needs the labels, which "
            "label_smoothing_factor, compute_loss_func, or a compute_loss that pops them keeps from the "
            "model: override Trainer.compute_loss so that the labels stay in what the model is given"
        )
    return loss


def _by_name(model: nn.Module, args: tuple) -> dict[str, Any]:
    """What a model was given by position, by the names in its forward method; what that takes as *args has none."""
    of_forward = list(signature(type(model).forward).parameters.values())[1:]  # without self
    names = [one.name for one in of_forward if one.kind is one.POSITIONAL_OR_KEYWORD]
    return dict(zip(names, args, strict=False))
