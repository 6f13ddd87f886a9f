"""The paper's protocol as one function of an experiment: train, prune in rounds, train on, record everything."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import checkpoint
from .compiling import compiled
from .data import Data, load
from .experiment import Experiment
from .masks import apply_masks, parameter_masks
from .models import build
from .probe import Objective, cross_entropy_objective, mode_of
from .pruning import MEASURES, PROTOCOLS, Pruner, share_left
from .reading import check
from .recorder import Recorder
from .store import Store
from .studies import add_studies

Batches = list[tuple[Tensor, Tensor]]

EVALUATED_AT_ONCE = 256  # images; activations of more leave a processor's cache, and take two to three times as long


def run(
    experiment: Experiment,
    path: str | os.PathLike,
    *,
    data: Data | None = None,
    progress: bool = True,
    report: Callable[[int], object] = lambda steps: None,
) -> Path:
    """Run an experiment and record it at ``path``; returns the path.

    What is there of the same experiment is gone on with, from the end of its last epoch, as if it had never been
    interrupted: the record is the same, bit for bit, on the same machine. A finished record is left as it is.

    Args:
        experiment: what to run.
        path: where the record goes.
        data: the data set, if it is loaded already.
        progress: show a bar, one tick a step.
        report: called with the number of steps that are done, at the start and after each.

    Raises:
        FileExistsError: something else is at ``path``. BlockingIOError: another process runs the experiment there.
        FileNotFoundError: the data set is not on disk and ``download`` is off.
        ValueError: the training diverged, so that nothing can be ranked. What was recorded until then is kept.
    """
    path = Path(path)
    if is_finished(path, experiment):
        return path
    device = find_device(experiment.device)
    data = _chosen(data or load(experiment.data, root=experiment.root, download=experiment.download), experiment)
    torch.manual_seed(experiment.seed)
    model = build(
        experiment.model, num_classes=data.num_classes, in_channels=data.channels, width=experiment.width
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(
        model.parameters(), experiment.learning_rates[0], experiment.momentum, weight_decay=experiment.weight_decay,
        fused=True,
    )  # fmt: skip
    training = _Training(experiment, data, device, model, optimizer)
    if (state := checkpoint.load(path)) is not None:
        training.restore(state)
    configuration = {
        "experiment": json.dumps(dataclasses.asdict(experiment)),
        "protocol": json.dumps(dataclasses.asdict(PROTOCOLS[experiment.protocol])),
        "seed": experiment.seed,
    }
    with Recorder(
        path, training.trained, optimizer, objective=training.objective, curvature_every=experiment.curvature_every,
        attributes=configuration, resume="rewind", step=training.steps,
    ) as recorder:  # fmt: skip
        training.run(recorder, path, report, progress=progress)
    if recorder.failure is not None:
        raise OSError(f"the record {path} is incomplete: {recorder.failure}") from recorder.failure
    _finish(path)
    return path


def is_finished(path: Path, experiment: Experiment) -> bool:
    """Whether the record of an experiment is complete; False where there is none.

    Raises:
        FileExistsError: what is at ``path`` is not the record of this experiment.
    """
    if not path.exists():
        return False
    try:
        attributes = check(path)[".zattrs"]
        settings = json.loads(attributes["experiment"])
        recorded = Experiment(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}).identity
    except (KeyError, TypeError, ValueError) as error:  # not a record, or not an experiment's
        raise FileExistsError(f"{path} exists already: choose another path, or remove it first") from error
    asked = experiment.identity
    differing = [name for name in asked if recorded.get(name) != asked[name]]
    if other := [f"{name} {recorded.get(name)!r}, not {asked[name]!r}" for name in differing]:
        raise FileExistsError(
            f"{path} is another experiment's, with {', '.join(other)}; choose another path, or remove it first"
        )
    return bool(attributes.get("finished"))


def _finish(path: Path) -> None:
    """Say in the record that nothing is missing."""
    store = Store.reopen(path)
    try:
        store.note("finished", True)
    finally:
        store.close()
    checkpoint.remove(path)


def _chosen(data: Data, experiment: Experiment) -> Data:
    """The data set with the training samples of the experiment, drawn by its seed."""
    if not experiment.train_samples:
        return data
    drawn = torch.Generator().manual_seed(experiment.seed)
    per_class = max(experiment.train_samples // data.num_classes, 1)
    return dataclasses.replace(data, train=data.train.class_balanced(per_class, generator=drawn))


def steps_of(experiment: Experiment, data: Data) -> int:
    """Steps of a whole run, with all the data there is."""
    return len(experiment.schedule()) * -(-len(_chosen(data, experiment).train) // experiment.batch_size)


class _Training:
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
        self.trained = compiled(model, device) if experiment.compile else model  # the same, as training steps run it
        self.objective: Objective = partial(cross_entropy_objective, temperature=experiment.temperature)
        self._epochs = 0  # that are done
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

    @property
    def steps(self) -> int:
        """Steps in the epochs that are done."""
        return self._epochs * len(self._train)

    def state(self) -> dict[str, Any]:
        """All that the epochs to come depend on."""
        on_gpu = self.device.type == "cuda"
        return {
            "epochs": self._epochs,
            "model": self.model.state_dict(),
            "masks": parameter_masks(self.model),
            "optimizer": self.optimizer.state_dict(),
            "alive": {} if self._pruner is None else self._pruner.alive,
            "order": self._order.get_state(),
            "choice": self._choice.get_state(),
            "random": torch.get_rng_state(),
            "random_on_gpu": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to where a :meth:`state` was taken."""
        self._epochs = state["epochs"]
        self.model.load_state_dict(state["model"])
        apply_masks(self.model, state["masks"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._pruner is not None:
            self._pruner.alive = state["alive"]
        self._order.set_state(state["order"])
        self._choice.set_state(state["choice"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["random_on_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_on_gpu"], self.device)

    def run(self, recorder: Recorder, path: Path, report: Callable[[int], object], *, progress: bool) -> None:
        """The epochs that are left, with the rounds of pruning in the first ones; a checkpoint after each."""
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
                bar.set_postfix_str(f"epoch {epoch + 1}/{len(schedule)}, test accuracy {test[1]:.1%}")
                if self._pruner is not None and epoch < self.experiment.rounds:
                    self._prune(epoch + 1)
                self._epochs = epoch + 1
                recorder.flush()
                if recorder.failure is None:  # else the record would not reach as far as the checkpoint
                    checkpoint.save(path, self.state())

    def _epoch(self, tick: Callable[[], object]) -> tuple[float, float]:
        """Train for one epoch; mean loss and accuracy over its steps."""
        self.model.train()
        loss_sum, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for inputs, labels in self.recorder.watch(self._train):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.experiment.precision == "bfloat16"):
                logits = self.trained(inputs)
                loss = nn.functional.cross_entropy(logits / self.experiment.temperature, labels)
            loss.backward()
            self.optimizer.step()
            self.recorder.log(loss=loss)
            loss_sum += loss.detach() * len(labels)
            right += (logits.argmax(1) == labels).sum()
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
