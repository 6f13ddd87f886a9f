"""The paper's protocol: train, prune in rounds, train on; all of it recorded, with a checkpoint after each epoch."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Data
from ..errors import one_line
from ..hardware.captured import release_memory
from ..hardware.random_numbers import gpu_state, set_gpu_state
from ..network.masks import apply_masks, parameter_masks
from ..probing.mode import mode_of
from ..probing.objective import Objective, cross_entropy_objective
from ..pruning import MEASURES, PROTOCOLS, Pruner, share_left
from ..recording.recorder import Recorder
from . import checkpoint
from .compiling import compiled
from .experiment import Experiment
from .passes import Passes
from .studies import add_studies

Batches = list[tuple[Tensor, Tensor]]

EVALUATED_AT_ONCE = 256  # images: activations of more exceed a CPU's cache, and take two to three times as long


def chosen(data: Data, experiment: Experiment) -> Data:
    """The data set with the training samples of the experiment, drawn by its seed."""
    if not experiment.train_samples:
        return data
    drawn = torch.Generator().manual_seed(experiment.seed)
    return dataclasses.replace(data, train=data.balanced(experiment.train_samples, drawn))


def steps_of(experiment: Experiment, data: Data) -> int:
    """Number of steps of a whole run on the given data."""
    return len(experiment.schedule()) * -(-len(chosen(data, experiment).train) // experiment.batch_size)


class Training:
    """The state of one experiment while it runs."""

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        device: torch.device,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.experiment, self.data, self.device = experiment, data, device
        self.model, self.optimizer = model, optimizer
        self.trained = compiled(model, device) if experiment.compile else model  # the model as training steps run it
        self.objective: Objective = partial(cross_entropy_objective, temperature=experiment.temperature)
        self._passes = Passes(self.trained, temperature=experiment.temperature, low=experiment.precision == "bfloat16")
        self._epochs = 0  # done so far
        # Generators of their own, so that every measure sees the same training batches in the same order.
        self._order = torch.Generator().manual_seed(experiment.seed)
        self._choice = torch.Generator().manual_seed(experiment.seed + 1)
        sample = data.train.sample(experiment.probe_samples, generator=self._choice)
        self._probe = list(sample.batches(experiment.batch_size, device=device))
        self._test = data.test.batches(EVALUATED_AT_ONCE, device=device)
        self._train = data.train.batches(
            experiment.batch_size, shuffle=True, augment=experiment.augment, generator=self._order, device=device
        )
        pruned = experiment.measure != "none"
        self._pruner = None if not pruned else Pruner(
            model, optimizer, experiment.measure, granularity=experiment.granularity, protocol=experiment.protocol,
            keep_state=experiment.keep_momentum, initial=model.state_dict(), seed=experiment.seed,
        )  # fmt: skip
        if self._pruner is not None:  # fails now if it is impossible, not after an epoch
            self._pruner.check(self._sparsity(experiment.rounds))

    @property
    def steps(self) -> int:
        """Steps in the epochs that are done."""
        return self._epochs * len(self._train)

    def state(self) -> dict[str, Any]:
        """Everything on which the remaining epochs depend."""
        return {
            "epochs": self._epochs,
            "model": self.model.state_dict(),
            "masks": parameter_masks(self.model),
            "optimizer": self.optimizer.state_dict(),
            "order": self._order.get_state(),
            "choice": self._choice.get_state(),
            "random": torch.get_rng_state(),
            "random_on_gpu": gpu_state(self.device),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state returned by :meth:`state`."""
        self._epochs = state["epochs"]
        self.model.load_state_dict(state["model"])
        apply_masks(self.model, state["masks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._order.set_state(state["order"])
        self._choice.set_state(state["choice"])
        torch.set_rng_state(state["random"])
        set_gpu_state(self.device, state["random_on_gpu"])

    def run(self, recorder: Recorder, path: Path, report: Callable[[int], object], *, progress: bool) -> None:
        """Run the remaining epochs, with a round of pruning in each of the first ones and a checkpoint after each."""
        self.recorder, schedule, done = recorder, self.experiment.schedule(), count(self.steps + 1)
        total = len(schedule) * len(self._train)
        report(self.steps)
        with closing(
            tqdm(total=total, initial=self.steps, desc=self.experiment.name, unit="step", disable=not progress)
        ) as bar:
            for epoch in range(self._epochs, len(schedule)):
                started = time.perf_counter()
                for group in self.optimizer.param_groups:
                    group["lr"] = schedule[epoch]
                train = self._epoch(lambda: (report(next(done)), bar.update()))
                test = self._evaluate()
                recorder.log_epoch(
                    train_loss=train[0], train_accuracy=train[1], test_loss=test[0], test_accuracy=test[1],
                    seconds=time.perf_counter() - started,
                )  # fmt: skip
                self._check_finite(epoch + 1)
                bar.set_postfix_str(said := f"epoch {epoch + 1}/{len(schedule)}, test accuracy {test[1]:.1%}")
                if self._pruner is not None and epoch < self.experiment.rounds:
                    bar.set_postfix_str(f"{said}, pruning")
                    self._prune(epoch + 1)
                    bar.set_postfix_str(said)
                self._epochs = epoch + 1
                recorder.flush()
                if recorder.failure is None:  # else the record would not reach as far as the checkpoint
                    self._save(path)

    def _save(self, path: Path) -> None:
        """Save a checkpoint; if that fails, continue: a killed run then loses one epoch more."""
        try:
            checkpoint.save(path, self.state())
        except OSError as error:
            warnings.warn(f"{path} has no checkpoint after epoch {self._epochs}: {one_line(error)}", stacklevel=2)

    def _check_finite(self, epoch: int) -> None:
        """Raise ValueError if parameters are no longer finite: they never will be again."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise ValueError(f"the training diverged in epoch {epoch}: parameters are no longer finite")

    def _epoch(self, tick: Callable[[], object]) -> tuple[float, float]:
        """Train for one epoch; returns mean loss and accuracy over its samples, each as of its step."""
        self.model.train()
        loss_sum, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for inputs, labels in self.recorder.watch(self._train):
            loss, hits = self._passes(inputs, labels)
            self.optimizer.step()
            self.recorder.log(loss=loss)
            loss_sum += loss * len(labels)
            right += hits
            tick()
        samples = len(self.data.train)
        return (loss_sum / samples).item(), (right / samples).item()

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float]:
        """Loss and accuracy on the test set."""
        loss_sum, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with mode_of(self.model, "eval"):
            for inputs, labels in self._test:
                logits = self.model(inputs)
                loss = nn.functional.cross_entropy(logits / self.experiment.temperature, labels)
                loss_sum += loss * len(labels)
                right += (logits.argmax(1) == labels).sum()
        samples = len(self.data.test)
        return (loss_sum / samples).item(), (right / samples).item()

    def _prune(self, round_number: int) -> None:
        """Prune one round; the record's target is what the schedule asks for, even where a quirk prunes more."""
        self._passes.forget()
        chosen = self.experiment
        target = 1 - share_left(chosen.sparsity, chosen.rounds, round_number)
        pruning = self._pruner.plan(self._sparsity(round_number), self._importance_batches())
        described = pruning.attributes | {"target": target}
        with self.recorder.event("prune", probe=self._probe, mode=chosen.probe_mode, **described) as event:
            if chosen.studies and round_number in (1, chosen.rounds):
                add_studies(event, self.model, pruning, self._probe, self.objective, chosen.probe_mode)
            self._pruner.apply(pruning)
            if chosen.granularity == "filter":
                event.units(alive=pruning.alive, scores=pruning.scores)
        release_memory()  # pruning takes several times a step's memory, and others may share the GPU

    def _sparsity(self, round_number: int) -> float:
        """Sparsity that the protocol asks for in a round."""
        chosen, protocol = self.experiment, PROTOCOLS[self.experiment.protocol]
        return 1 - protocol.share_left(chosen.sparsity, chosen.rounds, round_number, residual=self._pruner.residual)

    def _importance_batches(self) -> Batches:
        chosen, data = self.experiment, self.data
        draw = data.balanced if MEASURES[chosen.measure].class_balanced else data.train.sample
        images = draw(chosen.importance_samples, generator=self._choice)
        augment = chosen.augment and PROTOCOLS[chosen.protocol].score_augmented
        return list(images.batches(chosen.batch_size, augment=augment, generator=self._choice, device=self.device))
