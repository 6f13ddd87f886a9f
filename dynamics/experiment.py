"""The paper's protocol as one function of one dataclass: train, prune in rounds, train on, record everything."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import DATASETS, Data, load
from .models import MODELS, build
from .probe import Objective, cross_entropy_objective, mode_of
from .pruning import MEASURES, PROTOCOLS, Pruner, share_left
from .recorder import Recorder

Batches = list[tuple[Tensor, Tensor]]

# What a setting of each type takes, and how a message says it.
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a text"),
    "str | None": (lambda value: value is None or isinstance(value, str), "a text"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (lambda value: type(value) is int or (isinstance(value, float) and math.isfinite(value)), "a number"),
    "tuple[int, ...]": (lambda value: _all_are("int", value), "a list of whole numbers"),
    "tuple[float, ...]": (lambda value: _all_are("float", value), "a list of numbers"),
}


def _all_are(kind: str, values: object) -> bool:
    return isinstance(values, tuple | list) and all(_KINDS[kind][0](value) for value in values)


@dataclass(frozen=True)
class Experiment:
    """One training with pruning, by the protocol of Lubana & Dick (ICLR 2021).

    In each of the first ``rounds`` epochs the network trains for one epoch at the first learning rate, is scored and
    pruned, and the optimizer starts afresh. These epochs come out of the first stage of the schedule.

    Args:
        model: Network: vgg13, mobilenet_v1 or resnet56.
        data: Data set: digits (ships with scikit-learn), fashion-mnist, cifar10 or cifar100.
        measure: Importance measure to prune by, or "none" to train without pruning.
        sparsity: Share of all filters that is gone after the last round.
        rounds: Number of rounds of pruning.
        granularity: What is pruned: "filter", or "weight" for single weights.
        protocol: "default", "reference" for the quirks of the paper's code, or one quirk's name.
        width: Factor on the network's numbers of channels.
        epochs: Epochs in each stage of the learning-rate schedule.
        learning_rates: Learning rate of each stage.
        batch_size: Samples in a training batch.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on every parameter.
        temperature: T of the training loss, the cross-entropy of logits / T.
        augment: Shift the training images by up to 4 pixels at random, and mirror them where that keeps their class.
        keep_momentum: Keep the optimizer's momentum over a pruning; by default it is dropped, as in the paper.
        importance_samples: Training samples that an importance measure looks at.
        probe_samples: Training samples at which everything is measured before and after each pruning.
        curvature_every: Measure curvature and the loss decrease at every such step; 0 means never.
        seed: Seed of initialisation, data order and augmentation.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        root: Folder of the data sets; by default $THETADOT_DATA, else ~/.cache/thetadot.
        download: Let torchvision download a data set that is not on disk.

    Raises:
        ValueError: a field has an impossible value; the message says which, what it got and what it can be.
    """

    model: str = "vgg13"
    data: str = "digits"
    measure: str = "magnitude"
    sparsity: float = 0.75
    rounds: int = 5
    granularity: str = "filter"
    protocol: str = "default"
    width: float = 1.0
    epochs: tuple[int, ...] = (80, 40, 40)
    learning_rates: tuple[float, ...] = (0.1, 0.01, 0.001)
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 5.0
    augment: bool = True
    keep_momentum: bool = False
    importance_samples: int = 2560
    probe_samples: int = 512
    curvature_every: int = 64
    seed: int = 0
    device: str = "auto"
    root: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            fits, kind = _KINDS[field.type]
            if not fits(value := getattr(self, field.name)):
                raise ValueError(f"{field.name} must be {kind}, got {value!r}")
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        row = MEASURES.get(self.measure)
        for field, value, options in (
            ("model", self.model, MODELS),
            ("data", self.data, DATASETS),
            ("measure", self.measure, ("none", *MEASURES)),
            ("granularity", self.granularity, ("filter", "weight")),
            ("protocol", self.protocol, PROTOCOLS),
        ):
            if value not in options:
                raise ValueError(f"unknown {field} {value!r}: choose one of {', '.join(options)}")
        if self.granularity == "weight" and (self.protocol != "default" or getattr(row, "per_filter", False)):
            raise ValueError(
                f"single weights are not pruned by protocol {self.protocol!r} and measure {self.measure!r}: these know "
                "filters only; choose granularity filter"
            )

    def _check_ranges(self) -> None:
        if len(self.epochs) != len(self.learning_rates) or not self.epochs or min(self.epochs) < 0:
            raise ValueError(
                f"epochs and learning_rates need one entry a stage, got {self.epochs}, {self.learning_rates}"
            )
        share_left(self.sparsity, self.rounds, 0)
        if self.measure != "none" and self.rounds > self.epochs[0]:
            raise ValueError(f"{self.rounds} rounds need as many epochs in the first stage, which has {self.epochs[0]}")
        for field in ("batch_size", "importance_samples", "probe_samples", "learning_rates", "temperature", "width"):
            value = getattr(self, field)
            if min(value if isinstance(value, tuple | list) else (value,)) <= 0:
                raise ValueError(f"{field} must be positive, got {value}")
        for field in ("momentum", "weight_decay", "curvature_every", "seed"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if self.seed >= 2**63 - 1:
            raise ValueError(f"seed must be less than 2**63 - 1, got {self.seed}")

    @property
    def name(self) -> str:
        """A name that tells the runs of a comparison apart, e.g. ``vgg13-digits-magnitude-0.75-5r-seed0``."""
        special = [name for name in (self.granularity, self.protocol) if name not in ("filter", "default")]
        pruned = "" if self.measure == "none" else "-".join(["", f"{self.sparsity:g}", f"{self.rounds}r", *special])
        return f"{self.model}-{self.data}-{self.measure}{pruned}-seed{self.seed}"

    def schedule(self) -> list[float]:
        """Learning rate of each epoch."""
        stages = zip(self.epochs, self.learning_rates, strict=True)
        return [rate for epochs, rate in stages for _ in range(epochs)]


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
    data = data or load(experiment.data, root=experiment.root, download=experiment.download)
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
            keep_state=experiment.keep_momentum, seed=experiment.seed,
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
