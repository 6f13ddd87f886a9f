"""The paper's protocol as one function of an experiment: train, prune in rounds, train on, record everything."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Data, load
from .experiment import Experiment
from .models import build
from .probe import Objective, cross_entropy_objective, mode_of
from .pruning import MEASURES, PROTOCOLS, Pruner, share_left
from .recorder import Recorder
from .studies import add_studies

Batches = list[tuple[Tensor, Tensor]]


def run(experiment: Experiment, path: str | os.PathLike, *, data: Data | None = None, progress: bool = True) -> Path:
    """Run an experiment and record it at ``path``, a new folder; returns the path.

    Args:
        experiment: what to run.
        path: where the record goes.
        data: the data set, if it is loaded already.
        progress: show a bar, one tick a step.

    Raises:
        FileExistsError: ``path`` exists. FileNotFoundError: the data set is not on disk and ``download`` is off.
        ValueError: the training diverged, so that nothing can be ranked. What was recorded until then is kept.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already: choose another path, or remove it first")
    device = find_device(experiment.device)
    data = _chosen(data or load(experiment.data, root=experiment.root, download=experiment.download), experiment)
    torch.manual_seed(experiment.seed)
    model = build(
        experiment.model, num_classes=data.num_classes, in_channels=data.channels, width=experiment.width
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), experiment.learning_rates[0], experiment.momentum, weight_decay=experiment.weight_decay
    )
    objective = partial(cross_entropy_objective, temperature=experiment.temperature)
    configuration = {
        "experiment": json.dumps(dataclasses.asdict(experiment)),
        "protocol": json.dumps(dataclasses.asdict(PROTOCOLS[experiment.protocol])),
        "seed": experiment.seed,
    }
    with Recorder(
        path, model, optimizer, objective=objective, curvature_every=experiment.curvature_every,
        attributes=configuration,
    ) as recorder:  # fmt: skip
        _Training(experiment, data, device, model, optimizer, objective, recorder).run(progress)
    if recorder.failure is not None:
        raise OSError(f"the record {path} is incomplete: {recorder.failure}") from recorder.failure
    return Path(path)


def _chosen(data: Data, experiment: Experiment) -> Data:
    """The data set with the training samples of the experiment, drawn by its seed."""
    if not experiment.train_samples:
        return data
    drawn = torch.Generator().manual_seed(experiment.seed)
    per_class = max(experiment.train_samples // data.num_classes, 1)
    return dataclasses.replace(data, train=data.train.class_balanced(per_class, generator=drawn))


class _Training:
    """The state of one experiment while it runs."""

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        device: torch.device,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        recorder: Recorder,
    ) -> None:
        self.experiment, self.data, self.device = experiment, data, device
        self.model, self.optimizer, self.objective, self.recorder = model, optimizer, objective, recorder
        # Generators of their own, so that every measure sees the same training batches in the same order.
        self._order = torch.Generator().manual_seed(experiment.seed)
        self._choice = torch.Generator().manual_seed(experiment.seed + 1)
        sample = data.train.sample(experiment.probe_samples, generator=self._choice)
        self._probe = list(sample.batches(experiment.batch_size, device=device))
        self._test = data.test.batches(1024, device=device)
        self._train = data.train.batches(
            experiment.batch_size, shuffle=True, augment=experiment.augment, generator=self._order, device=device
        )
        pruned = experiment.measure != "none"
        self._pruner = None if not pruned else Pruner(
            model, optimizer, experiment.measure, granularity=experiment.granularity, protocol=experiment.protocol,
            keep_state=experiment.keep_momentum, initial=model.state_dict(), seed=experiment.seed,
        )  # fmt: skip

    def run(self, progress: bool) -> None:
        """All epochs, with the rounds of pruning in the first ones."""
        schedule = self.experiment.schedule()
        total = len(schedule) * len(self._train)
        with closing(tqdm(total=total, desc=self.experiment.name, unit="step", disable=not progress)) as bar:
            for epoch, rate in enumerate(schedule):
                started = time.perf_counter()
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                train = self._epoch(bar.update)
                test = self._evaluate()
                self.recorder.log_epoch(
                    train_loss=train[0], train_accuracy=train[1], test_loss=test[0], test_accuracy=test[1],
                    seconds=time.perf_counter() - started,
                )  # fmt: skip
                bar.set_postfix_str(f"epoch {epoch + 1}/{len(schedule)}, test accuracy {test[1]:.1%}")
                if self._pruner is not None and epoch < self.experiment.rounds:
                    self._prune(epoch + 1)

    def _epoch(self, tick: Callable[[], object]) -> tuple[float, float]:
        """Train for one epoch; mean loss and accuracy over its steps."""
        self.model.train()
        loss_sum, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for inputs, labels in self.recorder.watch(self._train):
            self.optimizer.zero_grad()
            logits = self.model(inputs)
            loss = nn.functional.cross_entropy(logits / self.experiment.temperature, labels)
            loss.backward()
            self.optimizer.step()
            self.recorder.log(loss=loss)
            loss_sum += loss.detach() * len(labels)
            right += (logits.argmax(1) == labels).sum()
            tick()
        count = len(self.data.train)
        return (loss_sum / count).item(), (right / count).item()

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
        count = len(self.data.test)
        return (loss_sum / count).item(), (right / count).item()

    def _prune(self, round_number: int) -> None:
        """A round; the record's target is what the schedule asks for, also where a quirk makes it more."""
        chosen, protocol = self.experiment, PROTOCOLS[self.experiment.protocol]
        target = 1 - share_left(chosen.sparsity, chosen.rounds, round_number)
        left = protocol.share_left(chosen.sparsity, chosen.rounds, round_number, residual=self._pruner.residual)
        pruning = self._pruner.plan(1 - left, self._importance_batches())
        described = pruning.attributes | {"target": target}
        with self.recorder.event("prune", probe=self._probe, **described) as event:
            if chosen.studies and round_number in (1, chosen.rounds):
                add_studies(event, self.model, pruning, self._probe, self.objective)
            self._pruner.apply(pruning)
            if chosen.granularity == "filter":
                event.units(alive=pruning.alive, scores=pruning.scores)

    def _importance_batches(self) -> Batches:
        count, classes = self.experiment.importance_samples, self.data.num_classes
        if MEASURES[self.experiment.measure].class_balanced:
            images = self.data.train.class_balanced(max(count // classes, 1), generator=self._choice)
        else:
            images = self.data.train.sample(count, generator=self._choice)
        return list(images.batches(self.experiment.batch_size, device=self.device))


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no such device here, or nothing can be computed on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {name!r} cannot be used: {reason}; choose auto, cpu, or cuda where there is one"
        ) from error
    return device
